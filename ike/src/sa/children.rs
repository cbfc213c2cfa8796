//! The Child SAs of an IKE SA: a list in order of their numbers, since most IKE SAs have one, for which a map would have room
//! for eleven.

use super::child::ChildSa;
use crate::engine::ChildSaId;

/// Child SAs by number, with room for no more than there are.
#[derive(Default)]
pub(crate) struct Children(Vec<ChildSa>);

impl Children {
    /// Adds one, or puts it in the place of that with the same number.
    pub(crate) fn insert(&mut self, child: ChildSa) {
        match self.place(child.id) {
            Ok(at) => {
                if let Some(there) = self.0.get_mut(at) {
                    *there = child;
                }
            }
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, child);
            }
        }
    }

    pub(crate) fn remove(&mut self, id: ChildSaId) -> Option<ChildSa> {
        let at = self.place(id).ok()?;
        let child = self.0.remove(at);
        self.0.shrink_to_fit();
        Some(child)
    }

    pub(crate) fn get(&self, id: ChildSaId) -> Option<&ChildSa> {
        self.0.get(self.place(id).ok()?)
    }

    pub(crate) fn get_mut(&mut self, id: ChildSaId) -> Option<&mut ChildSa> {
        let at = self.place(id).ok()?;
        self.0.get_mut(at)
    }

    pub(crate) fn contains(&self, id: ChildSaId) -> bool {
        self.place(id).is_ok()
    }

    /// All, in order of their numbers.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, ChildSa> {
        self.0.iter()
    }

    /// As [`Self::iter`].
    pub(crate) fn iter_mut(&mut self) -> std::slice::IterMut<'_, ChildSa> {
        self.0.iter_mut()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place(&self, id: ChildSaId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&id, |child| child.id)
    }
}

//! The connections that are in force, found by name.

use std::collections::HashMap;
use std::sync::Arc;

use ike::config::Child;

use super::traps::Key;
use crate::config::shunt::ShuntPolicy;
use crate::config::{ConnectionDefinition, TrapActions};

/// All of them, in order of configuration.
#[derive(Default)]
pub(super) struct Definitions {
    all: Vec<ConnectionDefinition>,
    by_name: HashMap<String, usize>,
    /// By the name of a child: the first connection that has one of this name.
    by_child: HashMap<String, usize>,
}

impl Definitions {
    pub(super) fn new(all: Vec<ConnectionDefinition>) -> Self {
        let (mut by_name, mut by_child) = (HashMap::new(), HashMap::new());
        for (place, definition) in all.iter().enumerate() {
            by_name.entry(definition.connection.name.clone()).or_insert(place);
            for child in &definition.connection.children {
                by_child.entry(child.name.clone()).or_insert(place);
            }
        }
        Self { all, by_name, by_child }
    }

    pub(super) fn all(&self) -> &[ConnectionDefinition] {
        &self.all
    }

    fn named(&self, connection: &str) -> Option<&ConnectionDefinition> {
        self.all.get(*self.by_name.get(connection)?)
    }

    /// A child of a connection.
    pub(super) fn child(&self, connection: &str, child: &str) -> Option<&Arc<Child>> {
        self.named(connection)?.connection.children.iter().find(|known| known.name == child)
    }

    /// The configured `if_id_in` and `if_id_out` of a connection.
    pub(super) fn if_ids(&self, connection: &str) -> (u32, u32) {
        self.named(connection).map(|known| known.if_ids).unwrap_or_default()
    }

    /// When a trap for it is wanted.
    pub(super) fn traps(&self, connection: &str, child: &str) -> TrapActions {
        self.named(connection).map(|known| known.traps(child)).unwrap_or_default()
    }

    /// A shunt: the first of this name.
    pub(super) fn shunt(&self, ike: Option<&str>, name: &str) -> Option<(Key, ShuntPolicy)> {
        let named = self.all.iter().filter(|known| ike.is_none_or(|ike| ike == known.connection.name));
        named.flat_map(|known| known.shunts.iter().map(move |shunt| (known, shunt))).find_map(|(known, shunt)| {
            let key = (known.connection.name.clone(), shunt.child.name.clone());
            (key.1 == name).then(|| (key, shunt.policy()))
        })
    }

    /// What a command names: a child, whose connection may be missing, or a connection. Errors are charon's.
    pub(super) fn find(
        &self,
        ike: Option<&str>,
        child: Option<&str>,
    ) -> Result<(ConnectionDefinition, Option<Arc<Child>>), String> {
        let Some(child) = child else {
            let name = ike.unwrap_or_default();
            let found = self.named(name).filter(|known| !known.is_for_shunts_alone()).cloned();
            return found
                .map(|definition| (definition, None))
                .ok_or_else(|| format!("IKE_SA config '{name}' not found"));
        };
        let definition = match ike {
            Some(name) => self.named(name),
            None => self.by_child.get(child).and_then(|place| self.all.get(*place)),
        };
        let found = definition.and_then(|definition| {
            let config = definition.connection.children.iter().find(|known| known.name == child)?;
            Some((definition.clone(), Some(Arc::clone(config))))
        });
        found.ok_or_else(|| format!("CHILD_SA config '{child}' not found"))
    }
}

//! Marks and XFRM interfaces that each Child SA, or each IKE SA, has of its own (`%unique`, `%unique-dir`).

use std::collections::{BTreeMap, HashMap, HashSet};

use ike::config::{Number, Numbering};
use ike::engine::IkeSaId;
use ipsec::plane::{KernelOptions, Mark, Tags};

/// The numbers that are in use.
#[derive(Default)]
pub(super) struct Numbers {
    marks: Kind,
    if_ids: Kind,
    /// Those that are the IKE SAs': inbound, outbound.
    of_ike_sas: BTreeMap<IkeSaId, (u32, u32)>,
}

/// Numbers of one kind.
#[derive(Default)]
struct Kind {
    users: HashMap<u32, usize>,
    configured: HashSet<u32>,
    last: u32,
}

impl Kind {
    /// One that nobody has or is configured to have.
    fn fresh(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if !self.users.contains_key(&self.last) && !self.configured.contains(&self.last) {
                return self.last;
            }
        }
    }

    /// Those of both directions: one, or where either direction wants one of its own, two.
    fn pair(&mut self, apart: bool) -> (u32, u32) {
        let inbound = self.fresh();
        (inbound, if apart { self.fresh() } else { inbound })
    }

    fn taken(&mut self, number: u32) {
        if number != 0 {
            *self.users.entry(number).or_default() += 1;
        }
    }

    fn given_back(&mut self, number: u32) {
        if let Some(count) = self.users.get_mut(&number) {
            *count -= 1;
            if *count == 0 {
                self.users.remove(&number);
            }
        }
    }
}

impl Numbers {
    /// Leaves out what is configured: the second is of the interfaces.
    pub(super) fn configure(&mut self, marks: HashSet<u32>, if_ids: HashSet<u32>) {
        (self.marks.configured, self.if_ids.configured) = (marks, if_ids);
    }

    /// The options of a Child SA with its numbers in them: `predecessor`'s, or new ones. They are its own once it is
    /// [`Self::installed`].
    pub(super) fn number(
        &mut self,
        ike_sa: IkeSaId,
        configured: &KernelOptions,
        numbering: Numbering,
        predecessor: Option<Tags>,
    ) -> KernelOptions {
        let mut options = configured.clone();
        let own = |number| matches!(number, Number::Own | Number::OwnInDirection);
        let of_ike_sa = |number| matches!(number, Number::OfIkeSa | Number::OfIkeSaInDirection);
        let apart = |numbers: [Number; 2]| {
            numbers.iter().any(|number| matches!(number, Number::OwnInDirection | Number::OfIkeSaInDirection))
        };
        let marks = [numbering.mark_in, numbering.mark_out];
        if marks.into_iter().any(own) {
            let old = predecessor.map(|old| (old.mark_in.value, old.mark_out.value));
            let numbers = old.unwrap_or_else(|| self.marks.pair(apart(marks)));
            give(marks.map(own), numbers, (&mut options.mark_in.value, &mut options.mark_out.value));
        }
        let if_ids = [numbering.if_id_in, numbering.if_id_out];
        if if_ids.into_iter().any(own) {
            let old = predecessor.map(|old| (old.if_id_in, old.if_id_out));
            let numbers = old.unwrap_or_else(|| self.if_ids.pair(apart(if_ids)));
            give(if_ids.map(own), numbers, (&mut options.if_id_in, &mut options.if_id_out));
        }
        if if_ids.into_iter().any(of_ike_sa) {
            let numbers = self.of_ike_sa(ike_sa, apart(if_ids));
            give(if_ids.map(of_ike_sa), numbers, (&mut options.if_id_in, &mut options.if_id_out));
        }
        for (same, set, mark) in [
            (numbering.set_mark_in_same, &mut options.set_mark_in, options.mark_in),
            (numbering.set_mark_out_same, &mut options.set_mark_out, options.mark_out),
        ] {
            if same {
                *set = Mark { value: mark.value, mask: set.mask };
            }
        }
        options
    }

    fn of_ike_sa(&mut self, ike_sa: IkeSaId, apart: bool) -> (u32, u32) {
        if let Some(numbers) = self.of_ike_sas.get(&ike_sa) {
            return *numbers;
        }
        let (inbound, outbound) = self.if_ids.pair(apart);
        self.if_ids.taken(inbound);
        self.if_ids.taken(outbound);
        self.of_ike_sas.insert(ike_sa, (inbound, outbound));
        (inbound, outbound)
    }

    /// What an IKE SA has of its own.
    pub(super) fn of(&self, ike_sa: IkeSaId) -> Option<(u32, u32)> {
        self.of_ike_sas.get(&ike_sa).copied()
    }

    /// A successor has what its predecessor had.
    pub(super) fn rekeyed(&mut self, old: IkeSaId, new: IkeSaId) {
        if let Some(numbers) = self.of_ike_sas.remove(&old) {
            self.of_ike_sas.insert(new, numbers);
        }
    }

    /// An IKE SA is gone.
    pub(super) fn ended(&mut self, ike_sa: IkeSaId) {
        if let Some((inbound, outbound)) = self.of_ike_sas.remove(&ike_sa) {
            self.if_ids.given_back(inbound);
            self.if_ids.given_back(outbound);
        }
    }

    /// A Child SA is there.
    pub(super) fn installed(&mut self, tags: &Tags) {
        self.marks.taken(tags.mark_in.value);
        self.marks.taken(tags.mark_out.value);
        self.if_ids.taken(tags.if_id_in);
        self.if_ids.taken(tags.if_id_out);
    }

    /// A Child SA is gone.
    pub(super) fn removed(&mut self, tags: &Tags) {
        self.marks.given_back(tags.mark_in.value);
        self.marks.given_back(tags.mark_out.value);
        self.if_ids.given_back(tags.if_id_in);
        self.if_ids.given_back(tags.if_id_out);
    }
}

/// Puts the numbers of both directions where they are wanted.
fn give(wanted: [bool; 2], numbers: (u32, u32), places: (&mut u32, &mut u32)) {
    let [inbound, outbound] = wanted;
    if inbound {
        *places.0 = numbers.0;
    }
    if outbound {
        *places.1 = numbers.1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IKE_SA: IkeSaId = IkeSaId(1);

    fn up(numbers: &mut Numbers, numbering: Numbering, predecessor: Option<Tags>) -> KernelOptions {
        let masks = KernelOptions {
            mark_in: Mark { value: 0, mask: 0xff },
            set_mark_in: Mark { value: 0, mask: 3 },
            ..KernelOptions::default()
        };
        let options = numbers.number(IKE_SA, &masks, numbering, predecessor);
        numbers.installed(&options.tags());
        options
    }

    #[test]
    fn each_child_sa_has_its_own_number_and_its_successors_keep_it() {
        let mut numbers = Numbers::default();
        let numbering = Numbering {
            mark_in: Number::Own,
            mark_out: Number::Own,
            if_id_in: Number::OwnInDirection,
            if_id_out: Number::Own,
            set_mark_in_same: true,
            set_mark_out_same: false,
        };
        let first = up(&mut numbers, numbering, None);
        assert_eq!((first.mark_in, first.mark_out.value), (Mark { value: 1, mask: 0xff }, 1));
        assert_eq!((first.set_mark_in, first.set_mark_out), (Mark { value: 1, mask: 3 }, Mark::default()));
        assert_eq!((first.if_id_in, first.if_id_out), (1, 2));
        let second = up(&mut numbers, numbering, None);
        assert_eq!((second.mark_in.value, second.mark_out.value), (2, 2));
        assert_eq!((second.if_id_in, second.if_id_out), (3, 4));
        let successor = up(&mut numbers, numbering, Some(first.tags()));
        assert_eq!(successor, first);
        // While the successor is there its numbers are nobody else's, even when counting begins anew.
        numbers.removed(&first.tags());
        (numbers.marks.last, numbers.if_ids.last) = (0, 0);
        let third = up(&mut numbers, numbering, None);
        assert_eq!((third.mark_in.value, third.if_id_in, third.if_id_out), (3, 5, 6));
        for there in [successor, second, third] {
            numbers.removed(&there.tags());
        }
        assert!(numbers.marks.users.is_empty() && numbers.if_ids.users.is_empty());
    }

    #[test]
    fn numbers_that_are_configured_are_not_given() {
        let mut numbers = Numbers::default();
        numbers.configure(HashSet::from([1]), HashSet::from([1, 3]));
        let numbering = Numbering {
            mark_out: Number::Own,
            if_id_in: Number::OwnInDirection,
            if_id_out: Number::Own,
            ..Numbering::default()
        };
        let options = up(&mut numbers, numbering, None);
        assert_eq!((options.mark_in.value, options.mark_out.value), (0, 2));
        assert_eq!((options.if_id_in, options.if_id_out), (2, 4));
    }

    #[test]
    fn the_child_sas_of_an_ike_sa_share_its_number() {
        let mut numbers = Numbers::default();
        let both = Numbering { if_id_in: Number::OfIkeSa, if_id_out: Number::OfIkeSa, ..Numbering::default() };
        let outbound = Numbering { if_id_out: Number::OfIkeSa, ..Numbering::default() };
        let first = up(&mut numbers, both, None);
        assert_eq!((first.if_id_in, first.if_id_out), (1, 1));
        let second = up(&mut numbers, outbound, None);
        assert_eq!((second.if_id_in, second.if_id_out), (0, 1));
        numbers.rekeyed(IKE_SA, IkeSaId(2));
        assert_eq!((numbers.of(IKE_SA), numbers.of(IkeSaId(2))), (None, Some((1, 1))));
        let third = up(&mut numbers, both, None);
        assert_eq!((third.if_id_in, third.if_id_out), (2, 2));
        for there in [first, second, third] {
            numbers.removed(&there.tags());
        }
        numbers.ended(IkeSaId(2));
        numbers.ended(IKE_SA);
        assert!(numbers.if_ids.users.is_empty() && numbers.of_ike_sas.is_empty());
    }
}

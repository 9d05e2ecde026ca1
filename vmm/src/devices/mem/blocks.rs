//! Which blocks of the device's region the guest has: a pure model of what its driver asks for.

use std::ops::Range;

/// The unit in which the guest takes and gives memory: a huge page, so that what it gives back is
/// whole ones on the host.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// Where memory may come to a guest, and how much of it there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Where the region begins: a multiple of [`BLOCK_BYTES`].
    pub start: u64,
    /// How long it is: a multiple of [`BLOCK_BYTES`].
    pub bytes: u64,
    /// How much of it, from its start, is memory, all of which the guest is to take: a multiple of
    /// [`BLOCK_BYTES`].
    pub present: u64,
}

/// The answer to a request (virtio 1.2, 5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// Not now: there is no memory there.
    Nack,
    /// Another time: the host failed.
    Busy,
    /// The request is wrong.
    Error,
}

/// What of a range the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plugged {
    /// All.
    All,
    /// Nothing.
    None,
    /// Some.
    Mixed,
}

/// The blocks of a region.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    room: Room,
    /// Blocks that the driver may name.
    usable: usize,
    /// One bit a block that is memory.
    plugged: Vec<bool>,
    count: usize,
}

impl Blocks {
    /// None of which the guest has. `usable_bytes`, from the region's start, are those that its
    /// driver may name.
    pub(super) fn new(room: Room, usable_bytes: u64) -> Self {
        let blocks = |bytes: u64| (bytes / BLOCK_BYTES) as usize;
        Self {
            room,
            usable: blocks(usable_bytes.min(room.bytes)),
            plugged: vec![false; blocks(room.present)],
            count: 0,
        }
    }

    /// How much the guest has, in bytes.
    pub(super) fn plugged_bytes(&self) -> u64 {
        self.count as u64 * BLOCK_BYTES
    }

    /// The blocks that a request names, if those are of the region.
    fn named(&self, address: u64, blocks: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.room.start)?;
        if blocks == 0 || !offset.is_multiple_of(BLOCK_BYTES) {
            return None;
        }
        let first = usize::try_from(offset / BLOCK_BYTES).ok()?;
        let end = first.checked_add(blocks.into())?;
        (end <= self.usable).then_some(first..end)
    }

    /// What there is of a range, which may reach beyond the memory.
    fn plugged(&self, range: Range<usize>) -> Plugged {
        let length = range.len();
        let end = range.end.min(self.plugged.len());
        let blocks = self.plugged.get(range.start..end).unwrap_or_default();
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => Plugged::None,
            count if count == length => Plugged::All,
            _ => Plugged::Mixed,
        }
    }

    /// What the guest has of a range, or nothing when there is no such range.
    pub(super) fn state(&self, address: u64, blocks: u16) -> Option<Plugged> {
        self.named(address, blocks).map(|range| self.plugged(range))
    }

    /// Gives the guest blocks, none of which it has.
    pub(super) fn plug(&mut self, address: u64, blocks: u16) -> Answer {
        let Some(range) = self.named(address, blocks) else { return Answer::Error };
        if self.plugged(range.clone()) != Plugged::None {
            return Answer::Error;
        }
        let count = range.len();
        match self.plugged.get_mut(range) {
            // There is nothing behind the memory: this is the bound of what the guest gets.
            None => Answer::Nack,
            Some(blocks) => {
                blocks.fill(true);
                self.count += count;
                Answer::Ack
            }
        }
    }

    /// Takes blocks, all of which the guest has. `discard` gives that range of addresses back to
    /// the host, and says whether the host took it.
    pub(super) fn unplug(
        &mut self,
        address: u64,
        blocks: u16,
        discard: impl FnOnce(Range<u64>) -> bool,
    ) -> Answer {
        let Some(range) = self.named(address, blocks) else { return Answer::Error };
        if self.plugged(range.clone()) != Plugged::All {
            return Answer::Error;
        }
        if !discard(self.addresses(&range)) {
            return Answer::Busy;
        }
        self.count -= range.len();
        self.plugged[range].fill(false);
        Answer::Ack
    }

    /// Takes all that the guest has.
    pub(super) fn unplug_all(&mut self, discard: impl FnOnce(Range<u64>) -> bool) -> Answer {
        if self.count > 0 && !discard(self.addresses(&(0..self.plugged.len()))) {
            return Answer::Busy;
        }
        self.plugged.fill(false);
        self.count = 0;
        Answer::Ack
    }

    fn addresses(&self, range: &Range<usize>) -> Range<u64> {
        let at = |block: usize| self.room.start + block as u64 * BLOCK_BYTES;
        at(range.start)..at(range.end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 4 << 30;

    fn blocks(present: u64, usable: u64) -> Blocks {
        let room = Room { start: START, bytes: 1 << 30, present: present * BLOCK_BYTES };
        Blocks::new(room, usable * BLOCK_BYTES)
    }

    fn at(block: u64) -> u64 {
        START + block * BLOCK_BYTES
    }

    #[test]
    fn request_beyond_a_bound_is_an_error_and_changes_nothing() {
        let mut blocks = blocks(8, 16);
        for (address, count) in [
            (at(0), 0),
            (at(0) + 4096, 1),
            (at(0) - BLOCK_BYTES, 1),
            (0, 1),
            (!(BLOCK_BYTES - 1), u16::MAX),
            (at(0), 17),
            (at(15), 2),
            (at(16), 1),
            (at(0), u16::MAX),
        ] {
            assert_eq!(blocks.plug(address, count), Answer::Error, "{address:#x} {count}");
            assert_eq!(blocks.unplug(address, count, |_| true), Answer::Error);
            assert_eq!(blocks.state(address, count), None);
        }
        assert_eq!(blocks.plugged_bytes(), 0);
    }

    #[test]
    fn no_more_than_there_is_can_be_had() {
        let mut blocks = blocks(8, 16);
        assert_eq!(blocks.plug(at(0), 9), Answer::Nack);
        assert_eq!(blocks.plug(at(8), 1), Answer::Nack);
        assert_eq!(blocks.plug(at(15), 1), Answer::Nack);
        assert_eq!(blocks.plug(at(0), 8), Answer::Ack);
        assert_eq!(blocks.plugged_bytes(), 8 * BLOCK_BYTES);
        assert_eq!(blocks.state(at(7), 2), Some(Plugged::Mixed));
        assert_eq!(blocks.plug(at(7), 2), Answer::Error);
    }

    #[test]
    fn what_the_host_does_not_take_back_stays_the_guests() {
        let mut blocks = blocks(8, 16);
        blocks.plug(at(2), 2);
        assert_eq!(blocks.unplug(at(2), 2, |_| false), Answer::Busy);
        assert_eq!(blocks.unplug_all(|_| false), Answer::Busy);
        assert_eq!(blocks.state(at(2), 2), Some(Plugged::All));
        let mut discarded = None;
        let mut keep = |range| {
            discarded = Some(range);
            true
        };
        assert_eq!(blocks.unplug(at(2), 2, &mut keep), Answer::Ack);
        assert_eq!(discarded, Some(at(2)..at(4)));
        assert_eq!(blocks.unplug_all(|_| unreachable!()), Answer::Ack);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Plug(u64, u16),
        Unplug(u64, u16),
        UnplugAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = || (0..20u64, 0..12u16);
        prop_oneof![
            4 => range().prop_map(|(first, count)| Step::Plug(first, count)),
            3 => range().prop_map(|(first, count)| Step::Unplug(first, count)),
            1 => Just(Step::UnplugAll),
        ]
    }

    proptest! {
        #[test]
        fn guest_has_what_was_acknowledged_and_nothing_beyond_the_memory(
            present in 0..16u64, steps in proptest::collection::vec(step(), 0..60),
        ) {
            let mut blocks = blocks(present, 16);
            let mut has = std::collections::BTreeSet::new();
            for step in steps {
                match step {
                    Step::Plug(first, count) => {
                        let range = first..first + u64::from(count);
                        let answer = blocks.plug(at(first), count);
                        let free = range.clone().all(|block| !has.contains(&block));
                        let named = count > 0 && range.end <= 16;
                        let there = range.end <= present;
                        prop_assert_eq!(answer == Answer::Ack, named && free && there);
                        prop_assert_eq!(answer == Answer::Nack, named && free && !there);
                        if answer == Answer::Ack {
                            has.extend(range);
                        }
                    }
                    Step::Unplug(first, count) => {
                        let range = first..first + u64::from(count);
                        let mut discarded = None;
                        let answer = blocks.unplug(at(first), count, |given| {
                            discarded = Some(given);
                            true
                        });
                        let all = count > 0 && range.clone().all(|block| has.contains(&block));
                        prop_assert_eq!(answer == Answer::Ack, all);
                        prop_assert_eq!(discarded, all.then(|| at(range.start)..at(range.end)));
                        if all {
                            has.retain(|block| !range.contains(block));
                        }
                    }
                    Step::UnplugAll => {
                        prop_assert_eq!(blocks.unplug_all(|_| true), Answer::Ack);
                        has.clear();
                    }
                }
                prop_assert_eq!(blocks.plugged_bytes(), has.len() as u64 * BLOCK_BYTES);
                prop_assert!(has.iter().all(|block| *block < present));
                for block in 0..16 {
                    let state = match has.contains(&block) {
                        true => Plugged::All,
                        false => Plugged::None,
                    };
                    prop_assert_eq!(blocks.state(at(block), 1), Some(state));
                }
            }
        }
    }
}

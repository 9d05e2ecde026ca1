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
    /// How much of it, from its start, is memory, all of which the guest is to take at first: a
    /// multiple of [`BLOCK_BYTES`].
    pub present: u64,
}

/// Linux adds memory in blocks of this size on x86-64, and uses those alone of a region that are
/// usable as a whole (drivers/base/memory.c).
const LINUX_BLOCK_BYTES: u64 = 128 << 20;

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
    /// One a block that is memory.
    plugged: Vec<bool>,
    count: usize,
    /// How many the guest is to have, and how many it can have at most.
    requested: usize,
}

fn blocks_of(bytes: u64) -> usize {
    (bytes / BLOCK_BYTES) as usize
}

impl Blocks {
    /// None of which the guest has, and all of which it is to take.
    pub(super) fn new(room: Room) -> Self {
        let present = blocks_of(room.present);
        Self { room, plugged: vec![false; present], count: 0, requested: present }
    }

    /// How much of the region, from its start, is memory.
    pub(super) fn present_bytes(&self) -> u64 {
        self.room.present
    }

    /// How much of it, from its start, the driver may name. It never becomes less.
    pub(super) fn usable_bytes(&self) -> u64 {
        self.room.present.next_multiple_of(LINUX_BLOCK_BYTES).min(self.room.bytes)
    }

    /// How much the guest is to have.
    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested as u64 * BLOCK_BYTES
    }

    /// There is more memory behind what there was, up to so much of the region from its start.
    pub(super) fn extend(&mut self, present: u64) {
        self.room.present = present.clamp(self.room.present, self.room.bytes);
        self.plugged.resize(blocks_of(self.room.present), false);
    }

    /// What the guest is to have from now on, of what is memory.
    pub(super) fn request(&mut self, bytes: u64) {
        self.requested = blocks_of(bytes.min(self.room.present));
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
        (end <= blocks_of(self.usable_bytes())).then_some(first..end)
    }

    /// What there is of a range, which may reach beyond the memory.
    fn plugged(&self, range: Range<usize>) -> Plugged {
        let length = range.len();
        let end = range.end.min(self.plugged.len());
        let there = self.plugged.get(range.start..end).unwrap_or_default();
        match there.iter().filter(|plugged| **plugged).count() {
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
            // There is nothing behind the memory, and no more than is asked for: these are the
            // bounds of what the guest gets.
            Some(blocks) if self.count + count <= self.requested => {
                blocks.fill(true);
                self.count += count;
                Answer::Ack
            }
            _ => Answer::Nack,
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

    /// The driver may name 16 of them, whatever there is.
    fn blocks(present: u64) -> Blocks {
        Blocks::new(Room { start: START, bytes: 16 * BLOCK_BYTES, present: present * BLOCK_BYTES })
    }

    /// Without memory, it may name none.
    fn usable(present: u64) -> u64 {
        if present == 0 { 0 } else { 16 }
    }

    fn at(block: u64) -> u64 {
        START + block * BLOCK_BYTES
    }

    #[test]
    fn request_beyond_a_bound_is_an_error_and_changes_nothing() {
        let mut blocks = blocks(8);
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
        let mut blocks = blocks(8);
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
        let mut blocks = blocks(8);
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

    #[test]
    fn memory_that_comes_can_be_had_when_it_is_asked_for() {
        let mut blocks = blocks(2);
        blocks.extend(6 * BLOCK_BYTES);
        assert_eq!(blocks.plug(at(0), 3), Answer::Nack, "it is there, and not asked for");
        blocks.request(5 * BLOCK_BYTES);
        assert_eq!(blocks.plug(at(0), 3), Answer::Ack);
        assert_eq!(blocks.plug(at(3), 3), Answer::Nack);
        assert_eq!(blocks.plug(at(4), 2), Answer::Ack);
        // What is asked for less, the guest keeps until it gives it back, and never gets again.
        blocks.request(3 * BLOCK_BYTES);
        assert_eq!(blocks.plugged_bytes(), 5 * BLOCK_BYTES);
        assert_eq!(blocks.unplug(at(0), 2, |_| true), Answer::Ack);
        assert_eq!(blocks.plug(at(0), 1), Answer::Nack);
        blocks.request(100 * BLOCK_BYTES);
        assert_eq!(blocks.requested_bytes(), 6 * BLOCK_BYTES);
        blocks.extend(100 * BLOCK_BYTES);
        assert_eq!(blocks.present_bytes(), 16 * BLOCK_BYTES);
        blocks.extend(0);
        assert_eq!(blocks.present_bytes(), 16 * BLOCK_BYTES);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Plug(u64, u16),
        Unplug(u64, u16),
        UnplugAll,
        Extend(u64),
        Request(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = || (0..20u64, 0..12u16);
        prop_oneof![
            4 => range().prop_map(|(first, count)| Step::Plug(first, count)),
            3 => range().prop_map(|(first, count)| Step::Unplug(first, count)),
            1 => Just(Step::UnplugAll),
            1 => (0..20u64).prop_map(Step::Extend),
            1 => (0..20u64).prop_map(Step::Request),
        ]
    }

    proptest! {
        #[test]
        fn guest_has_what_was_acknowledged_and_nothing_beyond_the_memory(
            first in 0..16u64, steps in proptest::collection::vec(step(), 0..60),
        ) {
            let mut blocks = blocks(first);
            let (mut present, mut requested) = (first, first);
            let mut has = std::collections::BTreeSet::new();
            for step in steps {
                match step {
                    Step::Plug(first, count) => {
                        let range = first..first + u64::from(count);
                        let answer = blocks.plug(at(first), count);
                        let free = range.clone().all(|block| !has.contains(&block));
                        let named = count > 0 && range.end <= usable(present);
                        let asked = has.len() + usize::from(count) <= requested as usize;
                        let there = range.end <= present && asked;
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
                    Step::Extend(to) => {
                        blocks.extend(to * BLOCK_BYTES);
                        present = present.max(to.min(16));
                    }
                    Step::Request(number) => {
                        blocks.request(number * BLOCK_BYTES);
                        requested = number.min(present);
                    }
                }
                prop_assert_eq!(blocks.plugged_bytes(), has.len() as u64 * BLOCK_BYTES);
                prop_assert!(has.iter().all(|block| *block < present));
                for block in 0..usable(present) {
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

//! The queues of a tap, one for each pair of the device's, of which as many are attached to it as
//! the driver uses: the kernel shares packets out among all that are attached, and those in a queue
//! that nobody serves would be lost.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::tap;

/// How often a guest may have the number of queues changed: so often at once, and again after each
/// of these times. Each change takes the lock that all networks of the host share (rtnl), and waits
/// for all of its CPUs.
const CHANGES_AT_ONCE: u32 = 16;
const CHANGE_EVERY: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub(crate) struct Taps {
    queues: Vec<OwnedFd>,
    /// Attaches a queue, or detaches it.
    attach: fn(&OwnedFd, bool) -> io::Result<()>,
    changing: Mutex<Changing>,
}

#[derive(Debug)]
struct Changing {
    /// How many of the queues are attached, the first ones.
    attached: usize,
    budget: Budget,
}

impl Taps {
    /// Of queues of which only the first is attached, and there is one.
    pub(super) fn new(queues: Vec<OwnedFd>) -> Self {
        Self::with(queues, tap::attach_queue)
    }

    /// The same of what is attached otherwise.
    pub(super) fn with(queues: Vec<OwnedFd>, attach: fn(&OwnedFd, bool) -> io::Result<()>) -> Self {
        let budget = Budget::new(Instant::now());
        Self { queues, attach, changing: Mutex::new(Changing { attached: 1, budget }) }
    }

    /// All of them.
    pub(super) fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    /// How many are attached, the first ones.
    pub(super) fn attached(&self) -> usize {
        self.changing().attached
    }

    /// Has a driver's `change` made, which is to have `count` queues attached, unless it has had too
    /// many made. Returns whether there are so many.
    pub(super) fn change<E: std::fmt::Display>(
        &self,
        count: usize,
        change: impl FnOnce() -> Result<(), E>,
    ) -> bool {
        let before = self.attached();
        if count == before {
            return true;
        }
        if !self.changing().budget.take(Instant::now()) {
            return false;
        }
        let Err(error) = change() else { return true };
        tracing::warn!(%error, "a network keeps {before} pairs of queues");
        if let Err(error) = self.set_attached(before) {
            tracing::error!(%error, "a tap has {} queues, not {before}", self.attached());
        }
        false
    }

    /// Attaches the first `count` queues and no others. What is in a queue that is detached is
    /// lost.
    ///
    /// # Errors
    /// The kernel refuses. What is attached then is told by [`Taps::attached`].
    pub(super) fn set_attached(&self, count: usize) -> io::Result<()> {
        let mut changing = self.changing();
        // The kernel numbers queues by when they were attached, and a queue that goes leaves its
        // number to the last: so they come and go at the end, and keep their numbers.
        while changing.attached < count {
            (self.attach)(&self.queues[changing.attached], true)?;
            changing.attached += 1;
        }
        while changing.attached > count {
            (self.attach)(&self.queues[changing.attached - 1], false)?;
            changing.attached -= 1;
        }
        Ok(())
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many changes are left.
#[derive(Debug, Clone, Copy)]
struct Budget {
    left: u32,
    /// Since when more have been growing.
    since: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: CHANGES_AT_ONCE, since: now }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let grown = now.saturating_duration_since(self.since).as_nanos() / CHANGE_EVERY.as_nanos();
        let grown = u32::try_from(grown).unwrap_or(u32::MAX);
        if self.left.saturating_add(grown) >= CHANGES_AT_ONCE {
            *self = Self::new(now);
        } else {
            self.left += grown;
            self.since += CHANGE_EVERY * grown;
        }
        let taken = self.left.checked_sub(1);
        self.left = taken.unwrap_or(0);
        taken.is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn changes_in_any_time_have_a_bound(pauses in prop::collection::vec(0_u64..2000, 1..400)) {
            let begin = Instant::now();
            let mut budget = Budget::new(begin);
            let (mut now, mut taken) = (begin, Vec::new());
            for pause in pauses {
                now += Duration::from_millis(pause);
                if budget.take(now) {
                    taken.push(now);
                }
                // Whoever waits for one gets one.
                let mut later = budget;
                prop_assert!(later.take(now + CHANGE_EVERY));
            }
            for (index, first) in taken.iter().enumerate() {
                for (count, last) in (1_u32..).zip(&taken[index..]) {
                    let grown = (*last - *first).as_millis() / CHANGE_EVERY.as_millis();
                    prop_assert!(count <= CHANGES_AT_ONCE + 1 + grown as u32);
                }
            }
        }
    }

    #[test]
    fn queues_come_and_go_at_the_end() {
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        let taps = Taps::with((0..4).map(|_| file()).collect(), |_, _| Ok(()));
        for count in [3, 1, 4, 2] {
            taps.set_attached(count).unwrap();
            assert_eq!(taps.attached(), count);
        }
        // What the kernel refuses is not there, and nothing behind it.
        let taps = Taps::with((0..4).map(|_| file()).collect(), tap::attach_queue);
        taps.set_attached(3).unwrap_err();
        assert_eq!(taps.attached(), 1);
    }
}

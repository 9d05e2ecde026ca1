//! How far something was served.

use crate::sync::{AtomicU32, Ordering};

/// How far a queue was served, which is in no register. It outlives its worker, which leaves its last position here. Who
/// reads a position sees all that was done before it was left.
#[derive(Debug, Default)]
pub struct Position(AtomicU32);

impl Position {
    /// The next entry of the available ring, and that of the used ring: both of one moment.
    pub fn get(&self) -> (u16, u16) {
        let both = self.0.load(Ordering::Acquire);
        ((both >> 16) as u16, both as u16)
    }

    /// See [`Position::get`].
    pub fn set(&self, available: u16, used: u16) {
        self.0.store(u32::from(available) << 16 | u32::from(used), Ordering::Release);
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::{cell::UnsafeCell, thread};

    use super::*;

    /// What the ring has in its memory, which no lock guards.
    struct Served {
        position: Position,
        entry: UnsafeCell<u16>,
    }

    // Who reads the entry has seen the position behind it: loom tells when not.
    #[allow(unsafe_code)]
    // SAFETY: see above; the models are what checks it.
    unsafe impl Sync for Served {}

    #[test]
    #[allow(unsafe_code)]
    fn who_sees_how_far_a_queue_was_served_sees_what_was_put_there() {
        loom::model(|| {
            let served =
                Arc::new(Served { position: Position::default(), entry: UnsafeCell::new(0) });
            let worker = thread::spawn({
                let served = served.clone();
                move || {
                    // SAFETY: nobody else writes, or reads before the position is set.
                    served.entry.with_mut(|entry| unsafe { *entry = 7 });
                    served.position.set(1, 1);
                }
            });
            match served.position.get() {
                // SAFETY: it was written before the position, and is not written again.
                (1, 1) => assert_eq!(served.entry.with(|entry| unsafe { *entry }), 7),
                other => assert_eq!(other, (0, 0), "halves of two positions"),
            }
            worker.join().unwrap();
        });
    }

    #[test]
    fn position_is_of_one_moment() {
        loom::model(|| {
            let position = Arc::new(Position::default());
            let worker = thread::spawn({
                let position = position.clone();
                move || (1..3).for_each(|at| position.set(at, at))
            });
            let (available, used) = position.get();
            assert_eq!(available, used);
            worker.join().unwrap();
            assert_eq!(position.get(), (2, 2));
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn both_halves_keep_all_their_values() {
        let position = Position::default();
        for (available, used) in [(0, u16::MAX), (u16::MAX, 0), (0x1234, 0x5678)] {
            position.set(available, used);
            assert_eq!(position.get(), (available, used));
        }
    }
}

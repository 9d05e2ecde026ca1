//! How all vCPUs leave the guest for good.

use crate::sync::{AtomicBool, Ordering};

/// Whether vCPUs are to leave the guest, to be saved.
///
/// A vCPU looks at it before each time that it enters the guest. What takes it out of the guest is a signal, which is lost
/// when it comes between that look and the entry: so it is sent again and again, after the vCPU is sure to find that it is
/// asked.
#[derive(Debug, Default)]
pub struct Parking(AtomicBool);

impl Parking {
    /// Whether vCPUs are to come.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Asks all vCPUs to come, `count` of them. `signal` takes those out of the guest that are in it, and is called again
    /// when `next`, which waits a moment, has nobody who came. Nothing when `is_late` says so.
    pub fn gather<T>(
        &self,
        count: usize,
        mut signal: impl FnMut(),
        mut next: impl FnMut() -> Option<T>,
        mut is_late: impl FnMut() -> bool,
    ) -> Option<Vec<T>> {
        self.0.store(true, Ordering::Release);
        let mut came = Vec::with_capacity(count);
        while came.len() < count {
            if is_late() {
                return None;
            }
            signal();
            came.extend(std::iter::from_fn(&mut next).take(count - came.len()));
        }
        Some(came)
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::sync::{Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// KVM and a vCPU's thread: where it is, and whether it has come.
    #[derive(Default)]
    struct Cpu {
        state: Mutex<State>,
        signalled: Condvar,
    }

    #[derive(Default)]
    struct State {
        is_in_guest: bool,
        has_come: bool,
    }

    impl Cpu {
        /// The guest does nothing, and a signal alone takes it out of there.
        fn run(&self) {
            let mut state = self.state.lock().unwrap();
            state.is_in_guest = true;
            while state.is_in_guest {
                state = self.signalled.wait(state).unwrap();
            }
        }

        fn signal(&self) {
            let mut state = self.state.lock().unwrap();
            // One that is not in the guest does not notice.
            if std::mem::take(&mut state.is_in_guest) {
                self.signalled.notify_one();
            }
        }
    }

    #[test]
    fn every_vcpu_leaves_the_guest() {
        let mut model = loom::model::Builder::new();
        // Signals come again and again: so many turns of two threads say all that more would.
        model.preemption_bound = Some(3);
        model.check(|| {
            let (parking, cpu) = (Arc::new(Parking::default()), Arc::new(Cpu::default()));
            let thread = thread::spawn({
                let (parking, cpu) = (parking.clone(), cpu.clone());
                move || {
                    while !parking.is_asked() {
                        cpu.run();
                    }
                    cpu.state.lock().unwrap().has_come = true;
                }
            });
            let next = || {
                thread::yield_now();
                let mut state = cpu.state.lock().unwrap();
                std::mem::take(&mut state.has_come).then_some(7)
            };
            let came = parking.gather(1, || cpu.signal(), next, || false);
            assert_eq!(came, Some(vec![7]));
            thread.join().unwrap();
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn signals_are_sent_until_all_have_come() {
        let parking = Parking::default();
        assert!(!parking.is_asked());
        let mut signals = 0;
        let mut answers = [None, Some(2), None, None, Some(1), Some(0)].into_iter();
        let came = parking.gather(3, || signals += 1, || answers.next().flatten(), || false);
        assert!(parking.is_asked());
        assert_eq!((came, signals), (Some(vec![2, 1, 0]), 4));
    }

    #[test]
    fn vcpu_that_never_comes_is_given_up() {
        let mut turns = 0;
        let is_late = || {
            turns += 1;
            turns > 3
        };
        assert_eq!(Parking::default().gather(1, || (), || None::<()>, is_late), None);
        assert_eq!(Parking::default().gather(0, || (), || None::<()>, || false), Some(Vec::new()));
    }
}

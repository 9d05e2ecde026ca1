//! Whether a device is broken.

use crate::sync::{AtomicBool, Ordering};

/// Whether a device needs a reset. Its worker raises it, the threads of vCPUs read it, and a reset lowers it when the worker
/// is gone.
#[derive(Debug, Default)]
pub struct FaultFlag(AtomicBool);

impl FaultFlag {
    /// Raises it, and runs `tell` when it was not raised: whoever is told finds it raised, and is told once.
    pub fn raise(&self, tell: impl FnOnce()) {
        if !self.0.swap(true, Ordering::AcqRel) {
            tell();
        }
    }

    /// Whether it is raised. Who sees that sees what was done before.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Lowers it, after `stop` has let end whatever may raise it: what was to break is then no fault of what comes next.
    pub fn lower_after<T>(&self, stop: impl FnOnce() -> T) -> T {
        let stopped = stop();
        self.0.store(false, Ordering::Release);
        stopped
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::{
        cell::UnsafeCell,
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use super::*;
    use crate::{Bell, modelled::Event};

    #[test]
    fn driver_that_is_interrupted_finds_its_device_broken_and_is_told_once() {
        loom::model(|| {
            let flag = Arc::new(FaultFlag::default());
            let told = Arc::new(AtomicUsize::new(0));
            let interrupt = Event::new();
            let workers = [(); 2].map(|()| {
                let (flag, told, interrupt) = (flag.clone(), told.clone(), interrupt.clone());
                thread::spawn(move || {
                    flag.raise(|| {
                        told.fetch_add(1, Ordering::Relaxed);
                        interrupt.ring();
                    });
                })
            });
            interrupt.wait();
            assert!(flag.is_raised());
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            assert_eq!(told.load(Ordering::Relaxed), 1);
        });
    }

    struct Device {
        flag: FaultFlag,
        reason: UnsafeCell<u8>,
    }

    // Who reads the reason has seen the flag: loom tells when not.
    #[allow(unsafe_code)]
    // SAFETY: see above; the models are what checks it.
    unsafe impl Sync for Device {}

    #[test]
    #[allow(unsafe_code)]
    fn who_finds_a_device_broken_sees_what_its_worker_did() {
        loom::model(|| {
            let device =
                Arc::new(Device { flag: FaultFlag::default(), reason: UnsafeCell::new(0) });
            let worker = thread::spawn({
                let device = device.clone();
                move || {
                    // SAFETY: nobody else writes, or reads before the flag is raised.
                    device.reason.with_mut(|reason| unsafe { *reason = 7 });
                    device.flag.raise(|| ());
                }
            });
            if device.flag.is_raised() {
                // SAFETY: it was written before the flag, and is not written again.
                assert_eq!(device.reason.with(|reason| unsafe { *reason }), 7);
            }
            worker.join().unwrap();
        });
    }

    #[test]
    fn worker_that_a_reset_ends_breaks_nothing_that_comes_after() {
        loom::model(|| {
            let flag = Arc::new(FaultFlag::default());
            let worker = thread::spawn({
                let flag = flag.clone();
                move || flag.raise(|| ())
            });
            flag.lower_after(|| worker.join().unwrap());
            assert!(!flag.is_raised());
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn fault_is_told_again_after_a_reset() {
        let flag = FaultFlag::default();
        let mut told = 0;
        flag.raise(|| told += 1);
        flag.raise(|| told += 1);
        assert!(flag.is_raised());
        assert_eq!(flag.lower_after(|| 5), 5);
        assert!(!flag.is_raised());
        flag.raise(|| told += 1);
        assert_eq!(told, 2);
    }
}

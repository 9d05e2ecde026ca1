//! How a device sleeps and misses nothing that its driver gives it.

/// What of a virtqueue is between a device and its driver, beside its entries: how each tells the other to look.
pub trait Ring {
    /// What the driver makes available.
    type Chain;
    /// What is wrong with the ring.
    type Error;

    /// Empties the event by which the driver wakes the device.
    fn acknowledge_kick(&self);

    /// Wakes the device as the driver does.
    fn kick(&self);

    /// Tells the driver not to kick while the device looks by itself.
    ///
    /// # Errors
    /// The ring is wrong.
    fn disable_kicks(&mut self) -> Result<(), Self::Error>;

    /// Asks for kicks again. True when more has become available meanwhile, for which no kick will come.
    ///
    /// # Errors
    /// The ring is wrong.
    fn enable_kicks(&mut self) -> Result<bool, Self::Error>;

    /// What is next, if anything is.
    ///
    /// # Errors
    /// The ring is wrong.
    fn pop(&mut self) -> Result<Option<Self::Chain>, Self::Error>;

    /// Interrupts the driver when it asked to be told of what was completed.
    ///
    /// # Errors
    /// The ring is wrong.
    fn notify(&mut self) -> Result<(), Self::Error>;
}

/// Whether a device goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// With what is next.
    GoesOn,
    /// With what is left when others have had their turn.
    IsOver,
}

/// Serves what is available of a ring after a kick, `serve` one chain or, as a look that finds something after all, none. When
/// there may be more, the device kicks itself, so that it comes back when the others of its thread have had their turn. When
/// this returns, a driver that makes something available kicks.
///
/// # Errors
/// The ring is wrong, or `serve` says so.
pub fn turn<R: Ring>(
    ring: &mut R,
    mut serve: impl FnMut(&mut R, Option<R::Chain>) -> Result<Turn, R::Error>,
) -> Result<(), R::Error> {
    // Before the ring is looked at: a kick that comes from here on is for what may be missed below.
    ring.acknowledge_kick();
    ring.disable_kicks()?;
    loop {
        let chain = ring.pop()?;
        if chain.is_none() && !ring.enable_kicks()? {
            return ring.notify();
        }
        if serve(ring, chain)? == Turn::IsOver {
            ring.kick();
            return ring.notify();
        }
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::{
        sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence},
        thread,
    };

    use super::*;
    use crate::{Bell, modelled::Event};

    /// A ring's indices in the memory that both see (virtio 1.2, 2.7.7.2 and 2.7.13), and the event of its doorbell.
    struct Shared {
        available: AtomicUsize,
        wants_kicks: AtomicBool,
        doorbell: Event,
    }

    struct Device {
        shared: Arc<Shared>,
        next: usize,
    }

    impl Ring for Device {
        type Chain = usize;
        type Error = std::convert::Infallible;

        fn acknowledge_kick(&self) {
            self.shared.doorbell.clear();
        }

        fn kick(&self) {
            self.shared.doorbell.ring();
        }

        fn disable_kicks(&mut self) -> Result<(), Self::Error> {
            self.shared.wants_kicks.store(false, Ordering::Relaxed);
            Ok(())
        }

        fn enable_kicks(&mut self) -> Result<bool, Self::Error> {
            self.shared.wants_kicks.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            Ok(self.shared.available.load(Ordering::Relaxed) != self.next)
        }

        fn pop(&mut self) -> Result<Option<usize>, Self::Error> {
            let available = self.shared.available.load(Ordering::Acquire);
            let found = (available != self.next).then_some(self.next);
            self.next += usize::from(found.is_some());
            Ok(found)
        }

        fn notify(&mut self) -> Result<(), Self::Error> {
            Ok(())
        }
    }

    fn drive(shared: &Shared, chains: usize) {
        for chain in 1..=chains {
            shared.available.store(chain, Ordering::Release);
            fence(Ordering::SeqCst);
            if shared.wants_kicks.load(Ordering::Relaxed) {
                shared.doorbell.ring();
            }
        }
    }

    /// How it goes with a device that serves so many chains at a time.
    fn model(chains: usize, at_a_time: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let shared = Arc::new(Shared {
                available: AtomicUsize::new(0),
                wants_kicks: AtomicBool::new(true),
                doorbell: Event::new(),
            });
            let driver = thread::spawn({
                let shared = shared.clone();
                move || drive(&shared, chains)
            });
            let mut device = Device { shared: shared.clone(), next: 0 };
            let mut served = Vec::new();
            while served.len() < chains {
                shared.doorbell.wait();
                let mut left = at_a_time;
                let serve = |_: &mut Device, chain| {
                    served.extend(chain);
                    left -= 1;
                    Ok(if left == 0 { Turn::IsOver } else { Turn::GoesOn })
                };
                let Ok(()) = turn(&mut device, serve);
            }
            assert_eq!(served, Vec::from_iter(0..chains));
            driver.join().unwrap();
        });
    }

    #[test]
    fn device_sleeps_over_nothing_that_its_driver_gives_it() {
        model(2, usize::MAX);
    }

    #[test]
    fn device_that_gives_others_a_turn_comes_back() {
        model(2, 1);
    }
}

//! What threads of the VMM share without one lock over all of it: who tells whom, in which order, and what the other then
//! sees.
//!
//! Each is a small type of its own, so that loom can run it in all orders that threads can take and
//! with all values that the memory model lets them read. `tests/models` does; the models lie beside what they check, and an
//! ordering that is weakened or a pair of lines that is swapped there makes one fail. Nothing here does I/O: what wakes a
//! thread is a [`Bell`].
//!
//! The shim and the agent have one thread each: what their tasks share is locked, or not touched across an await.

mod backlog;
mod board;
mod fault;
mod parking;
mod position;
mod ring;
mod sync;

pub use backlog::{Backlog, Full};
pub use board::{Board, Post};
pub use fault::FaultFlag;
pub use parking::Parking;
pub use position::Position;
pub use ring::{Ring, Turn, turn};

/// What wakes the one thread that waits for it: an event descriptor. It stays rung until it is cleared, so that ringing it
/// before the other waits is not lost.
pub trait Bell {
    /// Wakes whoever waits, now or later.
    fn ring(&self);

    /// Makes it as if it had not been rung.
    fn clear(&self);
}

#[cfg(all(test, loom))]
mod modelled {
    use std::sync::Arc;

    use loom::sync::{Condvar, Mutex};

    use super::Bell;

    /// An event descriptor, as loom can see it.
    #[derive(Clone)]
    pub(crate) struct Event(Arc<(Mutex<bool>, Condvar)>);

    impl Event {
        pub(crate) fn new() -> Self {
            Self(Arc::new((Mutex::new(false), Condvar::new())))
        }

        /// poll(2) without a time.
        pub(crate) fn wait(&self) {
            let mut rung = self.0.0.lock().unwrap();
            while !*rung {
                rung = self.0.1.wait(rung).unwrap();
            }
        }
    }

    impl Bell for Event {
        fn ring(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_one();
        }

        fn clear(&self) {
            *self.0.0.lock().unwrap() = false;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod plain {
    use super::Bell;

    /// Nobody waits for it.
    pub(crate) struct Silent;

    impl Bell for Silent {
        fn ring(&self) {}
        fn clear(&self) {}
    }
}

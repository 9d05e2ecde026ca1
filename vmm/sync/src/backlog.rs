//! Connections that threads want, and one opens.

use std::collections::VecDeque;

use crate::Bell;
use crate::sync::{Mutex, lock};

/// Too much waits already.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// What waits to be opened by a worker, and how much that has open.
#[derive(Debug)]
pub struct Backlog<T, B> {
    counted: Mutex<Counted<T>>,
    bell: B,
    most: usize,
}

#[derive(Debug)]
struct Counted<T> {
    waiting: VecDeque<T>,
    open: usize,
}

impl<T, B: Bell> Backlog<T, B> {
    /// Nothing, of which `most` may wait. `bell` wakes the worker.
    pub fn new(bell: B, most: usize) -> Self {
        Self { counted: Mutex::new(Counted { waiting: VecDeque::new(), open: 0 }), bell, most }
    }

    /// What wakes the worker.
    pub fn bell(&self) -> &B {
        &self.bell
    }

    /// Wants one more to be opened.
    ///
    /// # Errors
    /// [`Full`].
    pub fn push(&self, wanted: T) -> Result<(), Full> {
        let mut counted = lock(&self.counted);
        if counted.waiting.len() >= self.most {
            return Err(Full);
        }
        counted.waiting.push_back(wanted);
        drop(counted);
        self.bell.ring();
        Ok(())
    }

    /// How many there are, waiting or open. One that is on its way from the one to the other is counted, too.
    pub fn len(&self) -> usize {
        let counted = lock(&self.counted);
        counted.waiting.len() + counted.open
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    // The worker.

    /// Takes the next to open it: it counts as open, until the worker says how many are.
    pub fn take(&self) -> Option<T> {
        let mut counted = lock(&self.counted);
        let taken = counted.waiting.pop_front()?;
        counted.open += 1;
        Some(taken)
    }

    /// Whether any waits.
    pub fn is_any_waiting(&self) -> bool {
        !lock(&self.counted).waiting.is_empty()
    }

    /// Gives up all that wait.
    pub fn clear(&self) {
        lock(&self.counted).waiting.clear();
    }

    /// The worker has so many open, all included that it has taken.
    pub fn set_open(&self, open: usize) {
        lock(&self.counted).open = open;
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::thread;

    use super::*;
    use crate::modelled::Event;

    /// A template must not be saved while the guest has connections: none may be missed between two counts.
    #[test]
    fn connection_is_counted_from_when_it_is_wanted_until_it_ends() {
        loom::model(|| {
            let event = Event::new();
            let backlog = Arc::new(Backlog::new(event.clone(), 4));
            let worker = thread::spawn({
                let backlog = backlog.clone();
                move || {
                    let mut open = 0;
                    while open < 1 {
                        event.wait();
                        backlog.bell().clear();
                        while let Some(()) = backlog.take() {
                            open += 1;
                        }
                        backlog.set_open(open);
                    }
                }
            });
            backlog.push(()).unwrap();
            assert_eq!(backlog.len(), 1);
            assert_eq!(backlog.len(), 1);
            worker.join().unwrap();
            assert_eq!(backlog.len(), 1);
        });
    }

    #[test]
    fn worker_sleeps_over_no_connection() {
        loom::model(|| {
            let event = Event::new();
            let backlog = Arc::new(Backlog::new(event.clone(), 4));
            let others = [1, 2].map(|number| {
                let backlog = backlog.clone();
                thread::spawn(move || backlog.push(number).unwrap())
            });
            let mut taken = Vec::new();
            while taken.len() < 2 {
                event.wait();
                backlog.bell().clear();
                taken.extend(std::iter::from_fn(|| backlog.take()));
            }
            others.into_iter().for_each(|other| other.join().unwrap());
            taken.sort_unstable();
            assert_eq!(taken, [1, 2]);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::plain::Silent;

    #[test]
    fn no_more_wait_than_may() {
        let backlog = Backlog::new(Silent, 2);
        assert_eq!(
            [backlog.push(1), backlog.push(2), backlog.push(3)],
            [Ok(()), Ok(()), Err(Full)]
        );
        assert_eq!((backlog.take(), backlog.len()), (Some(1), 2));
        assert_eq!(backlog.push(3), Ok(()));
        assert_eq!(backlog.len(), 3);
        backlog.clear();
        assert_eq!((backlog.len(), backlog.is_any_waiting()), (1, false));
        backlog.set_open(0);
        assert!(backlog.is_empty());
    }
}

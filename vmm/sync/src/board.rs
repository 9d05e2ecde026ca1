//! What many threads tell one that serves a socket, too.

use std::collections::VecDeque;

use crate::Bell;
use crate::sync::{Mutex, lock};

/// How much may wait of what can be lost: a guest can make any number of it.
const MAX_OFFERED: usize = 64;

/// Where threads leave what one other, woken by the bell, takes: notices, and once the end of it all.
#[derive(Debug)]
pub struct Board<N, E, B> {
    posted: Mutex<Posted<N, E>>,
    bell: B,
}

#[derive(Debug)]
struct Posted<N, E> {
    notices: VecDeque<N>,
    end: Option<E>,
}

/// What was on a [`Board`].
#[derive(Debug, PartialEq, Eq)]
pub struct Post<N, E> {
    /// In the order in which they were told.
    pub notices: VecDeque<N>,
    /// The first end that was told.
    pub end: Option<E>,
}

impl<N, E: Copy, B: Bell> Board<N, E, B> {
    /// An empty one. Whoever waits for `bell` is to call [`Board::take`] then.
    pub fn new(bell: B) -> Self {
        Self { posted: Mutex::new(Posted { notices: VecDeque::new(), end: None }), bell }
    }

    /// What wakes the thread that takes.
    pub fn bell(&self) -> &B {
        &self.bell
    }

    /// Tells something, unless too much of it waits.
    ///
    /// # Errors
    /// What was to be told.
    pub fn offer(&self, notice: N) -> Result<(), N> {
        let mut posted = lock(&self.posted);
        if posted.notices.len() >= MAX_OFFERED {
            return Err(notice);
        }
        posted.notices.push_back(notice);
        drop(posted);
        self.bell.ring();
        Ok(())
    }

    /// Tells something that must arrive. How much of it there is, is bounded by who tells it; nobody waits, since who takes
    /// may be waiting for the thread that tells.
    pub fn tell(&self, notice: N) {
        lock(&self.posted).notices.push_back(notice);
        self.bell.ring();
    }

    /// Tells the end, unless it was told.
    pub fn end(&self, end: E) {
        let mut posted = lock(&self.posted);
        if posted.end.is_none() {
            posted.end = Some(end);
            drop(posted);
            self.bell.ring();
        }
    }

    /// All that was told since the last time; the end again and again. The bell is cleared first: what is told meanwhile rings
    /// it again.
    pub fn take(&self) -> Post<N, E> {
        self.bell.clear();
        let mut posted = lock(&self.posted);
        Post { notices: std::mem::take(&mut posted.notices), end: posted.end }
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use loom::thread;

    use super::*;
    use crate::modelled::Event;

    #[test]
    fn nothing_that_is_told_is_slept_over() {
        let mut model = loom::model::Builder::new();
        // All orders of three threads are millions.
        model.preemption_bound = Some(2);
        model.check(|| {
            let event = Event::new();
            let board = Arc::new(Board::new(event.clone()));
            let teller = thread::spawn({
                let board = board.clone();
                move || {
                    board.offer(1).unwrap();
                    board.tell(2);
                }
            });
            let vcpu = thread::spawn({
                let board = board.clone();
                move || board.end('e')
            });
            let (mut notices, mut end) = (Vec::new(), None);
            while notices.len() < 2 || end.is_none() {
                event.wait();
                let post = board.take();
                notices.extend(post.notices);
                end = post.end;
            }
            assert_eq!((notices, end), (vec![1, 2], Some('e')));
            teller.join().unwrap();
            vcpu.join().unwrap();
        });
    }

    #[test]
    fn vm_ends_for_one_reason() {
        loom::model(|| {
            let event = Event::new();
            let board = Arc::new(Board::<(), _, _>::new(event.clone()));
            let vcpus = [1, 2].map(|reason| {
                let board = board.clone();
                thread::spawn(move || board.end(reason))
            });
            event.wait();
            let first = board.take().end;
            assert!(first.is_some());
            vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
            assert_eq!(board.take().end, first);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::plain::Silent;

    #[test]
    fn what_is_offered_is_bounded_and_what_must_arrive_is_not() {
        let board = Board::<_, (), _>::new(Silent);
        for notice in 0..MAX_OFFERED {
            assert_eq!(board.offer(notice), Ok(()));
        }
        assert_eq!(board.offer(99), Err(99));
        board.tell(100);
        let post = board.take();
        assert_eq!((post.notices.len(), post.notices.back()), (MAX_OFFERED + 1, Some(&100)));
        assert_eq!(board.offer(1), Ok(()));
    }

    #[test]
    fn end_is_the_first_that_was_told() {
        let board = Board::<(), _, _>::new(Silent);
        assert_eq!(board.take().end, None);
        board.end(1);
        board.end(2);
        assert_eq!((board.take().end, board.take().end), (Some(1), Some(1)));
    }
}

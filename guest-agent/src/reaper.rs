//! The one place that calls wait(2).
//!
//! As PID 1 the agent gets every orphan of the guest. [`Reaper::run`] collects all of them on
//! SIGCHLD and hands the statuses of known processes to whoever waits. A container's init
//! process is only known by its pid once the helper that made it has reported, and may have
//! ended before that; so while a launch is under way the statuses of unknown processes are kept
//! (at most [`MAX_EARLY`]). [`Book`] is that bookkeeping, without any system call.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Statuses of unknown processes that are kept during launches.
pub(crate) const MAX_EARLY: usize = 1024;

/// How a process ended, as a shell counts: 0 to 255, or 128 + n when ended by signal n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitStatus(pub(crate) u8);

impl ExitStatus {
    /// The status of a process that is gone without anyone having seen its end.
    pub(crate) const LOST: ExitStatus = ExitStatus(255);

    fn from_wait(status: WaitStatus) -> Option<Self> {
        if let Some(code) = status.exit_status() {
            return Some(ExitStatus((code & 0xff) as u8));
        }
        status.terminating_signal().map(|signal| ExitStatus((128 + (signal & 0x7f)) as u8))
    }
}

/// Which ended process belongs to which waiter `W`.
#[derive(Debug)]
struct Book<W> {
    known: HashMap<i32, W>,
    early: VecDeque<(i32, ExitStatus)>,
    launches: usize,
}

impl<W> Default for Book<W> {
    fn default() -> Self {
        Book { known: HashMap::new(), early: VecDeque::new(), launches: 0 }
    }
}

impl<W> Book<W> {
    /// From here on unknown processes may turn out to be awaited.
    fn launch_begins(&mut self) {
        self.launches += 1;
    }

    /// Forgets the unknown ones when no other launch is under way.
    fn launch_ends(&mut self) {
        self.launches = self.launches.saturating_sub(1);
        if self.launches == 0 {
            self.early.clear();
        }
    }

    /// A process has ended; its waiter, when there is one.
    fn ended(&mut self, pid: i32, status: ExitStatus) -> Option<W> {
        let waiter = self.known.remove(&pid);
        if waiter.is_none() && self.launches > 0 {
            if self.early.len() == MAX_EARLY {
                self.early.pop_front();
            }
            self.early.push_back((pid, status));
        }
        waiter
    }

    /// Someone waits for `pid`: the waiter comes back with the status when it has ended already.
    fn register(&mut self, pid: i32, waiter: W) -> Option<(W, ExitStatus)> {
        // The newest one counts: a number may have been used twice.
        if let Some(at) = self.early.iter().rposition(|(ended, _)| *ended == pid) {
            let (_, status) = self.early.remove(at)?;
            return Some((waiter, status));
        }
        self.known.insert(pid, waiter);
        None
    }
}

/// Hands exit statuses to those who wait for them. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Reaper {
    book: Arc<Mutex<Book<oneshot::Sender<ExitStatus>>>>,
}

/// While it lives, no exit status gets lost. See [`Reaper::launch`].
pub(crate) struct Launch(Reaper);

impl Drop for Launch {
    fn drop(&mut self) {
        self.0.book().launch_ends();
    }
}

impl Reaper {
    fn book(&self) -> MutexGuard<'_, Book<oneshot::Sender<ExitStatus>>> {
        self.book.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// To be held from before a process is made until its pid is registered.
    pub(crate) fn launch(&self) -> Launch {
        self.book().launch_begins();
        Launch(self.clone())
    }

    /// The status of `pid`, a child or an orphan that this process gets.
    pub(crate) fn watch(&self, pid: i32) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        let mut book = self.book();
        if let Some((sender, status)) = book.register(pid, sender) {
            let _ = sender.send(status);
            return receiver;
        }
        // An orphan that nobody kept the status of: better an answer than waiting for ever.
        let exists =
            Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok());
        if !exists && let Some(sender) = book.known.remove(&pid) {
            let _ = sender.send(ExitStatus::LOST);
        }
        receiver
    }

    /// Collects ended processes for ever.
    ///
    /// # Errors
    /// SIGCHLD cannot be listened to.
    pub(crate) async fn run(self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.collect();
            children.recv().await;
        }
    }

    fn collect(&self) {
        // Err: ECHILD, no children at all.
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let Some(status) = ExitStatus::from_wait(status) else { continue };
            if let Some(waiter) = self.book().ended(pid.as_raw_nonzero().get(), status) {
                let _ = waiter.send(status);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Begin,
        End,
        Ended(i32, u8),
        Register(i32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Begin),
            Just(Step::End),
            (1..20i32, any::<u8>()).prop_map(|(pid, status)| Step::Ended(pid, status)),
            (1..20i32).prop_map(Step::Register),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn every_status_goes_to_one_waiter_at_most(steps in steps()) {
            let mut book = Book::default();
            let mut answered = 0;
            let mut ends = 0;
            for (waiter, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Begin => book.launch_begins(),
                    Step::End => book.launch_ends(),
                    Step::Ended(pid, status) => {
                        ends += 1;
                        let known = book.known.contains_key(&pid);
                        prop_assert_eq!(book.ended(pid, ExitStatus(status)).is_some(), known);
                        answered += usize::from(known);
                    }
                    Step::Register(pid) => {
                        let newest = book.early.iter().rev().find(|(p, _)| *p == pid).copied();
                        let answer = book.register(pid, waiter);
                        prop_assert_eq!(answer, newest.map(|(_, status)| (waiter, status)));
                        answered += usize::from(answer.is_some());
                    }
                }
                prop_assert!(answered <= ends);
                prop_assert!(book.launches > 0 || book.early.is_empty());
            }
        }

        #[test]
        fn an_end_during_a_launch_is_never_lost(others in prop::collection::vec(2..1000i32, 0..100)) {
            let mut book = Book::default();
            book.launch_begins();
            prop_assert_eq!(book.ended(1, ExitStatus(42)), None::<()>);
            for other in others {
                book.ended(other, ExitStatus(0));
            }
            prop_assert_eq!(book.register(1, ()), Some(((), ExitStatus(42))));
        }
    }

    #[test]
    fn kept_statuses_beyond_their_bound_push_out_the_oldest() {
        let mut book: Book<()> = Book::default();
        book.launch_begins();
        for pid in 1..=MAX_EARLY as i32 + 1 {
            book.ended(pid, ExitStatus(0));
        }
        assert_eq!(book.early.len(), MAX_EARLY);
        assert_eq!(book.register(1, ()), None);
        assert!(book.register(2, ()).is_some());
    }
}

//! What of a disk's requests is in flight, and how far each has come. Pure.

use super::request::{Range, Status, Work};
use crate::devices::buffers::Span;

/// The most requests of a disk in flight, of all its queues together: what a ring takes.
pub(super) const MAX_REQUESTS: usize = vial_ring::ENTRIES as usize;
/// The most data of them, in bytes. The host pins so much of the guest's memory at most.
pub(super) const MAX_BYTES: usize = 64 << 20;
/// How often an operation is given again that the host has not taken, or has broken off.
const MAX_ATTEMPTS: u8 = 3;

/// What is in flight.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    requests: usize,
    bytes: usize,
}

impl Window {
    /// Takes a request in that moves so many bytes, if it has room.
    #[must_use]
    pub(super) fn enter(&mut self, bytes: usize) -> bool {
        let fits = self.requests < MAX_REQUESTS && self.bytes.saturating_add(bytes) <= MAX_BYTES;
        if fits {
            self.requests += 1;
            self.bytes += bytes;
        }
        fits
    }

    /// A request that came in has ended.
    pub(super) fn leave(&mut self, bytes: usize) {
        self.requests = self.requests.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Whether nothing is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.requests == 0
    }
}

/// What is to be done next for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The span moves between memory and the disk, or a part of it from its beginning.
    Transfer {
        write: bool,
        span: Span,
        position: u64,
    },
    Flush,
    Clear(Range),
    Done(Status),
}

/// How far a request has come.
#[derive(Debug)]
pub(super) struct Progress {
    work: Work,
    /// The next of several ranges.
    next: usize,
    /// How often the host has refused what is to be done next.
    refused: u8,
}

impl Progress {
    pub(super) fn new(work: Work) -> Self {
        Self { work, next: 0, refused: 0 }
    }

    /// How many bytes of memory it holds from its beginning to its end.
    pub(super) fn bytes(work: &Work) -> usize {
        match work {
            Work::Read(span, _) | Work::Write(span, _) => span.bytes,
            _ => 0,
        }
    }

    /// What is to be done now.
    pub(super) fn step(&self) -> Step {
        match &self.work {
            Work::Answered(status) => Step::Done(*status),
            Work::Read(span, position) => {
                Step::Transfer { write: false, span: *span, position: *position }
            }
            Work::Write(span, position) => {
                Step::Transfer { write: true, span: *span, position: *position }
            }
            Work::Flush => Step::Flush,
            Work::Clear(ranges) => {
                ranges.get(self.next).map_or(Step::Done(Status::Ok), |range| Step::Clear(*range))
            }
        }
    }

    /// Whether the host is to do it where it can wait.
    pub(super) fn waits(&self) -> bool {
        self.refused > 0
    }

    /// The host has done the last step, of which `given` bytes were given to it: so many bytes, or an error's number.
    pub(super) fn completed(&mut self, given: usize, result: Result<usize, i32>) -> Step {
        match result {
            Err(libc::EAGAIN | libc::EINTR) if self.refused < MAX_ATTEMPTS => self.refused += 1,
            Err(libc::EOPNOTSUPP) if matches!(self.work, Work::Clear(_)) => {
                self.work = Work::Answered(Status::Unsupported);
            }
            Err(_) => self.work = Work::Answered(Status::IoError),
            Ok(moved) => {
                self.refused = 0;
                self.moved(given, moved);
            }
        }
        self.step()
    }

    fn moved(&mut self, given: usize, moved: usize) {
        match &mut self.work {
            Work::Read(span, position) | Work::Write(span, position) => {
                // Nothing: the file has become shorter than it was. More than was given: no host does that.
                if moved == 0 || moved > given.min(span.bytes) {
                    self.work = Work::Answered(Status::IoError);
                    return;
                }
                span.offset += moved;
                span.bytes -= moved;
                *position += moved as u64;
                if span.bytes == 0 {
                    self.work = Work::Answered(Status::Ok);
                }
            }
            Work::Flush => self.work = Work::Answered(Status::Ok),
            Work::Clear(_) => self.next += 1,
            Work::Answered(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever comes and goes, no more is in flight than the bounds, and room comes back.
        #[test]
        fn window_is_never_exceeded(steps: Vec<(bool, u32)>) {
            let mut window = Window::default();
            let mut inside: Vec<usize> = Vec::new();
            for (comes, bytes) in steps {
                let bytes = bytes as usize % (40 << 20);
                if comes {
                    let room = inside.len() < MAX_REQUESTS
                        && inside.iter().sum::<usize>() + bytes <= MAX_BYTES;
                    prop_assert_eq!(window.enter(bytes), room);
                    if room {
                        inside.push(bytes);
                    }
                } else if let Some(bytes) = inside.pop() {
                    window.leave(bytes);
                }
                prop_assert_eq!(window.is_empty(), inside.is_empty());
            }
        }

        /// A transfer moves each byte once, in order, however the host splits it, and ends well only when all have moved.
        #[test]
        fn transfer_moves_each_byte_once(bytes in 1usize..100_000, pieces: Vec<u16>, write: bool) {
            let span = Span { offset: 16, bytes };
            let work = if write { Work::Write(span, 512) } else { Work::Read(span, 512) };
            let mut progress = Progress::new(work);
            let mut moved = 0;
            for piece in pieces.into_iter().chain(std::iter::repeat(u16::MAX)) {
                match progress.step() {
                    Step::Transfer { write: way, span, position } => {
                        prop_assert_eq!((way, span.offset), (write, 16 + moved));
                        prop_assert_eq!((span.bytes, position), (bytes - moved, 512 + moved as u64));
                        let piece = usize::from(piece).clamp(1, span.bytes);
                        progress.completed(piece, Ok(piece));
                        moved += piece;
                    }
                    other => {
                        prop_assert_eq!((other, moved), (Step::Done(Status::Ok), bytes));
                        break;
                    }
                }
            }
        }

        /// However the host answers, a request ends, after a bounded number of operations.
        #[test]
        fn every_request_ends(
            kind in 0..4u8,
            results in prop::collection::vec(prop_oneof![
                (1usize..9000).prop_map(Ok),
                Just(Ok(0)),
                prop::sample::select(vec![libc::EAGAIN, libc::EINTR, libc::EIO, libc::ENOSPC, libc::EOPNOTSUPP]).prop_map(Err),
            ], 1..40),
        ) {
            let span = Span { offset: 0, bytes: 8192 };
            let range = Range { position: 0, bytes: 512, unmaps: true };
            let work = match kind {
                0 => Work::Read(span, 0),
                1 => Work::Write(span, 0),
                2 => Work::Flush,
                _ => Work::Clear(vec![range; 3]),
            };
            let mut progress = Progress::new(work);
            let mut failed = false;
            for step in 0.. {
                // Each byte by itself, each of them after three refusals.
                prop_assert!(step <= 8192 * 4);
                if let Step::Done(status) = progress.step() {
                    prop_assert_eq!(status == Status::Ok, !failed);
                    break;
                }
                let result = results[step % results.len()];
                let given = if kind < 2 { 8192 } else { 0 };
                let before = progress.refused;
                progress.completed(given, result);
                failed |= match result {
                    Err(libc::EAGAIN | libc::EINTR) => before == MAX_ATTEMPTS,
                    Err(_) => true,
                    Ok(moved) => kind < 2 && matches!(progress.step(), Step::Done(Status::IoError)) && moved != 1,
                };
            }
        }
    }

    #[test]
    fn answers_of_the_host_that_cannot_be_are_errors() {
        let span = Span { offset: 0, bytes: 1024 };
        for moved in [0, 513, 1025, usize::MAX] {
            let mut progress = Progress::new(Work::Read(span, 0));
            assert_eq!(progress.completed(512, Ok(moved)), Step::Done(Status::IoError), "{moved}");
        }
    }

    #[test]
    fn what_the_host_cannot_clear_is_not_supported() {
        let ranges = vec![Range { position: 0, bytes: 512, unmaps: true }; 2];
        let mut progress = Progress::new(Work::Clear(ranges));
        assert!(matches!(progress.completed(0, Ok(0)), Step::Clear(_)));
        let unsupported = Step::Done(Status::Unsupported);
        assert_eq!(progress.completed(0, Err(libc::EOPNOTSUPP)), unsupported);
    }
}

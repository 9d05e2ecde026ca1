//! How a disk's operations are done by the host: all at once by a ring of io_uring, or one after the other by system calls.
//!
//! **No memory is given up under an operation.** What an operation reads or writes is kept in its slot until the kernel has
//! told of its end, and the engine, when it is dropped, first waits for the end of all. It is kept in two ways:
//!
//! - Guest memory, by [`KeptVectors`]: its mapping lives as long as they do. The guest can give back a page meanwhile
//!   (`crate::memory::Discards`, of the balloon and the memory device): the mapping stays, and the kernel has either pinned the
//!   page that was there, which then goes to nobody else until the operation has ended, or copies to the page that the guest
//!   finds there now. Memory is never unmapped while a machine lives.
//! - A buffer of the engine's own, where the guest's memory does not lie as the disk wants it.
//!
//! A worker that ends (reset, unplugging, saving) lets all operations end before it does, so the driver is not told that its
//! memory is its own again before it is.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use vial_ring::{Operation, Ring};

use super::flight::{MAX_REQUESTS, Step};
use super::request::Range;
use crate::devices::buffers::{Buffers, KeptVectors, Span};
use crate::memory::GuestRam;

/// The most pieces of memory in one operation. Linux takes up to 1024.
const MAX_VECTORS: usize = 256;
/// The most bytes that one operation moves by a buffer of the engine's own.
const BOUNCE_BYTES: usize = 64 << 10;
/// What such a buffer begins at: no disk wants more than a page (`MemoryAlignment::fits`).
const PAGE_BYTES: usize = 4096;

/// How memory and lengths have to lie for a file that is open with `O_DIRECT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemoryAlignment {
    /// What addresses are multiples of: a power of two, a page at most.
    pub(super) address: u64,
    /// What lengths are multiples of.
    pub(super) length: u64,
}

impl MemoryAlignment {
    /// Whether all pieces of a span lie so. The guest's pages are the host's, so an address of one lies as that of the other.
    fn fits(self, buffers: &Buffers, span: Span) -> bool {
        buffers.pieces(span).all(|(start, bytes)| {
            start.0.is_multiple_of(self.address) && (bytes as u64).is_multiple_of(self.length)
        })
    }
}

/// What an operation reads or writes.
#[derive(Debug)]
enum Held {
    /// Flushing and clearing.
    Nothing,
    Guest(KeptVectors),
    Bounce(Box<Bounce>),
}

/// A buffer in place of the guest's memory, and the vector that names it.
#[derive(Debug)]
struct Bounce {
    room: Vec<u8>,
    /// Where in `room` it begins.
    offset: usize,
    bytes: usize,
    vector: libc::iovec,
}

// SAFETY: the vector points into `room`, which moves with it.
unsafe impl Send for Bounce {}

impl Bounce {
    fn new(bytes: usize) -> Box<Self> {
        let mut room = vec![0; bytes + PAGE_BYTES];
        let offset = room.as_ptr().align_offset(PAGE_BYTES);
        // Into the heap, which stays where it is.
        let start = room[offset..].as_mut_ptr();
        let vector = libc::iovec { iov_base: start.cast(), iov_len: bytes };
        Box::new(Self { room, offset, bytes, vector })
    }

    fn data(&mut self) -> &mut [u8] {
        &mut self.room[self.offset..self.offset + self.bytes]
    }
}

impl Held {
    /// What a transfer of the span begins with.
    fn of(
        (buffers, ram): (&Buffers, &GuestRam),
        span: Span,
        write: bool,
        alignment: Option<MemoryAlignment>,
    ) -> io::Result<Self> {
        if alignment.is_none_or(|alignment| alignment.fits(buffers, span)) {
            return buffers.kept_vectors(ram, span, MAX_VECTORS).map(Self::Guest);
        }
        let mut bounce = Bounce::new(span.bytes.min(BOUNCE_BYTES));
        if write {
            buffers.copy_to(ram, span.offset, bounce.data()).map_err(io::Error::other)?;
        }
        Ok(Self::Bounce(bounce))
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Guest(vectors) => vectors.bytes(),
            Self::Bounce(bounce) => bounce.bytes,
        }
    }
}

/// An operation that has ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// That by which it was begun.
    pub(super) slot: u16,
    /// How many bytes were given to the host.
    pub(super) given: usize,
    /// What came of it: bytes, or an error's number.
    pub(super) result: Result<usize, i32>,
    bounce: Option<Box<Bounce>>,
}

impl Ended {
    /// Gives the guest what was read into a buffer of the engine's own.
    ///
    /// # Errors
    /// The memory is none.
    pub(super) fn hand_over(
        &mut self,
        buffers: &Buffers,
        ram: &GuestRam,
        offset: usize,
    ) -> io::Result<()> {
        let Some(bounce) = &mut self.bounce else { return Ok(()) };
        let moved = self.result.unwrap_or_default().min(bounce.bytes);
        buffers.copy_from(ram, offset, &bounce.data()[..moved]).map_err(io::Error::other)
    }
}

/// What does the operations.
#[derive(Debug)]
enum Means {
    Ring(Box<Ring>),
    /// By system calls: what has ended.
    Calls(OwnedFd, VecDeque<Ended>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Engine {
    means: Means,
    /// What the operation of each slot has.
    held: Vec<Option<Held>>,
    alignment: Option<MemoryAlignment>,
}

impl Engine {
    /// By a ring.
    pub(super) fn by_ring(ring: Ring, alignment: Option<MemoryAlignment>) -> Self {
        Self::new(Means::Ring(Box::new(ring)), alignment)
    }

    /// By system calls.
    pub(super) fn by_calls(disk: OwnedFd, alignment: Option<MemoryAlignment>) -> Self {
        Self::new(Means::Calls(disk, VecDeque::new()), alignment)
    }

    fn new(means: Means, alignment: Option<MemoryAlignment>) -> Self {
        Self { means, held: (0..MAX_REQUESTS).map(|_| None).collect(), alignment }
    }

    /// What becomes readable when an operation has ended; none where each has when it was begun.
    pub(super) fn event(&self) -> Option<RawFd> {
        match &self.means {
            Means::Ring(ring) => Some(ring.as_raw_fd()),
            Means::Calls(..) => None,
        }
    }

    /// Begins an operation by a slot that has none. Whether what is written is to be on the disk when it is `durable`, and
    /// whether the host is to do it where it can wait, is said with it.
    pub(super) fn begin(
        &mut self,
        slot: u16,
        step: Step,
        memory: (&Buffers, &GuestRam),
        (durable, waits): (bool, bool),
    ) {
        let held = match step {
            Step::Transfer { write, span, .. } => Held::of(memory, span, write, self.alignment),
            Step::Flush | Step::Clear(_) | Step::Done(_) => Ok(Held::Nothing),
        };
        let held = match held {
            Ok(held) => held,
            // It was checked when the chain was read.
            Err(error) => {
                tracing::error!(%error, "a checked request is of no memory: ending the VM");
                std::process::abort();
            }
        };
        match &mut self.means {
            Means::Ring(ring) => {
                let kept = &*self.held[usize::from(slot)].insert(held);
                let operation = operation(step, kept, durable);
                // SAFETY: `held` keeps vectors and memory until `ended` takes them out, after the completion, or this
                // engine is dropped, which waits for all completions.
                let prepared = unsafe { ring.prepare(operation, slot.into(), waits) };
                assert!(prepared, "a ring has room for an operation of each slot");
            }
            Means::Calls(disk, ended) => {
                let result = call(disk, step, &held, durable);
                let result = result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
                let given = held.bytes();
                let bounce = match held {
                    Held::Bounce(bounce) => Some(bounce),
                    _ => None,
                };
                ended.push_back(Ended { slot, given, result, bounce });
            }
        }
    }

    /// Gives to the host what was begun. False if it is to be tried again later.
    pub(super) fn submit(&mut self) -> bool {
        let Means::Ring(ring) = &mut self.means else { return true };
        match ring.submit() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the host takes no operations of a disk just now");
                false
            }
        }
    }

    /// An operation that has ended, if there is one.
    pub(super) fn ended(&mut self) -> Option<Ended> {
        let ring = match &mut self.means {
            Means::Ring(ring) => ring,
            Means::Calls(_, ended) => return ended.pop_front(),
        };
        let (id, result) = ring.take_ended()?;
        // What a ring tells of is what `begin` gave it.
        let slot = u16::try_from(id).ok().filter(|slot| usize::from(*slot) < MAX_REQUESTS)?;
        let held = self.held[usize::from(slot)].take().unwrap_or(Held::Nothing);
        let given = held.bytes();
        let bounce = match held {
            Held::Bounce(bounce) => Some(bounce),
            _ => None,
        };
        let result = usize::try_from(result).map_err(|_| -result);
        Some(Ended { slot, given, result, bounce })
    }

    /// Waits until an operation has ended, if any is on its way.
    pub(super) fn wait(&mut self) {
        let Means::Ring(ring) = &mut self.means else { return };
        while let Err(error) = ring.wait() {
            match error.raw_os_error() {
                // The host is short of memory, for a while.
                Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                // Going on would give up memory that the host still uses.
                _ => {
                    tracing::error!(%error, "the host does not tell of a disk's operations: ending the VM");
                    std::process::abort();
                }
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        while let Means::Ring(ring) = &self.means
            && ring.in_flight() > 0
        {
            self.wait();
            while self.ended().is_some() {}
        }
    }
}

fn mode(range: Range) -> FallocateFlags {
    let how = if range.unmaps { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    how | FallocateFlags::KEEP_SIZE
}

fn operation(step: Step, held: &Held, durable: bool) -> Operation {
    match step {
        Step::Transfer { write, position, .. } => {
            let (vectors, count) = match held {
                Held::Guest(vectors) => (vectors.as_ptr(), vectors.count() as u32),
                Held::Bounce(bounce) => (&raw const bounce.vector, 1),
                Held::Nothing => (std::ptr::null(), 0),
            };
            match write {
                true => Operation::Write { vectors, count, position, durable },
                false => Operation::Read { vectors, count, position },
            }
        }
        Step::Clear(range) => Operation::Clear {
            mode: mode(range).bits().cast_signed(),
            position: range.position,
            bytes: range.bytes,
        },
        Step::Flush | Step::Done(_) => Operation::Flush,
    }
}

/// Does an operation at once.
fn call(disk: &OwnedFd, step: Step, held: &Held, durable: bool) -> io::Result<usize> {
    match step {
        Step::Transfer { write, position, .. } => {
            let moved = match held {
                Held::Guest(vectors) => vectors.move_at(disk.as_fd(), write, position)?,
                Held::Bounce(bounce) => {
                    let at = i64::try_from(position).map_err(io::Error::other)?;
                    let (file, vector) = (disk.as_raw_fd(), &raw const bounce.vector);
                    // SAFETY: the vector names the buffer beside it, which nobody else has.
                    let moved = unsafe {
                        match write {
                            true => libc::pwritev(file, vector, 1, at),
                            false => libc::preadv(file, vector, 1, at),
                        }
                    };
                    usize::try_from(moved).map_err(|_| io::Error::last_os_error())?
                }
                Held::Nothing => 0,
            };
            if write && durable {
                fdatasync(disk)?;
            }
            Ok(moved)
        }
        Step::Clear(range) => {
            fallocate(disk, mode(range), range.position, range.bytes)?;
            Ok(0)
        }
        Step::Flush => fdatasync(disk).map(|()| 0).map_err(io::Error::from),
        Step::Done(_) => Ok(0),
    }
}

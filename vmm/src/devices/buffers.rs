//! The memory that a descriptor chain names, and the system calls straight to and from it.
//!
//! A chain is taken apart once: every buffer is checked to lie in guest memory, and kept as a
//! guest address. The bytes move between guest memory and a file descriptor without a copy in
//! between; this module alone turns guest addresses into pointers for that.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::memory::GuestRam;
use crate::virtio::QueueError;
use crate::virtio::queue::Chain;

/// The most buffers that one system call takes. Linux takes up to 1024; a driver of today needs
/// fewer than 20 for its largest packet.
pub(crate) const MAX_VECTORS: usize = 64;

/// The readable or the writable part of a descriptor chain, all of it in guest memory.
#[derive(Debug, Default, Clone)]
pub(crate) struct Buffers {
    ranges: VecDeque<(GuestAddress, usize)>,
    bytes: usize,
}

/// A run of bytes within [`Buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Where it begins.
    pub(crate) offset: usize,
    /// How long it is.
    pub(crate) bytes: usize,
}

impl Buffers {
    /// The readable and the writable buffers of a chain (virtio 1.2, 2.7.4.2).
    ///
    /// # Errors
    /// The chain is empty or endless, a buffer is outside guest memory, or a readable one comes
    /// after a writable one.
    pub(crate) fn of_chain(chain: Chain) -> Result<(Self, Self), QueueError> {
        let wrong = |what: &str| Err(QueueError::Chain(what.to_owned()));
        let mut readable = Self::default();
        let mut writable = Self::default();
        let mut goes_on = false;
        let mut descriptors = 0;
        let mut chain = chain;
        while let Some(descriptor) = chain.next() {
            descriptors += 1;
            goes_on = descriptor.has_next();
            let part = if descriptor.is_write_only() {
                &mut writable
            } else if writable.ranges.is_empty() {
                &mut readable
            } else {
                return wrong("a readable buffer comes after a writable one");
            };
            part.push(chain.memory(), descriptor.addr(), descriptor.len() as usize)?;
        }
        // The iterator ends in silence at a descriptor that it cannot read and when it has seen
        // as many as the table holds, which is how a loop shows.
        if goes_on {
            return wrong("it loops, or a descriptor of it is not in its table");
        }
        if descriptors == 0 {
            return wrong("its first descriptor cannot be read");
        }
        Ok((readable, writable))
    }

    /// Like [`Buffers::of_chain`] for a chain that may only have readable buffers.
    ///
    /// # Errors
    /// Those, and a chain with a writable buffer.
    pub(crate) fn readable(chain: Chain) -> Result<Self, QueueError> {
        match Self::of_chain(chain)? {
            (readable, writable) if writable.is_empty() => Ok(readable),
            _ => Err(QueueError::Chain("it has a writable buffer, but is for reading".into())),
        }
    }

    /// Like [`Buffers::of_chain`] for a chain that may only have writable buffers.
    ///
    /// # Errors
    /// Those, and a chain with a readable buffer.
    pub(crate) fn writable(chain: Chain) -> Result<Self, QueueError> {
        match Self::of_chain(chain)? {
            (readable, writable) if readable.is_empty() => Ok(writable),
            _ => Err(QueueError::Chain("it has a readable buffer, but is for writing".into())),
        }
    }

    fn push(
        &mut self,
        ram: &GuestRam,
        start: GuestAddress,
        bytes: usize,
    ) -> Result<(), QueueError> {
        if bytes == 0 {
            return Ok(());
        }
        ram.get_slice(start, bytes).map_err(|_| {
            QueueError::Chain(format!("{bytes} bytes at {:#x} are not in guest memory", start.0))
        })?;
        // The iterator ends before a chain grows beyond 4 GiB, so this does not overflow.
        self.bytes += bytes;
        self.ranges.push_back((start, bytes));
        Ok(())
    }

    /// Puts the buffers of another chain behind.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.bytes += other.bytes;
        self.ranges.append(&mut other.ranges);
    }

    /// Takes whole buffers off the front, that many bytes of them.
    pub(crate) fn drop_front(&mut self, bytes: usize) {
        let mut left = bytes;
        while left > 0
            && let Some((_, length)) = self.ranges.pop_front()
        {
            self.bytes -= length;
            left = left.saturating_sub(length);
        }
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// All of it.
    pub(crate) fn span(&self) -> Span {
        Span { offset: 0, bytes: self.bytes }
    }

    /// How many system call vectors a span takes.
    pub(crate) fn vectors(&self, span: Span) -> usize {
        self.pieces(span).count()
    }

    /// The pieces of guest memory that a span consists of; what is past the end is left out.
    pub(crate) fn pieces(&self, span: Span) -> impl Iterator<Item = (GuestAddress, usize)> {
        let mut skip = span.offset;
        let mut left = span.bytes;
        self.ranges.iter().filter_map(move |&(start, bytes)| {
            let skipped = skip.min(bytes);
            skip -= skipped;
            let taken = left.min(bytes - skipped);
            left -= taken;
            (taken > 0).then(|| (GuestAddress(start.0 + skipped as u64), taken))
        })
    }

    /// Copies bytes out of guest memory into `target`.
    ///
    /// # Errors
    /// There are fewer bytes.
    pub(crate) fn copy_to(
        &self,
        ram: &GuestRam,
        offset: usize,
        target: &mut [u8],
    ) -> Result<(), QueueError> {
        let span = self.checked(offset, target.len())?;
        let mut rest = target;
        for (start, bytes) in self.pieces(span) {
            let (piece, after) = rest.split_at_mut(bytes);
            ram.read_slice(piece, start).map_err(|error| QueueError::Chain(error.to_string()))?;
            rest = after;
        }
        Ok(())
    }

    /// Copies `source` into guest memory.
    ///
    /// # Errors
    /// There is less room.
    pub(crate) fn copy_from(
        &self,
        ram: &GuestRam,
        offset: usize,
        source: &[u8],
    ) -> Result<(), QueueError> {
        let span = self.checked(offset, source.len())?;
        let mut rest = source;
        for (start, bytes) in self.pieces(span) {
            let (piece, after) = rest.split_at(bytes);
            ram.write_slice(piece, start).map_err(|error| QueueError::Chain(error.to_string()))?;
            rest = after;
        }
        Ok(())
    }

    fn checked(&self, offset: usize, bytes: usize) -> Result<Span, QueueError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(QueueError::Chain(format!(
                "it has {} bytes, too few for {bytes} at {offset}",
                self.bytes
            )));
        }
        Ok(Span { offset, bytes })
    }

    /// Sends from guest memory to a stream socket, without waiting and without SIGPIPE. Returns
    /// how many bytes it took.
    pub(crate) fn send(
        &self,
        ram: &GuestRam,
        socket: BorrowedFd<'_>,
        span: Span,
    ) -> io::Result<usize> {
        let mut vectors = self.iovecs(ram, span)?;
        let message = vectors.message();
        // SAFETY: `message` points at `vectors`, which outlives the call, and those at guest
        // memory that `ram` keeps mapped; the kernel only reads it.
        retry(|| unsafe {
            libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
        })
    }

    /// Receives from a stream socket into guest memory, without waiting. Returns how many bytes
    /// came; 0 is the end of the stream.
    pub(crate) fn receive(
        &self,
        ram: &GuestRam,
        socket: BorrowedFd<'_>,
        span: Span,
    ) -> io::Result<usize> {
        let mut vectors = self.iovecs(ram, span)?;
        let mut message = vectors.message();
        // SAFETY: as in `send`; the kernel writes within the vectors, which lie in guest memory,
        // to which no Rust reference exists.
        retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
    }

    /// Writes guest memory to a file descriptor, in one call: a tap takes it as one packet.
    pub(crate) fn write_to(
        &self,
        ram: &GuestRam,
        file: BorrowedFd<'_>,
        span: Span,
    ) -> io::Result<usize> {
        let vectors = self.iovecs(ram, span)?;
        // SAFETY: the vectors point at guest memory that `ram` keeps mapped.
        retry(|| unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), vectors.count()) })
    }

    /// Reads from a file descriptor into guest memory, in one call: a tap gives one packet.
    pub(crate) fn read_from(
        &self,
        ram: &GuestRam,
        file: BorrowedFd<'_>,
        span: Span,
    ) -> io::Result<usize> {
        let vectors = self.iovecs(ram, span)?;
        // SAFETY: the vectors point at guest memory that `ram` keeps mapped, to which no Rust
        // reference exists.
        retry(|| unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), vectors.count()) })
    }

    /// The first pieces of a span, at most `most` of them, as the kernel wants them.
    ///
    /// # Errors
    /// One of them is no guest memory.
    pub(crate) fn kept_vectors(
        &self,
        ram: &GuestRam,
        span: Span,
        most: usize,
    ) -> io::Result<KeptVectors> {
        let vectors = self.pieces(span).take(most).map(|(start, bytes)| {
            let slice = ram.get_slice(start, bytes).map_err(io::Error::other)?;
            Ok(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
        });
        Ok(KeptVectors { vectors: vectors.collect::<io::Result<_>>()?, _ram: ram.clone() })
    }

    /// Fills a span with random numbers from the kernel.
    pub(crate) fn fill_random(&self, ram: &GuestRam, span: Span) -> io::Result<usize> {
        let mut filled = 0;
        while filled < span.bytes {
            let rest = Span { offset: span.offset + filled, bytes: span.bytes - filled };
            let vectors = self.iovecs(ram, rest)?;
            let Some(vector) = vectors.first() else { break };
            // SAFETY: the vector points at guest memory that `ram` keeps mapped, to which no Rust
            // reference exists.
            filled += retry(|| unsafe { libc::getrandom(vector.iov_base, vector.iov_len, 0) })?;
        }
        Ok(filled)
    }

    /// The first [`MAX_VECTORS`] pieces of a span as the kernel wants them.
    fn iovecs<'ram>(&self, ram: &'ram GuestRam, span: Span) -> io::Result<Vectors<'ram>> {
        let mut vectors = Vectors {
            array: [const { MaybeUninit::uninit() }; MAX_VECTORS],
            used: 0,
            ram: std::marker::PhantomData,
        };
        for (slot, (start, bytes)) in vectors.array.iter_mut().zip(self.pieces(span)) {
            let slice = ram.get_slice(start, bytes).map_err(io::Error::other)?;
            slot.write(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            vectors.used += 1;
        }
        Ok(vectors)
    }
}

/// Pointers into guest memory, for a call whose end comes later. They keep the memory mapped: what they name is memory until
/// they are dropped, whatever becomes of the guest.
#[derive(Debug)]
pub(crate) struct KeptVectors {
    vectors: Vec<libc::iovec>,
    /// All of the guest's memory. A page of it that goes back to the host is replaced by another.
    _ram: GuestRam,
}

// SAFETY: the pointers are into memory that no Rust reference exists to, and that `_ram`, which can go to another thread,
// keeps mapped.
unsafe impl Send for KeptVectors {}

impl KeptVectors {
    /// The first of them.
    pub(crate) fn as_ptr(&self) -> *const libc::iovec {
        self.vectors.as_ptr()
    }

    /// How many they are.
    pub(crate) fn count(&self) -> usize {
        self.vectors.len()
    }

    /// How many bytes they name.
    pub(crate) fn bytes(&self) -> usize {
        self.vectors.iter().map(|vector| vector.iov_len).sum()
    }

    /// Reads into them from a position of a file on, or writes them there.
    pub(crate) fn move_at(
        &self,
        file: BorrowedFd<'_>,
        write: bool,
        position: u64,
    ) -> io::Result<usize> {
        let position = i64::try_from(position).map_err(io::Error::other)?;
        let (file, count) = (file.as_raw_fd(), self.count() as libc::c_int);
        // SAFETY: the vectors point at guest memory that is mapped for as long as they live, to which no Rust reference
        // exists.
        retry(|| unsafe {
            match write {
                true => libc::pwritev(file, self.as_ptr(), count, position),
                false => libc::preadv(file, self.as_ptr(), count, position),
            }
        })
    }
}

/// Pointers into guest memory, for one system call.
struct Vectors<'ram> {
    array: [MaybeUninit<libc::iovec>; MAX_VECTORS],
    /// How many at the front of `array` are initialised.
    used: usize,
    ram: std::marker::PhantomData<&'ram GuestRam>,
}

impl Vectors<'_> {
    fn as_ptr(&self) -> *const libc::iovec {
        self.array.as_ptr().cast()
    }

    fn count(&self) -> libc::c_int {
        self.used as libc::c_int
    }

    fn first(&self) -> Option<libc::iovec> {
        // SAFETY: the first `used` are initialised.
        (self.used > 0).then(|| unsafe { self.array[0].assume_init() })
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: zeros are a valid `msghdr`: no address, no vectors, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.array.as_mut_ptr().cast();
        message.msg_iovlen = self.used;
        message
    }
}

/// Calls again what a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "buffers_tests.rs"]
mod tests;

//! Rings of io_uring(7) that can do nothing but serve one disk.
//!
//! A ring is a door of the kernel that no system call filter looks behind: whoever can make one can open files and sockets by
//! it. So the VMM cannot. The shim makes the ring ([`make`]), with the disk as its only file, restricts it for good to
//! reading, writing, clearing and flushing that file, and puts it among the VMM's descriptors. What the VMM can do by it
//! ([`Ring`]) is what it could do with the disk's descriptor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Parameters, opcode, squeue};

/// The most operations that a ring takes at one time.
pub const ENTRIES: u32 = 256;
/// The most threads that the kernel makes for what cannot be done without waiting: buffered writes, flushes, clearing. They
/// are threads of the process that uses the ring, and count as its own.
pub const WORKERS: u32 = 4;
/// The only arguments with which a jailed VMM can call io_uring_setup(2): a number of entries that the kernel refuses, and an
/// address that is none ("disk"). By them a filter knows that the VMM waits for a ring of the shim's.
pub const REQUEST: (u32, u32) = (0, 0x6469_736b);

/// What a ring has to have: one mapping for both queues, no completion lost, vectors that are copied when an operation is
/// given, threads that are the process's own, and memory that counts for its cgroup (Linux 5.12).
const NEEDED: u32 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 9;
/// Where `features` is among the words of a layout.
const FEATURES: usize = 5;
/// The disk among the ring's files.
const DISK: Fixed = Fixed(0);

/// `struct io_uring_params` (linux/io_uring.h) as the kernel has filled it in: where what is in a ring's memory.
pub type Layout = [u32; 30];

const _: () = assert!(size_of::<Parameters>() == size_of::<Layout>());

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel refuses one.
    #[error(
        "the kernel makes no ring of io_uring: {0}; sysctl kernel.io_uring_disabled has to be 0 or 1, and no filter of \
         system calls over the shim may forbid io_uring_setup"
    )]
    Setup(io::Error),
    /// It is too old.
    #[error(
        "the kernel's io_uring lacks what a disk needs (features {0:#x}); Linux 5.15 is needed"
    )]
    Features(u32),
    /// It cannot be made safe.
    #[error("cannot {action} a ring of io_uring: {error}; Linux 5.15 is needed")]
    Register {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Makes a ring for a disk, to be used by another process. One that only reads cannot write.
///
/// # Errors
/// [`RingError`].
pub fn make(disk: BorrowedFd<'_>, writes: bool) -> Result<(OwnedFd, Layout), RingError> {
    let ring: IoUring =
        IoUring::builder().setup_r_disabled().build(ENTRIES).map_err(RingError::Setup)?;
    // SAFETY: both are 120 bytes of whole words, of which any is valid, as the size above and the crate's word for it say.
    let layout: Layout = unsafe { std::mem::transmute(ring.params().clone()) };
    if layout[FEATURES] & NEEDED != NEEDED {
        return Err(RingError::Features(layout[FEATURES]));
    }
    let failed = |action| move |error| RingError::Register { action, error };
    let submitter = ring.submitter();
    submitter.register_files(&[disk.as_raw_fd()]).map_err(failed("give its file to"))?;
    submitter
        .register_iowq_max_workers(&mut [WORKERS, 1])
        .map_err(failed("bound the threads of"))?;
    submitter.register_restrictions(&mut restrictions(writes)).map_err(failed("restrict"))?;
    submitter.register_enable_rings().map_err(failed("enable"))?;
    // SAFETY: the ring has the descriptor open until the end of this function.
    let own = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
    Ok((own.try_clone_to_owned().map_err(failed("keep"))?, layout))
}

/// All that can be done by a ring. Of io_uring_register(2), nothing.
fn restrictions(writes: bool) -> Vec<Restriction> {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let asynchronous = squeue::Flags::ASYNC.bits();
    let mut all = vec![
        Restriction::sqe_flags_required(fixed),
        Restriction::sqe_flags_allowed(fixed | asynchronous),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
    ];
    if writes {
        all.push(Restriction::sqe_op(opcode::Writev::CODE));
        all.push(Restriction::sqe_op(opcode::Fallocate::CODE));
    }
    all
}

/// Waits for a ring of the shim's, as a jailed process does: by a call that the shim answers for the kernel.
///
/// # Errors
/// Nobody has answered.
pub fn request() -> io::Result<OwnedFd> {
    let (entries, address) = REQUEST;
    // SAFETY: the kernel itself refuses a ring without entries before it looks at an address, and this one is none. The
    // descriptor is this process's own.
    unsafe {
        let made = libc::syscall(libc::SYS_io_uring_setup, entries, u64::from(address));
        match RawFd::try_from(made) {
            Ok(ring) if ring >= 0 => Ok(std::os::fd::FromRawFd::from_raw_fd(ring)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// What is done to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fills what so many vectors name from a position on.
    Read {
        /// The first vector.
        vectors: *const libc::iovec,
        /// How many.
        count: u32,
        /// Where on the disk, in bytes.
        position: u64,
    },
    /// Writes what so many vectors name from a position on.
    Write {
        /// As for reading.
        vectors: *const libc::iovec,
        /// As for reading.
        count: u32,
        /// As for reading.
        position: u64,
        /// Whether it is on the disk when it is done.
        durable: bool,
    },
    /// Puts on the disk what was written.
    Flush,
    /// Zeros bytes, by fallocate(2) with these flags.
    Clear {
        /// The flags.
        mode: i32,
        /// Where on the disk, in bytes.
        position: u64,
        /// How many.
        bytes: u64,
    },
}

/// A ring as its user has it.
pub struct Ring {
    ring: IoUring,
    /// Operations whose completion was not taken yet.
    in_flight: u32,
}

impl Ring {
    /// Maps a ring.
    ///
    /// # Safety
    /// `ring` and `layout` are of one [`make`].
    ///
    /// # Errors
    /// It cannot be mapped.
    pub unsafe fn adopt(ring: OwnedFd, layout: Layout) -> io::Result<Self> {
        // SAFETY: as in `make`; what the layout says, holds for the ring, as the caller says.
        let ring = unsafe {
            let parameters: Parameters = std::mem::transmute(layout);
            IoUring::from_fd(ring.into_raw_fd(), parameters)?
        };
        Ok(Self { ring, in_flight: 0 })
    }

    /// How many operations were given whose completion was not taken.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Prepares an operation, of which [`Ring::take_ended`] tells by `id`. One that is to wait does so on a thread of the kernel's
    /// own. False if there is no room.
    ///
    /// # Safety
    /// The vectors, and the memory that they name, stay what they are until the completion was taken, or until nobody reads
    /// what is read; no Rust reference to that memory exists.
    pub unsafe fn prepare(&mut self, operation: Operation, id: u64, waits: bool) -> bool {
        if self.in_flight >= ENTRIES {
            return false;
        }
        let entry = match operation {
            Operation::Read { vectors, count, position } => {
                opcode::Readv::new(DISK, vectors, count).offset(position).build()
            }
            Operation::Write { vectors, count, position, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(DISK, vectors, count).offset(position).rw_flags(flags).build()
            }
            Operation::Flush => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
            Operation::Clear { mode, position, bytes } => {
                opcode::Fallocate::new(DISK, bytes).offset(position).mode(mode).build()
            }
        };
        let entry = match waits {
            true => entry.flags(squeue::Flags::ASYNC),
            false => entry,
        };
        // SAFETY: the caller keeps what the entry points to.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(id)).is_ok() };
        self.in_flight += u32::from(pushed);
        pushed
    }

    /// Gives what was prepared to the kernel.
    ///
    /// # Errors
    /// The kernel does not take all of it. What it has not taken stays prepared.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Gives what was prepared to the kernel, and waits until an operation is complete, if any is in flight.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn wait(&mut self) -> io::Result<()> {
        while self.in_flight > 0 && self.ring.completion().is_empty() {
            self.enter(1)?;
        }
        Ok(())
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(wanted) {
            Err(error) if error.raw_os_error() != Some(libc::EINTR) => Err(error),
            _ => Ok(()),
        }
    }

    /// The id of an operation that is complete, and what came of it as system calls tell it.
    pub fn take_ended(&mut self) -> Option<(u64, i32)> {
        let entry = self.ring.completion().next()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        Some((entry.user_data(), entry.result()))
    }
}

impl AsRawFd for Ring {
    /// Readable when an operation is complete.
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring has the descriptor open for as long as the borrow lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn ring(file: &File, writes: bool) -> Ring {
        let (ring, layout) = make(file.as_fd(), writes).unwrap();
        // SAFETY: they are of one ring.
        unsafe { Ring::adopt(ring, layout).unwrap() }
    }

    fn done(ring: &mut Ring, operation: Operation) -> i32 {
        // SAFETY: the caller waits for its end here, and has its memory until then.
        assert!(unsafe { ring.prepare(operation, 7, false) });
        ring.wait().unwrap();
        let (id, result) = ring.take_ended().unwrap();
        assert_eq!((id, ring.in_flight()), (7, 0));
        result
    }

    fn vector(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    #[test]
    fn disk_is_read_written_cleared_and_flushed() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        let mut ring = ring(&file, true);
        let mut data = [1; 512];
        let vectors = [vector(&mut data)];
        let (vectors, count) = (vectors.as_ptr(), 1);
        let write = Operation::Write { vectors, count, position: 512, durable: true };
        assert_eq!(done(&mut ring, write), 512);
        assert_eq!(done(&mut ring, Operation::Flush), 0);
        assert_eq!(done(&mut ring, Operation::Read { vectors, count, position: 0 }), 512);
        assert_eq!(data, [7; 512]);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let clear = Operation::Clear { mode, position: 4096, bytes: 4096 };
        assert_eq!(done(&mut ring, clear), 0);
        let mut all = [9; 8192];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!((all[512], all[1024], all[4096]), (1, 7, 0));
    }

    #[test]
    fn ring_of_a_disk_that_is_only_read_writes_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        let mut ring = ring(&file, false);
        let mut data = [1; 512];
        let vectors = [vector(&mut data)];
        let (vectors, count) = (vectors.as_ptr(), 1);
        let write = Operation::Write { vectors, count, position: 0, durable: false };
        assert_eq!(done(&mut ring, write), -libc::EACCES);
        let clear = Operation::Clear { mode: 0, position: 0, bytes: 4096 };
        assert_eq!(done(&mut ring, clear), -libc::EACCES);
        assert_eq!(done(&mut ring, Operation::Read { vectors, count, position: 0 }), 512);
        assert_eq!(data, [7; 512]);
    }

    /// Whoever has taken over the ring's user finds no other file, no other operation, and nothing to register.
    #[test]
    fn ring_does_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = ring(&file, true);
        let root = c"/".as_ptr();
        let open = opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), root).build();
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        let other = opcode::Fsync::new(io_uring::types::Fd(file.as_raw_fd())).build();
        let absent = opcode::Fsync::new(Fixed(1)).build();
        let linked = opcode::Fsync::new(DISK).build().flags(squeue::Flags::IO_LINK);
        let nothing = opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE);
        for (entry, refused) in [
            (open, libc::EACCES),
            (socket, libc::EACCES),
            (other, libc::EACCES),
            (linked, libc::EACCES),
            (nothing, libc::EACCES),
            (absent, libc::EBADF),
        ] {
            // SAFETY: nothing of it points to memory but the path, a constant.
            unsafe { ring.ring.submission().push(&entry).unwrap() };
            ring.in_flight += 1;
            ring.wait().unwrap();
            assert_eq!(ring.take_ended().map(|(_, result)| result), Some(-refused));
        }
        let submitter = ring.ring.submitter();
        let denied = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EACCES));
        };
        denied(submitter.register_files_update(0, &[file.as_raw_fd()]).map(drop));
        denied(submitter.unregister_files());
        denied(submitter.register_personality().map(drop));
        denied(submitter.register_iowq_max_workers(&mut [64, 64]));
        // What restricts is written once.
        let again = submitter.register_restrictions(&mut restrictions(true));
        assert!(again.is_err());
    }

    #[test]
    fn more_operations_than_a_ring_takes_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = ring(&file, true);
        for id in 0..u64::from(ENTRIES) {
            // SAFETY: a flush has no memory.
            assert!(unsafe { ring.prepare(Operation::Flush, id, false) });
        }
        // SAFETY: as above.
        assert!(!unsafe { ring.prepare(Operation::Flush, 0, false) });
        let mut seen = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            while let Some((id, result)) = ring.take_ended() {
                assert_eq!(result, 0);
                seen.push(id);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..u64::from(ENTRIES)).collect::<Vec<_>>());
    }

    #[test]
    fn kernel_gives_no_ring_for_a_request_that_nobody_answers() {
        assert!(request().is_err());
    }
}

//! The system calls that no safe wrapper offers. The only unsafe code of the agent
//! besides [`crate::devices`].
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use tokio::io::unix::AsyncFd;

/// Sends `signal` (1 to 64, real-time signals included) to one process.
///
/// # Errors
/// What kill(2) answers: ESRCH for no such process, EINVAL for no such signal.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // A pid of 0 or below would address process groups.
    if pid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: kill(2) takes two integers and touches no memory of ours.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives every signal its default action back, for execve(2) hands ignored ones on: Rust's
/// start-up code ignores SIGPIPE, and glibc's posix_spawn(3) its own two signals, 32 and 33.
pub(crate) fn default_signals() {
    // The kernel's `struct sigaction` of rt_sigaction(2): handler, flags, restorer and mask. All
    // zero is SIG_DFL. glibc's wrapper would refuse its own two signals.
    let default = [0u64; 4];
    for signal in 1..=64i64 {
        // SAFETY: the kernel reads a struct of at most these 32 bytes, whose mask is 8 bytes
        // long; no handler of ours is installed. SIGKILL and SIGSTOP are refused, unchanged.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0usize, 8usize);
        }
    }
}

/// Takes ownership of a descriptor that the parent process left open for this one.
///
/// # Errors
/// EBADF when it is not open.
pub(crate) fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD only reads and writes the descriptor table.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as fcntl just showed, and the caller, at the very
    // start of a fresh process, got its number on the command line for exactly this use.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Watches a descriptor with the runtime that the caller runs in.
///
/// # Errors
/// It is of a kind that epoll(7) does not take.
pub(crate) fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open until it is dropped, answers the same number every time, and
    // the AsyncFd deregisters it before dropping it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

//! The system calls that no safe wrapper offers: the only unsafe code of the agent.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

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

/// Lets the kernel collect this process's children, orphans that it is given included.
pub(crate) fn collect_children_unseen() {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Keeps processes without CAP_SYS_PTRACE from what /proc shows of this one (PR_SET_DUMPABLE).
pub(crate) fn hide_from_others() {
    // SAFETY: this prctl(2) takes integers and touches no memory of ours.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Mixes `seed` into the kernel's random numbers, and lets them begin anew from it at once.
///
/// # Errors
/// What random(4) answers.
pub(crate) fn seed_random(seed: &[u8]) -> io::Result<()> {
    // `struct rand_pool_info`: bits that count, bytes that follow, the bytes.
    let mut pool = Vec::with_capacity(8 + seed.len());
    let bytes = i32::try_from(seed.len()).map_err(io::Error::other)?;
    pool.extend(bytes.saturating_mul(8).to_ne_bytes());
    pool.extend(bytes.to_ne_bytes());
    pool.extend(seed);
    let random = std::fs::File::open("/dev/urandom")?;
    // SAFETY: RNDADDENTROPY reads the two numbers and as many bytes as the second one says, which
    // is what the vector holds; RNDRESEEDCRNG has no argument.
    let results = unsafe {
        [
            libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()),
            libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG),
        ]
    };
    if results.contains(&-1) { Err(io::Error::last_os_error()) } else { Ok(()) }
}

// random(4): _IOW('R', 0x03, int[2]), _IO('R', 0x07).
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

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

/// Watches a descriptor that tells of changes by POLLPRI.
///
/// # Errors
/// It is of a kind that epoll(7) does not take.
pub(crate) fn priority_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as in `async_fd`.
    Ok(unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::PRIORITY) }?)
}

/// The commands and constants of bpf(2) that are used here (linux/bpf.h).
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// A program of a cgroup further down is asked, too; both have to agree.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// How often the loading of a program is tried again that a signal interrupted.
const MAX_LOAD_TRIES: u32 = 100;

/// The part of `union bpf_attr` for BPF_PROG_LOAD; what follows it is 0 to the kernel.
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    instruction_address: u64,
    license_address: u64,
    log_level: u32,
    log_size: u32,
    log_address: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Loads a program that decides about device accesses of a cgroup.
///
/// # Errors
/// The kernel's verifier refuses it, or the kernel knows no such programs.
pub(crate) fn load_device_program(instructions: &[[u8; 8]]) -> io::Result<OwnedFd> {
    let load = ProgramLoad {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instruction_address: instructions.as_ptr() as u64,
        license_address: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_address: 0,
        kernel_version: 0,
        flags: 0,
    };
    let mut tries = 0;
    loop {
        // SAFETY: the kernel reads `load`, as many instructions as it says, and the license up to
        // its NUL; all of them outlive the call, and nothing is written, for there is no log.
        let fd = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<ProgramLoad>())
        };
        if fd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us (with O_CLOEXEC), and its
            // number fits, as every descriptor's does.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        }
        let error = io::Error::last_os_error();
        // The verifier gives up when a signal comes, and children end at any time.
        if error.kind() != io::ErrorKind::WouldBlock || tries == MAX_LOAD_TRIES {
            return Err(error);
        }
        tries += 1;
    }
}

/// Lets a program from [`load_device_program`] decide for a cgroup, until that is removed.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn attach_device_program(cgroup: impl AsFd, program: &OwnedFd) -> io::Result<()> {
    let attach = ProgramAttach {
        // Open descriptors are not negative.
        target: cgroup.as_fd().as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads `attach`, which outlives the call, and writes nothing.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<ProgramAttach>())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many queues an interface has, and how many of them are used (`struct ethtool_channels`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Channels {
    command: u32,
    most_of_each_kind: [u32; 3],
    /// The most that serve both directions.
    pub(crate) max_combined: u32,
    of_each_kind: [u32; 3],
    /// Those that do.
    pub(crate) combined: u32,
}

/// Requests of ethtool's (linux/sockios.h, linux/ethtool.h).
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_SCHANNELS: u32 = 0x3d;

/// The channels of an interface.
///
/// # Errors
/// There is no such interface, or it knows of none.
pub(crate) fn channels(name: &str) -> io::Result<Channels> {
    ask_for_channels(name, Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() })
}

/// Has an interface use as many channels.
///
/// # Errors
/// Its driver refuses.
pub(crate) fn set_channels(name: &str, channels: Channels) -> io::Result<()> {
    ask_for_channels(name, Channels { command: ETHTOOL_SCHANNELS, ..channels }).map(drop)
}

fn ask_for_channels(name: &str, mut channels: Channels) -> io::Result<Channels> {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte of a name is NUL.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: SIOCETHTOOL reads one `ifreq`, and these commands read and write the
    // `ethtool_channels` that its data points to; both outlive the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(channels) }
}

//! The way of a process from the shim into its jail.
//!
//! The child is a copy of a process that may have threads, so until its exec it does system calls
//! on what was made ready before, and nothing else: no allocation, no lock, no panic. What fails
//! comes back over a pipe as the step and the error; the pipe's end without a word is success.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};
use seccompiler::BpfProgram;
use tokio::io::AsyncReadExt;

use super::rings::{self, Rings};
use super::step::{REPORT_BYTES, Step};
use super::system_calls::{self, PROGRAM_FD};

/// The descriptor under which the VMM finds its socket.
pub(super) const API_FD: RawFd = 3;
const REPORT_FD: RawFd = 5;
/// Where the listener for its requests for rings goes to the shim.
const RINGS_FD: RawFd = 6;
/// Descriptors are moved above those that the child gives away.
const FIRST_FREE_FD: RawFd = 16;

/// The most files that a VMM can have open, unless the shim may have fewer. The file server needs
/// one for each file that the guest's kernel knows of.
const MAX_OPEN_FILES: u64 = 512 << 10;

/// What the file server needs to keep owners, modes and capabilities of files as the guest sets
/// them (capabilities(7)), as bits.
const FILE_SERVER_CAPABILITIES: u64 = 1 << 0 // CAP_CHOWN
    | 1 << 1 // CAP_DAC_OVERRIDE
    | 1 << 3 // CAP_FOWNER
    | 1 << 4 // CAP_FSETID
    | 1 << 6 // CAP_SETGID
    | 1 << 7 // CAP_SETUID
    | 1 << 31; // CAP_SETFCAP
/// More than Linux has; asking for one beyond its last is an error that ends the loop.
const CAPABILITIES: u64 = 64;

/// Beyond the 32 bits of clone(2)'s flags (linux/sched.h).
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// `SECBIT_NOROOT` and `SECBIT_NO_SETUID_FIXUP`, each with its lock (linux/securebits.h).
const SECURE_BITS: libc::c_ulong = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3;

/// What a process is confined to.
#[derive(Debug)]
pub struct Confinement<'a> {
    /// What becomes its root: a mount, read-only, without devices, set-user-id and programs.
    pub root: &'a Path,
    /// Its user and group.
    pub user_id: u32,
    /// Its cgroup.
    pub cgroup: BorrowedFd<'a>,
}

/// Why there is no jailed process.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Something before or beside the child.
    #[error("cannot {action} for the VMM's jail: {error}")]
    Prepare {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: io::Error,
    },
    /// The program is not there.
    #[error("cannot open the VMM {path}: {error}; install it there, or set `vmm`")]
    Program {
        /// The program.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// The base filter's tables make no program.
    #[error("cannot make the jail's system call filter: {0}")]
    Filter(#[from] vial_seccomp::RuleError),
    /// The kernel refuses namespaces.
    #[error(
        "cannot start a process in new namespaces: {0}; the kernel needs namespaces and cgroup v2, \
         the shim root and CAP_SYS_ADMIN"
    )]
    Clone(io::Error),
    /// The child came to no good.
    #[error("the VMM's jail cannot {step}: {error}; {}", step.remedy())]
    Step {
        /// Where.
        step: Step,
        /// What the system said.
        error: io::Error,
    },
}

fn prepare<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError::Prepare { action, error: error.into() }
}

/// A process that has entered its jail and become its program.
#[derive(Debug)]
pub struct Jailed {
    /// Its number on the host.
    pub pid: u32,
    /// Itself.
    pub pidfd: OwnedFd,
    /// Whether it has a user namespace. The host's configuration may not allow any.
    pub user_namespace: bool,
    /// What it waits at for rings; none where the kernel has no such thing.
    pub rings: Option<Rings>,
}

/// All that the child needs, made before it is.
struct Prepared {
    root: CString,
    program: OwnedFd,
    socket: OwnedFd,
    input: OwnedFd,
    output: OwnedFd,
    report: OwnedFd,
    rings: OwnedFd,
    go: Go,
    user_id: u32,
    open_files: libc::rlimit,
    rings_filter: BpfProgram,
    filter: BpfProgram,
}

/// What the child waits on before it does anything.
struct Go {
    word: OwnedFd,
    /// The parent's end, of which the child has a copy.
    release: RawFd,
}

/// Starts `program` in a jail, with `socket` as the descriptor that `--api-fd` names and `output`
/// for what it says. It is the first process of its PID namespace.
///
/// # Errors
/// [`JailError`]. There is no process then.
pub async fn spawn(
    program: &Path,
    socket: OwnedFd,
    output: OwnedFd,
    confinement: &Confinement<'_>,
) -> Result<Jailed, JailError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(prepare("make a pipe"));
    let (reports, report) = pipe()?;
    let (go, release) = pipe()?;
    let go = Go { word: go, release: release.as_raw_fd() };
    let (way, rings) = rings::way().map_err(prepare("make a socket"))?;
    let theirs = [socket, output, report, rings];
    let prepared = Prepared::new(program, theirs, go, confinement)?;
    let mut jailed = start(&prepared, confinement.cgroup)?;
    // Its own copies are what the child has; the pipe's end has to show.
    drop(prepared);
    let entered = async {
        settle(&jailed)?;
        rustix::io::write(&release, b"x").map_err(prepare("release the process"))?;
        hear(reports).await
    };
    match entered.await {
        Ok(()) => {
            jailed.rings = rings::take(&way).map_err(prepare("listen to requests for rings"))?;
            Ok(jailed)
        }
        Err(error) => {
            let kill = rustix::process::Signal::KILL;
            let _ = rustix::process::pidfd_send_signal(&jailed.pidfd, kill);
            let ended = rustix::process::WaitId::PidFd(jailed.pidfd.as_fd());
            let _ = rustix::process::waitid(ended, rustix::process::WaitIdOptions::EXITED);
            Err(error)
        }
    }
}

/// Makes the child, with a user namespace if that can be.
fn start(prepared: &Prepared, cgroup: BorrowedFd<'_>) -> Result<Jailed, JailError> {
    match clone(prepared, cgroup, true) {
        Err(error) if refuses_user_namespaces(&error) => {
            tracing::warn!(
                "the VMM gets no user namespace: {error}; allow them (user.max_user_namespaces) \
                 to have its capabilities mean nothing outside its jail"
            );
            clone(prepared, cgroup, false)
        }
        result => result,
    }
    .map_err(JailError::Clone)
}

/// What only the parent can do: the maps of the user namespace, which hold every user so that
/// files keep their owners, and the place among what the host kills when it has no memory left.
fn settle(jailed: &Jailed) -> Result<(), JailError> {
    let write =
        |name: &str, text: &str| std::fs::write(format!("/proc/{}/{name}", jailed.pid), text);
    if jailed.user_namespace {
        for name in ["uid_map", "gid_map"] {
            write(name, "0 0 4294967295").map_err(prepare("map users"))?;
        }
    }
    // The shim's own is that of a part of the node.
    write("oom_score_adj", "0").map_err(prepare("set the OOM score"))
}

/// Waits until the child has become its program, or says why it has not.
async fn hear(reports: OwnedFd) -> Result<(), JailError> {
    let mut reports = tokio::net::unix::pipe::Receiver::from_owned_fd(reports)
        .map_err(prepare("watch a pipe"))?;
    let mut text = Vec::with_capacity(REPORT_BYTES);
    reports.read_to_end(&mut text).await.map_err(prepare("read a pipe"))?;
    match <[u8; REPORT_BYTES]>::try_from(text.as_slice()) {
        Ok(report) => match Step::of_report(report) {
            Some((step, error)) => Err(JailError::Step { step, error }),
            None => {
                Err(prepare("understand a report")(io::Error::from(io::ErrorKind::InvalidData)))
            }
        },
        Err(_) => Ok(()),
    }
}

/// Whether there is no user namespace to be had, but everything else may.
fn refuses_user_namespaces(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EPERM | libc::EINVAL | libc::EUSERS))
}

impl Prepared {
    fn new(
        program: &Path,
        [socket, output, report, rings]: [OwnedFd; 4],
        go: Go,
        confinement: &Confinement<'_>,
    ) -> Result<Self, JailError> {
        let up = |fd: OwnedFd| {
            rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FREE_FD).map_err(prepare("move a descriptor"))
        };
        let root = CString::new(confinement.root.as_os_str().as_bytes())
            .map_err(prepare("name the root"))?;
        let opened =
            rustix::fs::openat(CWD, program, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| JailError::Program {
                    path: program.into(),
                    error: error.into(),
                })?;
        // No device of the host's, whose mode could be changed: a pipe that has ended.
        let (input, _) = pipe_with(PipeFlags::CLOEXEC).map_err(prepare("make a pipe"))?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let files = limit.maximum.unwrap_or(u64::MAX).min(MAX_OPEN_FILES);
        Ok(Self {
            root,
            program: up(opened)?,
            socket: up(socket)?,
            input: up(input)?,
            output: up(output)?,
            report: up(report)?,
            rings: up(rings)?,
            go: Go { word: up(go.word)?, release: go.release },
            user_id: confinement.user_id,
            open_files: libc::rlimit { rlim_cur: files, rlim_max: files },
            rings_filter: rings::filter(),
            filter: system_calls::filter()?,
        })
    }
}

/// Makes the child; it runs in [`enter`]. Returns in the parent only.
fn clone(prepared: &Prepared, cgroup: BorrowedFd<'_>, user_namespace: bool) -> io::Result<Jailed> {
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_PIDFD;
    if user_namespace {
        flags |= libc::CLONE_NEWUSER;
    }
    // SAFETY: all zeros are a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned()) | CLONE_INTO_CGROUP;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    let before = block_signals();
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of all memory and one thread,
    // which never returns from `enter`. `args` is whole, and its pointer is to a live variable.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    if pid == 0 {
        enter(prepared);
    }
    let error = io::Error::last_os_error();
    restore_signals(&before);
    match u32::try_from(pid) {
        Ok(pid) => {
            // SAFETY: the kernel has just made the descriptor, for us alone.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Jailed { pid, pidfd, user_namespace, rings: None })
        }
        Err(_) => Err(error),
    }
}

/// Keeps the child, until it has reset them, from running handlers that were the shim's.
fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are ours; all zeros are a valid one, and both are filled in before use.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: the set is a valid one, and nothing is asked for in return.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
}

// From here on: the child. Only system calls on what was prepared.

/// Does all steps and becomes the program, or says which step failed, and ends.
fn enter(prepared: &Prepared) -> ! {
    if let Err(step) = steps(prepared) {
        // SAFETY: the location of errno is this thread's; the report is a live array; the
        // descriptor is the pipe's, under one of its two numbers.
        unsafe {
            let report = step.report(*libc::__errno_location());
            if libc::write(REPORT_FD, report.as_ptr().cast(), REPORT_BYTES) < 0 {
                libc::write(prepared.report.as_raw_fd(), report.as_ptr().cast(), REPORT_BYTES);
            }
        }
    }
    // SAFETY: ends the process without running anything of the shim's.
    unsafe { libc::_exit(127) }
}

/// The result of a system call, as that of its step.
fn done(step: Step, result: impl Into<i64>) -> Result<(), Step> {
    if result.into() < 0 { Err(step) } else { Ok(()) }
}

/// Waits for the shim's word. There is none when it has given up or has gone: that shows once
/// nobody has the other end, not even the child itself. All else that it has of the shim's would
/// keep containerd from seeing that the shim has gone.
fn is_released(go: &Go) -> bool {
    let mut word = 0u8;
    // SAFETY: in the child nothing else uses that number; reads one byte into a live variable.
    unsafe {
        libc::close(go.release);
        libc::read(go.word.as_raw_fd(), (&raw mut word).cast(), 1) == 1
    }
}

fn steps(prepared: &Prepared) -> Result<(), Step> {
    if !is_released(&prepared.go) {
        // SAFETY: as in `enter`.
        unsafe { libc::_exit(127) };
    }
    // SAFETY: no pointers.
    done(Step::Session, unsafe { libc::setsid() })?;
    // Not with the clone: that would show the shim's cgroup as the root.
    // SAFETY: no pointers.
    done(Step::CgroupNamespace, unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })?;
    change_root(&prepared.root)?;
    limit(&prepared.open_files)?;
    keep_descriptors(prepared)?;
    drop_bounding_set()?;
    become_user(prepared.user_id)?;
    keep_capabilities()?;
    reset_signals()?;
    // SAFETY: no pointers.
    done(Step::NoNewPrivileges, unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // Below the base filter, which lets no other listener in.
    rings::install(&prepared.rings_filter, RINGS_FD);
    let program = libc::sock_fprog {
        len: prepared.filter.len() as u16,
        // The kernel only reads it.
        filter: prepared.filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the program is as long as it says, and its instructions have the kernel's layout, in
    // which they were made.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    done(Step::SystemCalls, result)?;
    // The number is that of API_FD.
    let words = [c"vial-vmm".as_ptr(), c"--api-fd".as_ptr(), c"3".as_ptr(), std::ptr::null()];
    let environment: [*const c_char; 1] = [std::ptr::null()];
    // SAFETY: the path is an empty string; both lists end with a null pointer, and their strings
    // are constants.
    let result = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            PROGRAM_FD,
            c"".as_ptr(),
            words.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    done(Step::Exec, result)
}

/// Makes `root` the root, with nothing else to be seen, and what the shim mounts there later.
fn change_root(root: &CStr) -> Result<(), Step> {
    let nothing = std::ptr::null();
    let path = root.as_ptr();
    // SAFETY: all strings end with a NUL; no file system's options are given.
    unsafe {
        let receive = libc::MS_REC | libc::MS_SLAVE;
        done(
            Step::ReceiveMounts,
            libc::mount(nothing, c"/".as_ptr(), nothing, receive, nothing.cast()),
        )?;
        // A copy of that mount, which receives as it does: the one that came with the namespace
        // is locked to its place.
        done(Step::BindRoot, libc::mount(path, path, nothing, libc::MS_BIND, nothing.cast()))?;
        done(Step::EnterRoot, libc::chdir(path))?;
        // The old root ends up on top of the new one, and is taken off from there.
        let here = c".".as_ptr();
        done(Step::ChangeRoot, libc::syscall(libc::SYS_pivot_root, here, here))?;
        done(Step::DetachHost, libc::umount2(here, libc::MNT_DETACH))?;
        done(Step::EnterRoot, libc::chdir(c"/".as_ptr()))?;
        done(Step::Hostname, libc::sethostname(c"vial".as_ptr(), 4))
    }
}

fn limit(open_files: &libc::rlimit) -> Result<(), Step> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both limits are live structures.
    unsafe {
        done(Step::Limits, libc::setrlimit(libc::RLIMIT_CORE, &raw const none))?;
        done(Step::Limits, libc::setrlimit(libc::RLIMIT_NOFILE, open_files))
    }
}

/// Puts the descriptors to their numbers and closes all others.
fn keep_descriptors(prepared: &Prepared) -> Result<(), Step> {
    let (input, output) = (prepared.input.as_raw_fd(), prepared.output.as_raw_fd());
    let moves = [
        (input, 0, 0),
        (output, 1, 0),
        (output, 2, 0),
        (prepared.socket.as_raw_fd(), API_FD, 0),
        (prepared.program.as_raw_fd(), PROGRAM_FD, libc::O_CLOEXEC),
        (prepared.report.as_raw_fd(), REPORT_FD, libc::O_CLOEXEC),
        (prepared.rings.as_raw_fd(), RINGS_FD, libc::O_CLOEXEC),
    ];
    for (from, to, flags) in moves {
        // SAFETY: no pointers. What had those numbers is the shim's, and not used here.
        done(Step::Descriptors, unsafe { libc::dup3(from, to, flags) })?;
    }
    // SAFETY: no pointers; nothing above is used from here on.
    let closed =
        unsafe { libc::syscall(libc::SYS_close_range, RINGS_FD + 1, libc::c_uint::MAX, 0) };
    done(Step::Descriptors, closed)
}

/// Gives up, for the process and all that it may execute, what the file server does not need.
fn drop_bounding_set() -> Result<(), Step> {
    for capability in 0..CAPABILITIES {
        if FILE_SERVER_CAPABILITIES & 1 << capability != 0 {
            continue;
        }
        // SAFETY: no pointers.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if result < 0 {
            // Beyond the last that this kernel has.
            // SAFETY: the location of errno is this thread's.
            return match (unsafe { *libc::__errno_location() }, capability) {
                (libc::EINVAL, 32..) => Ok(()),
                _ => Err(Step::BoundingSet),
            };
        }
    }
    Ok(())
}

/// Becomes the pod's user, without losing capabilities by it. Being root means nothing from here
/// on, in this process and what it executes, and to be another user takes no capability away: the file
/// server needs its own while it makes a file as whom the guest says.
fn become_user(id: u32) -> Result<(), Step> {
    // SAFETY: no pointers but that of an empty list.
    unsafe {
        done(Step::Identity, libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0))?;
        // The C library's wrappers would signal threads that are not there.
        let none = std::ptr::null::<libc::gid_t>();
        done(Step::Identity, libc::syscall(libc::SYS_setgroups, 0, none))?;
        done(Step::Identity, libc::syscall(libc::SYS_setresgid, id, id, id))?;
        done(Step::Identity, libc::syscall(libc::SYS_setresuid, id, id, id))
    }
}

/// `cap_user_header_t` and `cap_user_data_t` (capget(2)).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps the file server's capabilities, over the exec too.
fn keep_capabilities() -> Result<(), Step> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let half = |bits: u32| CapabilityData { effective: bits, permitted: bits, inheritable: bits };
    let low = FILE_SERVER_CAPABILITIES as u32;
    let data = [half(low), half((FILE_SERVER_CAPABILITIES >> 32) as u32)];
    // SAFETY: header and data have the layout of that version, which has two of them.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    done(Step::Capabilities, result)?;
    for capability in 0..CAPABILITIES {
        if FILE_SERVER_CAPABILITIES & 1 << capability == 0 {
            continue;
        }
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        // SAFETY: no pointers.
        let result = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0) };
        done(Step::Capabilities, result)?;
    }
    Ok(())
}

/// No signal is ignored or blocked any more.
fn reset_signals() -> Result<(), Step> {
    // SAFETY: all zeros are the default action, and an empty set; both are live.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        for signal in 1..=libc::SIGRTMAX() {
            // It fails for those that cannot be changed, which are never ignored.
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        let null = std::ptr::null_mut();
        done(Step::Signals, libc::sigprocmask(libc::SIG_SETMASK, &raw const none, null))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// What a child that waits finds when its parent has written `words` and closed its end.
    fn waits(words: &[u8]) -> bool {
        let (word, release) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let go = Go { word, release: release.as_raw_fd() };
        // SAFETY: the child makes system calls only, and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let released = is_released(&go);
            // SAFETY: ends the process without running anything of the test's.
            unsafe { libc::_exit(i32::from(released)) };
        }
        rustix::io::write(&release, words).unwrap();
        drop((go, release));
        let child = rustix::process::Pid::from_raw(pid).unwrap();
        let late = Instant::now() + Duration::from_secs(20);
        loop {
            let options = rustix::process::WaitOptions::NOHANG;
            if let Some((_, status)) = rustix::process::waitpid(Some(child), options).unwrap() {
                return status.exit_status().unwrap() == 1;
            }
            if Instant::now() > late {
                rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
                panic!("the child waits on though its parent has gone");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn child_goes_on_by_its_parents_word_alone() {
        assert!(waits(b"x"));
        assert!(!waits(b""));
    }
}

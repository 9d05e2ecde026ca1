//! Each call is made by a process of its own, which is this test program run again.
#![allow(unsafe_code)]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use super::*;

const KIND: &str = "VIAL_TEST_THREAD_KIND";
const CALL: &str = "VIAL_TEST_CALL";

const KINDS: [ThreadKind; 9] = [
    ThreadKind::Vcpu,
    ThreadKind::VcpuWithFunctions,
    ThreadKind::Io,
    ThreadKind::FileServer,
    ThreadKind::VhostUser,
    ThreadKind::Control,
    ThreadKind::ControlWithFunctions,
    ThreadKind::ControlThatGrows,
    ThreadKind::Saver,
];

/// A descriptor that is not open: what is allowed fails by it, and does nothing.
const CLOSED: i64 = 1 << 20;

/// A name, the call and its arguments.
type Attempt = (&'static str, i64, [i64; 4]);

const READ_WRITE: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;
const EXECUTABLE: i64 = READ_WRITE | libc::PROT_EXEC as i64;
const MAP: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;

const CLONE3: &str = "clone3";

/// What no thread may do.
const NEVER: &[Attempt] = &[
    ("execve", libc::SYS_execve, [0; 4]),
    ("execveat", libc::SYS_execveat, [CLOSED, 0, 0, 0]),
    ("fork", libc::SYS_fork, [0; 4]),
    ("clone", libc::SYS_clone, [libc::SIGCHLD as i64, 0, 0, 0]),
    (CLONE3, libc::SYS_clone3, [0; 4]),
    ("executable memory", libc::SYS_mmap, [0, 4096, EXECUTABLE, MAP]),
    ("memory made executable", libc::SYS_mprotect, [0, 4096, EXECUTABLE, 0]),
    ("memory of another node", libc::SYS_mbind, [0, 4096, 0, 0]),
    ("memfd", libc::SYS_memfd_create, [0; 4]),
    ("ptrace", libc::SYS_ptrace, [libc::PTRACE_TRACEME as i64, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [0; 4]),
    ("a ring", libc::SYS_io_uring_setup, [8, 0, 0, 0]),
    ("a ring without entries", libc::SYS_io_uring_setup, [0; 4]),
    ("a changed ring", libc::SYS_io_uring_register, [CLOSED, 0, 0, 0]),
    ("a ring that is polled", libc::SYS_io_uring_enter, [CLOSED, 1, 0, 1 << 1]),
    ("keyctl", libc::SYS_keyctl, [0; 4]),
    ("perf", libc::SYS_perf_event_open, [0; 4]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 4]),
    ("another's memory", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 4]),
    ("unshare", libc::SYS_unshare, [0; 4]),
    ("setns", libc::SYS_setns, [CLOSED, 0, 0, 0]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0]),
    ("socket", libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0, 0]),
    ("unix socket", libc::SYS_socket, [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0, 0]),
    ("connect", libc::SYS_connect, [CLOSED, 0, 0, 0]),
    ("a terminal's input", libc::SYS_ioctl, [CLOSED, libc::TIOCSTI as i64, 0, 0]),
    ("another VM", libc::SYS_ioctl, [CLOSED, 0xae01, 0, 0]),
    ("handles", libc::SYS_open_by_handle_at, [CLOSED, 0, 0, 0]),
    ("another filter's listener", libc::SYS_seccomp, [1, 8, 0, 0]),
];

/// What a thread of the kind may do, and then what the others do and it may not.
fn table(kind: ThreadKind) -> (&'static [Attempt], &'static [Attempt]) {
    const OPEN: Attempt = ("open", libc::SYS_openat, [CLOSED, 0, 0, 0]);
    const PAIR: Attempt = ("socket pair", libc::SYS_socketpair, [libc::AF_UNIX as i64, 1, 0, 0]);
    const INTERNET_PAIR: Attempt =
        ("internet socket pair", libc::SYS_socketpair, [libc::AF_INET as i64, 1, 0, 0]);
    const IDENTITY: Attempt = ("another user", libc::SYS_setresuid, [-1, -1, -1, 0]);
    const RUN: Attempt = ("run the guest", libc::SYS_ioctl, [CLOSED, 0xae80, 0, 0]);
    const POLL: Attempt = ("poll", libc::SYS_poll, [0, 0, 0, 0]);
    const EPOLL: Attempt = ("epoll", libc::SYS_epoll_ctl, [CLOSED, 0, 0, 0]);
    const RECEIVE: Attempt = ("receive", libc::SYS_recvmsg, [CLOSED, 0, 0, 0]);
    const DUPLICATE: Attempt =
        ("duplicate", libc::SYS_fcntl, [CLOSED, libc::F_DUPFD_CLOEXEC as i64, 0, 0]);
    // KVM_GET_LAPIC, KVM_SET_LAPIC.
    const READ_OUT: Attempt = ("read a vCPU", libc::SYS_ioctl, [CLOSED, 0x8400_ae8e, 0, 0]);
    const WRITE_INTO: Attempt = ("change a vCPU", libc::SYS_ioctl, [CLOSED, 0x4400_ae8f, 0, 0]);
    const WRITE_AT: Attempt = ("write at a place", libc::SYS_pwrite64, [CLOSED, 0, 0, 0]);
    const OWNER: Attempt = ("signals by a file", libc::SYS_fcntl, [CLOSED, 8, 0, 0]);
    const PASSED_INTERRUPT: Attempt =
        ("a passed function's interrupts", libc::SYS_ioctl, [CLOSED, 0x3b6e, 0, 0]);
    const PASSED_MEMORY: Attempt =
        ("more of a container's memory", libc::SYS_ioctl, [CLOSED, 0x3b71, 0, 0]);
    const SLOT: Attempt = ("a memory slot", libc::SYS_ioctl, [CLOSED, 0x4020_ae46, 0, 0]);
    const EVENT: Attempt = ("an event", libc::SYS_eventfd2, [0, -1, 0, 0]);
    // KVM_IOEVENTFD.
    const DOORBELL: Attempt = ("a doorbell", libc::SYS_ioctl, [CLOSED, 0x4040_ae79, 0, 0]);
    // VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT; IOMMU_IOAS_MAP, _UNMAP; and not
    // VFIO_DEVICE_BIND_IOMMUFD, IOMMU_DESTROY, _IOAS_ALLOC, _IOAS_COPY, _OPTION, _HWPT_ALLOC.
    const ATTACH: Attempt = ("attach a function", libc::SYS_ioctl, [CLOSED, 0x3b77, 0, 0]);
    const DETACH: Attempt = ("detach a function", libc::SYS_ioctl, [CLOSED, 0x3b78, 0, 0]);
    const IOMMUFD_MAP: Attempt =
        ("more of an address space", libc::SYS_ioctl, [CLOSED, 0x3b85, 0, 0]);
    const IOMMUFD_UNMAP: Attempt =
        ("less of an address space", libc::SYS_ioctl, [CLOSED, 0x3b86, 0, 0]);
    const BIND: Attempt = ("bind a function", libc::SYS_ioctl, [CLOSED, 0x3b76, 0, 0]);
    const DESTROY: Attempt = ("destroy of iommufd's", libc::SYS_ioctl, [CLOSED, 0x3b80, 0, 0]);
    const ANOTHER_SPACE: Attempt =
        ("another address space", libc::SYS_ioctl, [CLOSED, 0x3b81, 0, 0]);
    const COPY: Attempt = ("copy an address space", libc::SYS_ioctl, [CLOSED, 0x3b83, 0, 0]);
    const ACCOUNTING: Attempt = ("another accounting", libc::SYS_ioctl, [CLOSED, 0x3b87, 0, 0]);
    const PAGE_TABLE: Attempt = ("a page table", libc::SYS_ioctl, [CLOSED, 0x3b89, 0, 0]);
    // VFIO_GROUP_GET_DEVICE_FD.
    const GROUP: Attempt = ("a function of a group", libc::SYS_ioctl, [CLOSED, 0x3b6a, 0, 0]);
    // Of vhost (linux/vhost.h): VHOST_GET_FEATURES, _SET_OWNER, _SET_MEM_TABLE, _SET_VRING_ADDR,
    // _NET_SET_BACKEND; and not VHOST_SET_LOG_BASE, VHOST_SET_VRING_ENDIAN, VHOST_NEW_WORKER.
    const VHOST_KNOWS: Attempt =
        ("what vhost-net knows", libc::SYS_ioctl, [CLOSED, 0x8008_af00, 0, 0]);
    const VHOST_OWNER: Attempt = ("vhost-net's owner", libc::SYS_ioctl, [CLOSED, 0xaf01, 0, 0]);
    const VHOST_MEMORY: Attempt =
        ("vhost-net's memory", libc::SYS_ioctl, [CLOSED, 0x4008_af03, 0, 0]);
    const VHOST_RING: Attempt = ("vhost-net's ring", libc::SYS_ioctl, [CLOSED, 0x4028_af11, 0, 0]);
    const VHOST_TAP: Attempt = ("vhost-net's tap", libc::SYS_ioctl, [CLOSED, 0x4008_af30, 0, 0]);
    const TAP_QUEUE: Attempt = ("a tap's queues", libc::SYS_ioctl, [CLOSED, 0x4004_54d9, 0, 0]);
    const VHOST_LOG: Attempt = ("vhost-net's log", libc::SYS_ioctl, [CLOSED, 0x4008_af04, 0, 0]);
    const VHOST_ENDIAN: Attempt =
        ("another byte order", libc::SYS_ioctl, [CLOSED, 0x4008_af13, 0, 0]);
    const VHOST_THREAD: Attempt =
        ("another thread of vhost-net", libc::SYS_ioctl, [CLOSED, 0x8004_af08, 0, 0]);
    const READ_AT: Attempt = ("read at a place", libc::SYS_pread64, [CLOSED, 0, 0, 0]);
    const USE_RING: Attempt = ("a ring's operations", libc::SYS_io_uring_enter, [CLOSED, 0, 0, 1]);
    const ASK_FOR_RING: Attempt = (
        "a ring of the shim's",
        libc::SYS_io_uring_setup,
        [vial_ring::REQUEST.0 as i64, vial_ring::REQUEST.1 as i64, 0, 0],
    );
    // Answered, and nothing comes of it.
    const NO_CLONE3: Attempt = (CLONE3, libc::SYS_clone3, [0; 4]);
    match kind {
        ThreadKind::Vcpu => (
            &[RUN, DUPLICATE],
            &[
                OPEN,
                PAIR,
                IDENTITY,
                POLL,
                EPOLL,
                RECEIVE,
                OWNER,
                PASSED_INTERRUPT,
                SLOT,
                READ_AT,
                USE_RING,
                ASK_FOR_RING,
                VHOST_KNOWS,
                VHOST_OWNER,
                VHOST_RING,
                TAP_QUEUE,
            ],
        ),
        ThreadKind::VcpuWithFunctions => (
            &[RUN, DUPLICATE, PASSED_INTERRUPT, SLOT, READ_AT],
            &[OPEN, PAIR, IDENTITY, POLL, EPOLL, RECEIVE, OWNER, PASSED_MEMORY],
        ),
        ThreadKind::Io => (
            &[
                PAIR,
                EPOLL,
                RECEIVE,
                USE_RING,
                VHOST_OWNER,
                VHOST_MEMORY,
                VHOST_RING,
                VHOST_TAP,
                TAP_QUEUE,
            ],
            &[
                OPEN,
                INTERNET_PAIR,
                IDENTITY,
                RUN,
                DUPLICATE,
                POLL,
                ASK_FOR_RING,
                VHOST_LOG,
                VHOST_ENDIAN,
                VHOST_THREAD,
            ],
        ),
        ThreadKind::FileServer => (
            &[OPEN, IDENTITY, EPOLL, DUPLICATE],
            &[PAIR, RUN, RECEIVE, OWNER, POLL, USE_RING, ASK_FOR_RING],
        ),
        ThreadKind::VhostUser => (
            &[EPOLL, POLL, RECEIVE],
            &[OPEN, PAIR, IDENTITY, RUN, DUPLICATE, READ_AT, WRITE_AT, SLOT, EVENT, DOORBELL],
        ),
        ThreadKind::Control => (
            &[POLL, RECEIVE, EVENT, DOORBELL, ASK_FOR_RING, VHOST_KNOWS],
            &[
                OPEN,
                PAIR,
                IDENTITY,
                RUN,
                EPOLL,
                DUPLICATE,
                READ_OUT,
                WRITE_AT,
                SLOT,
                USE_RING,
                PASSED_MEMORY,
                ATTACH,
                IOMMUFD_MAP,
                VHOST_OWNER,
                VHOST_MEMORY,
                VHOST_TAP,
                TAP_QUEUE,
            ],
        ),
        ThreadKind::ControlWithFunctions => (
            &[
                POLL,
                RECEIVE,
                SLOT,
                PASSED_MEMORY,
                PASSED_INTERRUPT,
                READ_AT,
                WRITE_AT,
                EVENT,
                ATTACH,
                DETACH,
                IOMMUFD_MAP,
                IOMMUFD_UNMAP,
            ],
            &[
                OPEN,
                PAIR,
                IDENTITY,
                RUN,
                EPOLL,
                DUPLICATE,
                READ_OUT,
                WRITE_INTO,
                GROUP,
                BIND,
                DESTROY,
                ANOTHER_SPACE,
                COPY,
                ACCOUNTING,
                PAGE_TABLE,
            ],
        ),
        ThreadKind::ControlThatGrows => (
            &[POLL, RECEIVE, SLOT, RUN, DUPLICATE, READ_OUT, WRITE_INTO, NO_CLONE3, ASK_FOR_RING],
            &[OPEN, PAIR, IDENTITY, EPOLL, READ_AT, WRITE_AT, PASSED_MEMORY, PASSED_INTERRUPT],
        ),
        ThreadKind::Saver => (
            &[POLL, RECEIVE, READ_OUT, READ_AT, WRITE_AT],
            &[OPEN, PAIR, IDENTITY, RUN, EPOLL, DUPLICATE, WRITE_INTO],
        ),
    }
}

/// Allowed for all: memory is taken and written to a closed descriptor.
const ALWAYS: &[Attempt] = &[
    ("memory", libc::SYS_mmap, [0, 4096, READ_WRITE, MAP]),
    ("write", libc::SYS_write, [CLOSED, 0, 0, 0]),
    ("yield", libc::SYS_sched_yield, [0; 4]),
];

fn attempts(kind: ThreadKind) -> Vec<Attempt> {
    let (may, may_not) = table(kind);
    let grows = kind == ThreadKind::ControlThatGrows;
    let never: Vec<_> = NEVER.iter().filter(|(name, ..)| !grows || *name != CLONE3).collect();
    ALWAYS.iter().chain(may).chain(never).chain(may_not).copied().collect()
}

/// Not a test by itself: makes the call that the environment names, if it does.
#[test]
fn child() {
    let (Ok(kind), Ok(call)) = (std::env::var(KIND), std::env::var(CALL)) else { return };
    let kind = KINDS[kind.parse::<usize>().unwrap()];
    let (_, number, [a, b, c, d]) = attempts(kind)[call.parse::<usize>().unwrap()];
    confine(kind).unwrap();
    // SAFETY: descriptors are closed ones and pointers are null, so that nothing is touched but
    // fresh memory; then the process ends at once.
    unsafe {
        libc::syscall(number, a, b, c, d, -1, 0);
        libc::_exit(0);
    }
}

/// Not a test by itself: a thread of the kind that the environment names takes and frees more
/// memory than a heap keeps.
#[test]
fn allocating_child() {
    let (Ok(kind), Err(_)) = (std::env::var(KIND), std::env::var(CALL)) else { return };
    let kind = KINDS[kind.parse::<usize>().unwrap()];
    keep_one_heap();
    let confined = std::thread::spawn(move || {
        confine(kind).unwrap();
        for size in [100, 5_000, 60_000, 100_000] {
            let blocks: Vec<_> = (0..8_000_000 / size).map(|_| vec![1_u8; size]).collect();
            assert_eq!(
                blocks.iter().map(|block| block.len()).sum::<usize>(),
                8_000_000 / size * size
            );
        }
    });
    confined.join().unwrap();
}

#[test]
fn confined_threads_can_free_what_they_allocate() {
    for (number, kind) in KINDS.iter().enumerate() {
        let status = run_child("allocating_child", &[(KIND, number.to_string())]);
        assert_eq!(status.code(), Some(0), "{kind:?}: {status}");
    }
}

fn run_child(name: &str, environment: &[(&str, String)]) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("seccomp::tests::{name}"), "--test-threads", "1"])
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap()
        .status
}

fn run(kind: usize, call: usize) -> ExitStatus {
    run_child("child", &[(KIND, kind.to_string()), (CALL, call.to_string())])
}

fn each_call_of(wanted: ThreadKind) {
    let kind = KINDS.iter().position(|kind| *kind == wanted).unwrap();
    let allowed = ALWAYS.len() + table(wanted).0.len();
    for (call, (name, ..)) in attempts(wanted).into_iter().enumerate() {
        let status = run(kind, call);
        if call < allowed {
            assert_eq!(status.code(), Some(0), "{wanted:?}: {name}: {status}");
        } else {
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{wanted:?}: {name}: {status}");
        }
    }
}

#[test]
fn vcpu_with_functions_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::VcpuWithFunctions);
}

#[test]
fn vcpu_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::Vcpu);
}

#[test]
fn io_thread_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::Io);
}

#[test]
fn file_server_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::FileServer);
}

#[test]
fn control_thread_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::Control);
}

#[test]
fn control_thread_with_functions_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::ControlWithFunctions);
}

#[test]
fn saver_that_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::Saver);
}

#[test]
fn control_thread_that_grows_and_leaves_its_table_is_killed() {
    each_call_of(ThreadKind::ControlThatGrows);
}

/// Not a test by itself: a thread of the kind starts another, which filters itself further.
#[test]
fn starting_child() {
    let (Ok(_), Err(_)) = (std::env::var(KIND), std::env::var(CALL)) else { return };
    keep_one_heap();
    confine(ThreadKind::ControlThatGrows).unwrap();
    let started = std::thread::Builder::new().name("vcpu1".into()).stack_size(256 << 10);
    let started = started.spawn(|| confine(ThreadKind::Vcpu).is_ok()).unwrap();
    // SAFETY: it ends the process, whose test harness could not go on.
    unsafe { libc::_exit(i32::from(!started.join().unwrap())) };
}

#[test]
fn confined_thread_that_grows_can_start_a_vcpu() {
    let status = run_child("starting_child", &[(KIND, String::new())]);
    assert_eq!(status.code(), Some(0), "{status}");
}

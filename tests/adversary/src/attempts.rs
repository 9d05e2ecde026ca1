//! What needs no help: files, processes, sockets, mounts, and the kernel's odder doors.

use std::ffi::{CStr, c_long};

use crate::{Tally, call, text};

const NONE: [c_long; 6] = [0; 6];

/// Makes all attempts.
pub(crate) fn all(tally: &mut Tally) {
    files(tally);
    processes(tally);
    sockets(tally);
    mounts(tally);
    identity(tally);
    memory(tally);
    kernel(tally);
}

/// What is on any host, and must not be in the jail.
const PATHS: [&CStr; 16] = [
    c"/etc/passwd",
    c"/etc/shadow",
    c"/proc/self/status",
    c"/proc/1/root/etc/passwd",
    c"/proc/sys/kernel/core_pattern",
    c"/sys/kernel",
    c"/sys/fs/cgroup",
    c"/dev/null",
    c"/dev/kvm",
    c"/dev/mem",
    c"/run/vial",
    c"/run/containerd/containerd.sock",
    c"/var/lib/containerd",
    c"/bin/sh",
    c"/../../../../etc/passwd",
    c"../../../../../etc/passwd",
];

fn files(tally: &mut Tally) {
    let here = c_long::from(libc::AT_FDCWD);
    for path in PATHS {
        let open = [here, text(path), c_long::from(libc::O_RDONLY), 0, 0, 0];
        tally.call(&format!("open {path:?}"), libc::SYS_openat, open);
    }
    for path in [c"/new", c"new"] {
        let create = c_long::from(libc::O_CREAT | libc::O_RDWR);
        tally.call("make a file", libc::SYS_openat, [here, text(path), create, 0o666, 0, 0]);
        tally.call("make a directory", libc::SYS_mkdirat, [here, text(path), 0o777, 0, 0, 0]);
        let null = libc::makedev(1, 3) as c_long;
        let device = c_long::from(libc::S_IFCHR | 0o666);
        tally.call("make a device", libc::SYS_mknodat, [here, text(path), device, null, 0, 0]);
        let link = [text(c"/etc"), here, text(path), 0, 0, 0];
        tally.call("make a link", libc::SYS_symlinkat, link);
    }
    let mode = [here, text(c"/"), 0o777, 0, 0, 0];
    tally.call("change the root's mode", libc::SYS_fchmodat, mode);
    let owner = [here, text(c"/"), 0, 0, 0, 0];
    tally.call("change the root's owner", libc::SYS_fchownat, owner);
    tally.call("watch files", libc::SYS_inotify_init1, NONE);
    tally.call("watch a file system", libc::SYS_fanotify_init, NONE);
    let mut handle = [0u8; 256];
    handle[0] = 128;
    let mut mount = 0i32;
    let take = [here, text(c"/"), handle.as_mut_ptr() as c_long, (&raw mut mount) as c_long, 0, 0];
    tally.call("take a file's handle", libc::SYS_name_to_handle_at, take);
    let open = [here, handle.as_ptr() as c_long, 0, 0, 0, 0];
    tally.call("open by a handle", libc::SYS_open_by_handle_at, open);
}

fn processes(tally: &mut Tally) {
    for (what, number) in [("fork", libc::SYS_fork), ("vfork", libc::SYS_vfork)] {
        let child = call(number, NONE);
        if child == 0 {
            call(libc::SYS_exit, NONE);
        }
        tally.note(what, child > 0);
    }
    let child = call(libc::SYS_clone, [c_long::from(libc::SIGCHLD), 0, 0, 0, 0, 0]);
    if child == 0 {
        call(libc::SYS_exit, NONE);
    }
    tally.note("clone a process", child > 0);
    let clone_args = [0u64; 11];
    let args = [clone_args.as_ptr() as c_long, size_of_val(&clone_args) as c_long, 0, 0, 0, 0];
    let child = call(libc::SYS_clone3, args);
    if child == 0 {
        call(libc::SYS_exit, NONE);
    }
    tally.note("clone a process with more flags", child > 0);
    tally.note("see other processes", call(libc::SYS_getpid, NONE) != 1);
    tally.call("execute a shell", libc::SYS_execve, [text(c"/bin/sh"), 0, 0, 0, 0, 0]);
    for pid in [-1, 0, 2, 1000] {
        tally.call("send a signal", libc::SYS_kill, [pid, 0, 0, 0, 0, 0]);
        tally.call("hold a process", libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0]);
        tally.call("look at a process's memory", libc::SYS_process_vm_readv, [pid, 0, 0, 0, 0, 0]);
        let attach = c_long::from(libc::PTRACE_ATTACH);
        tally.call("trace a process", libc::SYS_ptrace, [attach, pid, 0, 0, 0, 0]);
        tally.call("compare processes", libc::SYS_kcmp, [pid, 1, 0, 0, 0, 0]);
    }
    tally.call("be traced", libc::SYS_ptrace, NONE);
    tally.call("signal another thread", libc::SYS_tgkill, [2, 2, 0, 0, 0, 0]);
    let limits = [4096u64, 4096];
    let raise = [0, c_long::from(libc::RLIMIT_CORE as i32), limits.as_ptr() as c_long, 0, 0, 0];
    tally.call("raise a limit", libc::SYS_prlimit64, raise);
    tally.call("get a better priority", libc::SYS_setpriority, [0, 0, -20, 0, 0, 0]);
}

fn sockets(tally: &mut Tally) {
    let stream = c_long::from(libc::SOCK_STREAM);
    for (what, family) in [
        ("a Unix socket", libc::AF_UNIX),
        ("an IPv4 socket", libc::AF_INET),
        ("an IPv6 socket", libc::AF_INET6),
        ("a netlink socket", libc::AF_NETLINK),
        ("a packet socket", libc::AF_PACKET),
        ("a vsock socket", libc::AF_VSOCK),
        ("a socket of the kernel's ciphers", libc::AF_ALG),
    ] {
        tally.call(what, libc::SYS_socket, [family.into(), stream, 0, 0, 0, 0]);
        let kind = c_long::from(libc::SOCK_RAW);
        tally.call(&format!("{what}, raw"), libc::SYS_socket, [family.into(), kind, 0, 0, 0, 0]);
    }
    let mut pair = [0i32; 2];
    let inet = [libc::AF_TIPC.into(), stream, 0, pair.as_mut_ptr() as c_long, 0, 0];
    tally.call("a pair of another family", libc::SYS_socketpair, inet);
    for (what, number) in [
        ("shared memory", libc::SYS_shmget),
        ("a message queue", libc::SYS_msgget),
        ("semaphores", libc::SYS_semget),
    ] {
        tally.call(what, number, [0, 4096, 0o1777, 0, 0, 0]);
    }
    tally.call("a POSIX queue", libc::SYS_mq_open, [text(c"a"), 0o102, 0o666, 0, 0, 0]);
}

fn mounts(tally: &mut Tally) {
    let (proc, root) = (text(c"proc"), text(c"/"));
    tally.call("mount proc", libc::SYS_mount, [proc, root, proc, 0, 0, 0]);
    let writable = (libc::MS_REMOUNT | libc::MS_BIND) as c_long;
    tally.call("make the root writable", libc::SYS_mount, [0, root, 0, writable, 0, 0]);
    let detach = c_long::from(libc::MNT_DETACH);
    tally.call("unmount the root", libc::SYS_umount2, [root, detach, 0, 0, 0, 0]);
    tally.call("change the root", libc::SYS_chroot, [root, 0, 0, 0, 0, 0]);
    tally.call("swap the root", libc::SYS_pivot_root, [root, root, 0, 0, 0, 0]);
    tally.call("open a file system", libc::SYS_fsopen, [proc, 0, 0, 0, 0, 0]);
    tally.call("open a mount", libc::SYS_open_tree, [-100, root, 1, 0, 0, 0]);
    tally.call("move a mount", libc::SYS_move_mount, [-100, root, -100, root, 0, 0]);
    tally.call("set a mount's flags", libc::SYS_mount_setattr, [-100, root, 0, 0, 0, 0]);
    for (what, flag) in [
        ("a user namespace", libc::CLONE_NEWUSER),
        ("a mount namespace", libc::CLONE_NEWNS),
        ("a network namespace", libc::CLONE_NEWNET),
        ("a PID namespace", libc::CLONE_NEWPID),
    ] {
        tally.call(what, libc::SYS_unshare, [flag.into(), 0, 0, 0, 0, 0]);
    }
    for descriptor in 0..8 {
        tally.call("join a namespace", libc::SYS_setns, [descriptor, 0, 0, 0, 0, 0]);
    }
}

fn identity(tally: &mut Tally) {
    // All capabilities that the format can name.
    let header = [0x2008_0522u32, 0];
    let all = [u32::MAX; 6];
    let more = [header.as_ptr() as c_long, all.as_ptr() as c_long, 0, 0, 0, 0];
    tally.call("take more capabilities", libc::SYS_capset, more);
    // CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_MKNOD
    for capability in [12, 19, 21, 27] {
        let raise = [
            c_long::from(libc::PR_CAP_AMBIENT),
            c_long::from(libc::PR_CAP_AMBIENT_RAISE),
            capability,
            0,
            0,
            0,
        ];
        tally.call("raise a capability", libc::SYS_prctl, raise);
        let read = [c_long::from(libc::PR_CAPBSET_READ), capability, 0, 0, 0, 0];
        tally.note("a capability within bounds", call(libc::SYS_prctl, read) != 0);
    }
    let privileges = [c_long::from(libc::PR_SET_NO_NEW_PRIVS), 0, 0, 0, 0, 0];
    tally.call("allow new privileges", libc::SYS_prctl, privileges);
    let bits = [c_long::from(libc::PR_SET_SECUREBITS), 0, 0, 0, 0, 0];
    tally.call("make root mean something", libc::SYS_prctl, bits);
    tally.call("leave the session", libc::SYS_setsid, NONE);
}

fn memory(tally: &mut Tally) {
    let executable = c_long::from(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    let anonymous = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    tally.call("executable memory", libc::SYS_mmap, [0, 4096, executable, anonymous, -1, 0]);
    let plain = c_long::from(libc::PROT_READ | libc::PROT_WRITE);
    let page = call(libc::SYS_mmap, [0, 4096, plain, anonymous, -1, 0]);
    tally.call("make memory executable", libc::SYS_mprotect, [page, 4096, executable, 0, 0, 0]);
    tally.call("a file in memory", libc::SYS_memfd_create, [text(c"a"), 0, 0, 0, 0, 0]);
    tally.call("secret memory", libc::SYS_memfd_secret, NONE);
    tally.call("handle page faults", libc::SYS_userfaultfd, NONE);
    tally.call("lock memory", libc::SYS_mlockall, [1, 0, 0, 0, 0, 0]);
}

/// Doors of the kernel that a VMM has no use for.
fn kernel(tally: &mut Tally) {
    for (what, number) in [
        ("bpf", libc::SYS_bpf),
        ("io_uring", libc::SYS_io_uring_setup),
        ("perf events", libc::SYS_perf_event_open),
        ("add a key", libc::SYS_add_key),
        ("request a key", libc::SYS_request_key),
        ("keyrings", libc::SYS_keyctl),
        ("load a module", libc::SYS_init_module),
        ("load a module's file", libc::SYS_finit_module),
        ("load a kernel", libc::SYS_kexec_load),
        ("reboot", libc::SYS_reboot),
        ("swap", libc::SYS_swapon),
        ("accounting", libc::SYS_acct),
        ("quotas", libc::SYS_quotactl),
        ("the kernel's log", libc::SYS_syslog),
        ("port access", libc::SYS_iopl),
        ("a port", libc::SYS_ioperm),
        ("descriptor tables", libc::SYS_modify_ldt),
        ("the clock", libc::SYS_clock_settime),
        ("the clock's rate", libc::SYS_adjtimex),
        ("the host's name", libc::SYS_sethostname),
        ("another personality", libc::SYS_personality),
        ("hang up the terminal", libc::SYS_vhangup),
    ] {
        tally.call(what, number, NONE);
    }
    // Rings of one's own: any flags, and what a VMM asks its shim for, changed.
    let mut words = [0u32; 30];
    for entries in [1, 256, 1 << 32 | 8] {
        let ring = [entries, words.as_mut_ptr() as c_long, 0, 0, 0, 0];
        tally.call("a ring of io_uring", libc::SYS_io_uring_setup, ring);
        let asked = [entries, 0x6469_736b, 0, 0, 0, 0];
        tally.call("a ring of io_uring by the VMM's word", libc::SYS_io_uring_setup, asked);
    }
    for operation in [0, 2, 9, 11, 12] {
        let register = [5, operation, 0, 0, 0, 0];
        tally.call("change a ring of io_uring", libc::SYS_io_uring_register, register);
    }
    tally.call("poll a ring of io_uring", libc::SYS_io_uring_enter, [5, 1, 0, 2, 0, 0]);
    let listener = c_long::from(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as i32);
    tally.call("listen to a filter", libc::SYS_seccomp, [1, listener, 0, 0, 0, 0]);
    // The 32-bit variant of the 64-bit table.
    tally.call("x32", 0x4000_0000 | libc::SYS_getpid, NONE);
}

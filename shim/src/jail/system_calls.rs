//! The base filter: what any program in the jail can ask of the kernel.
//!
//! It is the union of what the VMM's threads need, from the program's first instruction on. The
//! VMM then narrows each of its threads by a filter of its own (`vmm/src/seccomp`). Here a
//! forbidden call fails with `EPERM`, there it ends the VM.
//!
//! What is left out on purpose, beyond what is dangerous for everybody: any socket but a pair of
//! unnamed ones, so that a volume's socket files cannot be connected to; processes, so that all
//! that can be started is threads; memory that can be executed and was not when the program
//! began.

use seccompiler::{BpfProgram, SeccompAction};
use vial_seccomp::{CallRules, Condition, RuleError, Rules};

/// The descriptor that the VMM's program is executed by. It is gone when the program runs.
pub(super) const PROGRAM_FD: i32 = 4;

/// What every program does: memory, time, threads, its own signals.
const RUN: &[i64] = &[
    libc::SYS_arch_prctl,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    // Of its own memory, and on no node that its cgroup keeps from it.
    libc::SYS_mbind,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_uname,
];

/// What is done by descriptors: those that came from the shim, and those of events and pairs.
const DESCRIPTORS: &[i64] = &[
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_getsockopt,
    // They only take away.
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_lseek,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What the file server does to the shared tree, which is all that there is.
const FILES: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchmodat2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// How the file server makes files for the guest's users, and how the other threads give up what
/// it does that with.
const IDENTITY: &[i64] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getuid,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
];

/// `prctl` options.
const PRCTL: &[i32] = &[
    libc::PR_SET_NAME,
    libc::PR_SET_DUMPABLE,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_SECCOMP,
    libc::PR_SET_SECUREBITS,
    libc::PR_CAPBSET_READ,
    libc::PR_CAP_AMBIENT,
    libc::PR_SET_VMA,
];

/// `fcntl` commands.
const FCNTL: &[i32] =
    &[libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];

/// The type of KVM's requests, in the second byte (linux/kvm.h).
const KVMIO: u32 = 0xae00;
/// Requests to others than KVM.
const IOCTL: &[u64] = &[
    libc::FIONBIO,
    libc::TUNGETIFF,
    libc::TUNSETVNETHDRSZ,
    libc::TUNSETOFFLOAD,
    libc::TUNSETQUEUE,
];

/// What is asked of functions of the host by their descriptors, and of their container to let them
/// reach memory (linux/vfio.h): information, interrupts, reset, mapping and its end. Opening and joining is the
/// shim's.
const VFIO: std::ops::RangeInclusive<u64> = 0x3b00 + 107..=0x3b00 + 111;
const VFIO_DMA: std::ops::RangeInclusive<u64> = 0x3b00 + 113..=0x3b00 + 114;
/// The same by iommufd: attaching functions and detaching them (linux/vfio.h), mapping and its end
/// (linux/iommufd.h). Binding functions, and making address spaces, is the shim's.
const IOMMUFD_ATTACH: std::ops::RangeInclusive<u64> = 0x3b00 + 119..=0x3b00 + 120;
const IOMMUFD_DMA: std::ops::RangeInclusive<u64> = 0x3b85..=0x3b86;

/// Of io_uring_enter(2): wait until operations are complete (linux/io_uring.h).
const IORING_ENTER_GETEVENTS: u64 = 1 << 0;
/// What is asked of vhost-net (linux/vhost.h): its features, and those that the driver has; an
/// owner; the guest's memory; size, addresses, position, kick, call and error of a ring; and the
/// tap. Nothing that logs, polls or makes threads.
const VHOST: &[u64] = &[
    0x8008_af00,
    0x4008_af00,
    0xaf01,
    0x4008_af03,
    0x4008_af10,
    0x4028_af11,
    0x4008_af12,
    0x4008_af20,
    0x4008_af21,
    0x4008_af22,
    0x4008_af30,
];

/// How glibc starts a thread (pthread_create(3)).
const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// A rule for each value that the argument, 32 bits of it, may have.
fn one_of(argument: u8, values: impl IntoIterator<Item = u64>) -> CallRules {
    values.into_iter().map(|value| vec![Condition::is(argument, value as u32)]).collect()
}

fn rules() -> Rules {
    let numbers = |list: &[i32]| list.iter().map(|n| u64::from(n.cast_unsigned())).collect();
    let (prctl, fcntl): (Vec<u64>, Vec<u64>) = (numbers(PRCTL), numbers(FCNTL));
    let lists = [RUN, DESCRIPTORS, FILES, IDENTITY].concat();
    let mut rules: Rules = lists.into_iter().map(|number| (number, Vec::new())).collect();
    // Never memory that can be executed.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = libc::PROT_EXEC.cast_unsigned();
        rules.insert(call, vec![vec![Condition::masked(2, executable, 0)]]);
    }
    rules.insert(libc::SYS_prctl, one_of(0, prctl));
    rules.insert(libc::SYS_fcntl, one_of(1, fcntl));
    let listed = IOCTL.iter().chain(VHOST).copied();
    let functions = VFIO.chain(VFIO_DMA).chain(IOMMUFD_ATTACH).chain(IOMMUFD_DMA);
    let mut ioctl = one_of(1, listed.chain(functions));
    ioctl.push(vec![Condition::masked(1, 0xff00, KVMIO)]);
    rules.insert(libc::SYS_ioctl, ioctl);
    rules.insert(libc::SYS_socketpair, one_of(0, [libc::AF_UNIX as u64]));
    rules.insert(libc::SYS_clone, one_of(0, [THREAD_FLAGS as u64]));
    // Asking for a limit, not setting it.
    let no_limit = vec![Condition::is(2, 0), Condition::upper_is(2, 0)];
    rules.insert(libc::SYS_prlimit64, vec![no_limit]);
    // More filters, but none that somebody listens to.
    let own = vec![Condition::is(0, libc::SECCOMP_SET_MODE_FILTER), Condition::is(1, 0)];
    rules.insert(libc::SYS_seccomp, vec![own]);
    // Asks for a ring, which the shim answers (`super::rings`); the kernel itself makes none of that.
    let (entries, address) = vial_ring::REQUEST;
    let ring =
        vec![Condition::is(0, entries), Condition::is(1, address), Condition::upper_is(1, 0)];
    rules.insert(libc::SYS_io_uring_setup, vec![ring]);
    // Of the shim's rings, nothing but operations, and waiting for them.
    rules.insert(libc::SYS_io_uring_enter, one_of(3, [0, IORING_ENTER_GETEVENTS]));
    let program = vec![
        Condition::is(0, PROGRAM_FD.cast_unsigned()),
        Condition::is(4, libc::AT_EMPTY_PATH.cast_unsigned()),
    ];
    rules.insert(libc::SYS_execveat, vec![program]);
    rules
}

/// Calls that are answered as by a kernel that has none: the flags of clone3(2) are in memory, where no filter sees them. glibc
/// then takes the older call.
const ABSENT: &[i64] = &[libc::SYS_clone3];

/// The filter.
///
/// # Errors
/// The tables here make no program.
pub fn filter() -> Result<BpfProgram, RuleError> {
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    vial_seccomp::program_without(&rules(), ABSENT, refused, SeccompAction::Allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_is_a_program_within_the_kernels_limit() {
        let program = filter().unwrap();
        // BPF_MAXINSNS.
        assert!((1..=4096).contains(&program.len()), "{}", program.len());
    }

    #[test]
    fn no_ring_is_made() {
        let rules = rules();
        let setup = &rules[&libc::SYS_io_uring_setup];
        let asked = |rule: &Vec<Condition>| rule.contains(&Condition::is(0, 0));
        assert!(!setup.is_empty() && setup.iter().all(asked), "{setup:?}");
    }

    #[test]
    fn functions_are_attached_and_memory_is_mapped_and_nothing_else_is_asked_of_iommufd() {
        let rules = rules();
        let asked = |number: u32| {
            let is_it = |rule: &Vec<Condition>| rule.contains(&Condition::is(1, number));
            rules[&libc::SYS_ioctl].iter().any(is_it)
        };
        // From VFIO_DEVICE_BIND_IOMMUFD, and from IOMMU_DESTROY on.
        let found: Vec<u32> = (0x3b76..0x3bff).filter(|number| asked(*number)).collect();
        assert_eq!(found, [0x3b77, 0x3b78, 0x3b85, 0x3b86]);
    }

    #[test]
    fn what_leads_out_is_on_no_list() {
        let rules = rules();
        for call in [
            libc::SYS_bpf,
            libc::SYS_connect,
            libc::SYS_execve,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone3,
            libc::SYS_io_uring_register,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_kill,
            libc::SYS_memfd_create,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_name_to_handle_at,
            libc::SYS_open_by_handle_at,
            libc::SYS_open_tree,
            libc::SYS_perf_event_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_pidfd_open,
            libc::SYS_pivot_root,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_ptrace,
            libc::SYS_setns,
            libc::SYS_socket,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_userfaultfd,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
    }
}

//! What each kind of thread may call, and with what. Each list is to be read as a claim: nothing
//! in it reaches further than the descriptors that the VMM was handed.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::Check::{self, Any, Is, OneOf, With, Without};
use super::ThreadKind;
use crate::devices::net::vhost::request as vhost;

type Call = (i64, Check);

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// Memory, locks, events, time, and the end: what any thread of a Rust program does.
const EVERY_THREAD: &[Call] = &[
    (libc::SYS_brk, Any),
    (libc::SYS_clock_gettime, Any),
    (libc::SYS_close, Any),
    (libc::SYS_exit, Any),
    (libc::SYS_exit_group, Any),
    // A debugging build looks whether a descriptor is open before it closes it.
    (libc::SYS_fcntl, OneOf(1, &[libc::F_GETFD as u64])),
    (libc::SYS_futex, Any),
    (libc::SYS_getpid, Any),
    (libc::SYS_getrandom, Any),
    (libc::SYS_gettid, Any),
    (libc::SYS_madvise, Any),
    (libc::SYS_mmap, Without(2, PROT_EXEC)),
    (libc::SYS_mprotect, Without(2, PROT_EXEC)),
    (libc::SYS_mremap, Any),
    (libc::SYS_munmap, Any),
    // glibc names its memory, if asked to.
    (libc::SYS_prctl, OneOf(0, &[libc::PR_SET_VMA as u64])),
    (libc::SYS_read, Any),
    (libc::SYS_restart_syscall, Any),
    // Of abort(3); so are the numbers of process and thread.
    (libc::SYS_rt_sigaction, Any),
    (libc::SYS_rt_sigprocmask, Any),
    (libc::SYS_rt_sigreturn, Any),
    (libc::SYS_sched_yield, Any),
    (libc::SYS_sigaltstack, Any),
    (libc::SYS_tgkill, Any),
    (libc::SYS_write, Any),
    (libc::SYS_writev, Any),
];

/// A request's number (ioctl(2)) of KVM: direction, size of the argument, number.
const fn kvm(direction: u64, size: u64, number: u64) -> u64 {
    direction << 30 | size << 16 | 0xae << 8 | number
}

const KVM_RUN: u64 = kvm(0, 0, 0x80);
const KVM_GET_REGS: u64 = kvm(2, 144, 0x81);
const KVM_SET_GSI_ROUTING: u64 = kvm(1, 8, 0x6a);
const KVM_IRQFD: u64 = kvm(1, 32, 0x76);
const KVM_IOEVENTFD: u64 = kvm(1, 64, 0x79);

/// Runs the guest; on its way there the guest's driver activates devices and sets interrupts.
const VCPU: &[Call] = &[
    // A tap's settings change with what the driver negotiates.
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                KVM_RUN,
                KVM_GET_REGS,
                KVM_SET_GSI_ROUTING,
                KVM_IRQFD,
                KVM_IOEVENTFD,
                libc::TUNSETOFFLOAD,
            ],
        ),
    ),
    // A device's worker gets descriptors of its own.
    (libc::SYS_fcntl, OneOf(1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFD as u64])),
];

const KVM_SET_USER_MEMORY_REGION: u64 = kvm(1, 32, 0x46);
/// Turns interrupts on and off.
const VFIO_DEVICE_SET_IRQS: u64 = vfio(10);

/// What the driver of a passed function does besides: it moves BARs, turns interrupts on,
/// and reaches what of the function is not mapped by reads and writes of its descriptor.
const VCPU_WITH_FUNCTIONS: &[Call] = &[
    (libc::SYS_ioctl, OneOf(1, &[KVM_SET_USER_MEMORY_REGION, VFIO_DEVICE_SET_IRQS])),
    (libc::SYS_pread64, Any),
    (libc::SYS_pwrite64, Any),
];

/// An event loop.
const EVENT_LOOP: &[Call] =
    &[(libc::SYS_epoll_ctl, Any), (libc::SYS_epoll_pwait, Any), (libc::SYS_epoll_wait, Any)];

/// Of io_uring_enter(2): wait until operations are complete (linux/io_uring.h).
const IORING_ENTER_GETEVENTS: u64 = 1 << 0;

/// Taps, the host's ends of vsock connections, random numbers, what is typed at the console.
const IO: &[Call] = &[
    (libc::SYS_readv, Any),
    (libc::SYS_recvfrom, Any),
    (libc::SYS_recvmsg, Any),
    (libc::SYS_sendmsg, Any),
    (libc::SYS_sendto, Any),
    (libc::SYS_shutdown, Any),
    // A connection that the guest opens.
    (libc::SYS_socketpair, OneOf(0, &[libc::AF_UNIX as u64])),
    // The rings of disks, which can do nothing but serve these; no flags but that of waiting for an end.
    (libc::SYS_io_uring_enter, OneOf(3, &[0, IORING_ENTER_GETEVENTS])),
    // Handing a network's rings to the kernel, and taking them back, by descriptors that the shim
    // has opened. Not those by which it would log what it writes, speak of addresses that are asked
    // for, or change the thread that serves them.
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                vhost::SET_OWNER,
                vhost::SET_FEATURES,
                vhost::SET_MEM_TABLE,
                vhost::SET_VRING_NUM,
                vhost::SET_VRING_ADDR,
                vhost::SET_VRING_BASE,
                vhost::SET_VRING_KICK,
                vhost::SET_VRING_CALL,
                vhost::SET_VRING_ERR,
                vhost::NET_SET_BACKEND,
                // How many queues of its tap a network's driver uses.
                libc::TUNSETQUEUE,
            ],
        ),
    ),
];

/// The shared tree, below the root of the jail. Disks too: `preadv` and the like.
const FILES: &[Call] = &[
    (libc::SYS_copy_file_range, Any),
    (libc::SYS_dup, Any),
    (libc::SYS_fallocate, Any),
    (libc::SYS_fchdir, Any),
    (libc::SYS_fchmod, Any),
    (libc::SYS_fchmodat, Any),
    (libc::SYS_fchmodat2, Any),
    (libc::SYS_fchown, Any),
    (libc::SYS_fchownat, Any),
    (
        libc::SYS_fcntl,
        OneOf(
            1,
            &[
                libc::F_DUPFD_CLOEXEC as u64,
                libc::F_GETFD as u64,
                libc::F_SETFD as u64,
                libc::F_GETFL as u64,
                libc::F_SETFL as u64,
            ],
        ),
    ),
    (libc::SYS_fdatasync, Any),
    (libc::SYS_fgetxattr, Any),
    (libc::SYS_flistxattr, Any),
    (libc::SYS_fremovexattr, Any),
    (libc::SYS_fsetxattr, Any),
    (libc::SYS_fstat, Any),
    (libc::SYS_fstatfs, Any),
    (libc::SYS_fsync, Any),
    (libc::SYS_ftruncate, Any),
    (libc::SYS_getdents64, Any),
    (libc::SYS_getxattr, Any),
    (libc::SYS_linkat, Any),
    (libc::SYS_listxattr, Any),
    (libc::SYS_lseek, Any),
    (libc::SYS_mkdirat, Any),
    (libc::SYS_mknodat, Any),
    (libc::SYS_newfstatat, Any),
    (libc::SYS_openat, Any),
    (libc::SYS_openat2, Any),
    (libc::SYS_pread64, Any),
    (libc::SYS_preadv, Any),
    (libc::SYS_preadv2, Any),
    (libc::SYS_pwrite64, Any),
    (libc::SYS_pwritev, Any),
    (libc::SYS_pwritev2, Any),
    (libc::SYS_readlinkat, Any),
    (libc::SYS_readv, Any),
    (libc::SYS_removexattr, Any),
    (libc::SYS_renameat2, Any),
    (libc::SYS_setxattr, Any),
    (libc::SYS_statx, Any),
    (libc::SYS_symlinkat, Any),
    (libc::SYS_syncfs, Any),
    (libc::SYS_umask, Any),
    (libc::SYS_unlinkat, Any),
    (libc::SYS_utimensat, Any),
];

/// Acting for the guest's users, with the capabilities that the thread has.
const IDENTITY: &[Call] = &[
    (libc::SYS_capget, Any),
    (libc::SYS_capset, Any),
    (libc::SYS_getegid, Any),
    (libc::SYS_geteuid, Any),
    (libc::SYS_setgroups, Any),
    (libc::SYS_setresgid, Any),
    (libc::SYS_setresuid, Any),
];

/// The library asks for what it may do, before it gives up some of it for a request.
const ASKING: Call = (
    libc::SYS_prctl,
    OneOf(0, &[libc::PR_SET_VMA as u64, libc::PR_CAPBSET_READ as u64, libc::PR_CAP_AMBIENT as u64]),
);

/// Messages on the sockets that the shim has connected to backends.
const VHOST_USER: &[Call] = &[
    (libc::SYS_poll, Any),
    (libc::SYS_ppoll, Any),
    (libc::SYS_recvmsg, Any),
    (libc::SYS_sendmsg, Any),
    (libc::SYS_shutdown, Any),
];

/// The shim's socket; and disks and taps that come and go, which the shim has opened: what they are is asked for, a tap is
/// told how its packets begin and vhost-net asked for what it knows, and the guest's doorbells and
/// interrupts are theirs.
const CONTROL: &[Call] = &[
    (libc::SYS_eventfd2, Any),
    (libc::SYS_fcntl, OneOf(1, &[libc::F_GETFL as u64, libc::F_SETFL as u64])),
    (libc::SYS_fstat, Any),
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                KVM_SET_GSI_ROUTING,
                KVM_IRQFD,
                KVM_IOEVENTFD,
                libc::TUNGETIFF,
                libc::TUNSETVNETHDRSZ,
                vhost::GET_FEATURES,
            ],
        ),
    ),
    (libc::SYS_lseek, Any),
    (libc::SYS_poll, Any),
    (libc::SYS_ppoll, Any),
    (libc::SYS_recvmsg, Any),
    (libc::SYS_sendmsg, Any),
    // Asks the shim for the ring of a disk. The kernel itself makes none of that.
    (
        libc::SYS_io_uring_setup,
        Is(&[(0, vial_ring::REQUEST.0 as u64), (1, vial_ring::REQUEST.1 as u64)]),
    ),
    // A file of a debugging console is flushed at the end.
    (libc::SYS_fsync, Any),
];

/// A request's number of VFIO: no direction, no size (linux/vfio.h).
const fn vfio(number: u64) -> u64 {
    0x3b << 8 | (100 + number)
}

/// A request's number of iommufd: no direction, no size (linux/iommufd.h).
const fn iommufd(number: u64) -> u64 {
    0x3b << 8 | number
}

/// Adding functions of the host, whose descriptors the shim has opened, and removing them: what
/// they are is asked for, their memory becomes slots, their interrupts lines, the guest's memory
/// theirs.
const CONTROL_WITH_FUNCTIONS: &[Call] = &[
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                KVM_SET_USER_MEMORY_REGION,
                KVM_SET_GSI_ROUTING,
                KVM_IRQFD,
                // KVM_CREATE_DEVICE and KVM_SET_DEVICE_ATTR, of the device that knows the
                // functions.
                kvm(3, 12, 0xe0),
                kvm(1, 24, 0xe1),
                // VFIO_DEVICE_GET_INFO, _GET_REGION_INFO, _GET_IRQ_INFO, _SET_IRQS, _RESET.
                vfio(7),
                vfio(8),
                vfio(9),
                VFIO_DEVICE_SET_IRQS,
                vfio(11),
                // VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA.
                vfio(13),
                vfio(14),
                // VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT.
                vfio(19),
                vfio(20),
                // IOMMU_IOAS_MAP, IOMMU_IOAS_UNMAP.
                iommufd(0x85),
                iommufd(0x86),
            ],
        ),
    ),
    (libc::SYS_pread64, Any),
    (libc::SYS_pwrite64, Any),
];

/// Making vCPUs and giving the machine memory that was mapped before; starting a thread in this
/// process, and filtering its system calls further. What a vCPU's thread calls, it has to be
/// allowed here already.
const GROWTH: &[Call] = &[
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                KVM_SET_USER_MEMORY_REGION,
                // KVM_CREATE_VCPU, KVM_GET_TSC_KHZ.
                kvm(0, 0, 0x41),
                kvm(0, 0, 0xa3),
                // KVM_SET_CPUID2 and KVM_SET_MSRS, of which only the head of the list is counted.
                kvm(1, 8, 0x90),
                kvm(1, size_of::<kvm_msrs>() as u64, 0x89),
                // KVM_GET_LAPIC, KVM_SET_LAPIC.
                kvm(2, size_of::<kvm_lapic_state>() as u64, 0x8e),
                kvm(1, size_of::<kvm_lapic_state>() as u64, 0x8f),
            ],
        ),
    ),
    // A thread and no process.
    (libc::SYS_clone, With(0, libc::CLONE_THREAD as u64)),
    // What a thread does of itself when it starts.
    (libc::SYS_prctl, OneOf(0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64])),
    (libc::SYS_rseq, Any),
    (libc::SYS_sched_getaffinity, Any),
    // Without flags: a filter of the thread's own, and nobody who answers for it.
    (libc::SYS_seccomp, OneOf(1, &[0])),
    (libc::SYS_set_robust_list, Any),
];

/// Reading a machine out of KVM, and writing it to two files that the shim has opened.
const SAVER: &[Call] = &[
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                KVM_GET_REGS,
                kvm(2, size_of::<kvm_sregs>() as u64, 0x83),
                // Of model-specific registers only the head of the list is counted.
                kvm(3, size_of::<kvm_msrs>() as u64, 0x88),
                kvm(2, size_of::<kvm_lapic_state>() as u64, 0x8e),
                kvm(2, size_of::<kvm_mp_state>() as u64, 0x98),
                kvm(2, size_of::<kvm_vcpu_events>() as u64, 0x9f),
                kvm(2, size_of::<kvm_debugregs>() as u64, 0xa1),
                kvm(2, size_of::<kvm_xsave>() as u64, 0xa4),
                kvm(2, size_of::<kvm_xcrs>() as u64, 0xa6),
                kvm(3, size_of::<kvm_irqchip>() as u64, 0x62),
                kvm(2, size_of::<kvm_clock_data>() as u64, 0x7c),
            ],
        ),
    ),
    (libc::SYS_ftruncate, Any),
    (libc::SYS_pread64, Any), // of the image, which is saved behind the memory
    (libc::SYS_pwrite64, Any),
];

/// What a thread of that kind may call. A call that comes twice is allowed what either entry says.
pub(super) fn of(kind: ThreadKind) -> impl Iterator<Item = &'static Call> {
    const NOTHING: &[Call] = &[];
    let own = match kind {
        ThreadKind::Vcpu => [VCPU, NOTHING, NOTHING, NOTHING],
        ThreadKind::VcpuWithFunctions => [VCPU, VCPU_WITH_FUNCTIONS, NOTHING, NOTHING],
        ThreadKind::Io => [EVENT_LOOP, IO, NOTHING, NOTHING],
        ThreadKind::FileServer => [EVENT_LOOP, FILES, IDENTITY, &[ASKING]],
        ThreadKind::VhostUser => [EVENT_LOOP, VHOST_USER, NOTHING, NOTHING],
        ThreadKind::Control => [CONTROL, NOTHING, NOTHING, NOTHING],
        ThreadKind::ControlWithFunctions => [CONTROL, CONTROL_WITH_FUNCTIONS, NOTHING, NOTHING],
        ThreadKind::ControlThatGrows => [CONTROL, VCPU, GROWTH, NOTHING],
        ThreadKind::Saver => [CONTROL, SAVER, NOTHING, NOTHING],
    };
    EVERY_THREAD.iter().chain(own.into_iter().flatten())
}

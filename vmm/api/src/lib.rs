//! The requests, replies and events on the socket between the shim and `vial-vmm`.
//!
//! Types and their encoding only; each side does its own I/O. The socket is one end of a
//! `SOCK_SEQPACKET` pair that the VMM inherits. One packet carries one message, encoded by
//! [`encode`] (postcard), at most [`MAX_MESSAGE_BYTES`], with at most [`MAX_DESCRIPTORS`] file
//! descriptors attached (`SCM_RIGHTS`). A [`Descriptor`] in a message is an index into those.
//!
//! The VMM opens nothing by itself: whatever it uses comes with a message. When its end of the
//! socket breaks, the VMM ends, and the guest with it.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The version of these types. The first message names it; another version is refused.
pub const API_VERSION: u32 = 11;

/// The largest encoded message, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The most descriptors on one message. Linux itself ends at 253 (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 240;

/// The fewest and the most vCPUs a VM can have.
pub const VCPUS: std::ops::RangeInclusive<u8> = 1..=64;
/// The least and the most memory a VM can have, in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 32..=(64 << 10);
/// What comes to a saved VM's memory is a multiple of this, in MiB.
pub const GROWTH_STEP_MIB: u32 = 2;
/// The longest kernel command line that a caller can give, in bytes. The VMM adds its own words.
pub const MAX_COMMAND_LINE_BYTES: usize = 1536;
/// The size of a guest image is a multiple of this, in bytes: Linux takes persistent memory in such pieces.
pub const IMAGE_UNIT_BYTES: u64 = 2 << 20;
/// The largest guest image, in bytes.
pub const MAX_IMAGE_BYTES: u64 = 128 << 20;
/// Where in a guest image its file system says what it is (Linux: fs/erofs/erofs_fs.h, `EROFS_SUPER_OFFSET`), in bytes.
pub const IMAGE_MAGIC_AT: u64 = 1024;
/// What it says: `EROFS_SUPER_MAGIC_V1`.
pub const IMAGE_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();

/// Whether a guest image can have that size, in bytes.
pub fn is_image_size(bytes: u64) -> bool {
    (IMAGE_UNIT_BYTES..=MAX_IMAGE_BYTES).contains(&bytes) && bytes.is_multiple_of(IMAGE_UNIT_BYTES)
}

/// The most devices a VM can have: one PCI bus less the host bridge.
pub const MAX_DEVICES: usize = 31;

/// How many queues a device of a vhost-user backend can have: pairs, for a network.
pub const VHOST_USER_QUEUES: std::ops::RangeInclusive<u8> = 1..=8;
/// The size of [`VhostUserKind::Block`]'s rings, in bytes.
pub const VHOST_USER_RING_BYTES: u64 = 8 * (16 << 10);
/// The most bytes in the name of a file system (virtio 1.2, 5.11.4).
pub const MAX_TAG_BYTES: usize = 36;

/// The most functions of the host that a VM can have at one time.
pub const MAX_PASSED_FUNCTIONS: usize = 16;

/// The most disks that can come to a VM that runs, at one time.
pub const MAX_LATE_DISKS: usize = 8;
/// How many queues such a disk can have.
pub const DISK_QUEUES: std::ops::RangeInclusive<u8> = 1..=8;
/// The logical blocks that a disk can have, in bytes.
pub const LOGICAL_BLOCKS: std::ops::RangeInclusive<u32> = 512..=(64 << 10);
/// How many pairs of queues a network interface can have.
pub const NETWORK_PAIRS: std::ops::RangeInclusive<u8> = 1..=8;
/// The most network interfaces that come to a VM while it runs, at one time.
pub const MAX_LATE_INTERFACES: usize = 8;

/// The most NUMA nodes that a guest can have. The guest's kernel knows no more.
pub const MAX_NODES: usize = 8;
/// The number of a NUMA node of the host.
pub const HOST_NODES: std::ops::RangeInclusive<u16> = 0..=1023;
/// How far one node's memory is for another, as ACPI counts it (ACPI 6.5, 5.2.17): 10 is its own.
pub const DISTANCES: std::ops::RangeInclusive<u8> = 10..=254;

/// An index into the descriptors attached to the message that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Descriptor(pub u8);

/// What the shim asks. Every request is answered by one [`Reply`] with its `id`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the shim, returned in the reply.
    pub id: u64,
    /// What to do.
    pub action: Action,
}

/// What a [`Request`] asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Builds the machine and lets it run. Once, and before anything else.
    Boot(Box<VmConfig>),
    /// Connects the attached stream socket to a port of the guest. The answer comes when the
    /// request to the guest is queued; a guest that refuses shows as the end of the stream.
    VsockConnect {
        /// The guest's port.
        port: u32,
        /// A connected stream socket (one end of a pair), given to the VMM.
        socket: Descriptor,
    },
    /// What state the VM is in.
    Status,
    /// Ends the VM at once, as if its power was cut.
    Stop,
    /// As [`Action::Boot`], but the VM can be saved. It has neither console nor network, and its
    /// guest is one that nobody but the operator has put anything into: while it runs, the VMM
    /// keeps the right to read it out.
    BootTemplate(Box<TemplateConfig>),
    /// Saves a VM that [`Action::BootTemplate`] started, and ends it. Answered by a failure of the
    /// kind [`FailureKind::State`], and the VM goes on, while vsock connections are open.
    Save {
        /// An empty file, open for writing, for the guest's memory. Pages of zeros become holes.
        memory: Descriptor,
        /// An empty file, open for writing, for all else.
        state: Descriptor,
    },
    /// Builds the machine that was saved and lets it run on. In place of [`Action::Boot`]; after a
    /// failure that may still follow.
    Restore(Box<RestoreConfig>),
    /// Adds PCI functions of the host to a VM that runs and whose configuration has `hot_plug`.
    /// The guest finds them when it looks for new ones, without addresses in their BARs. All of
    /// the guest's memory is given to it and locked by that. After a failure none of them is there.
    AddFunctions {
        /// As in [`DeviceConfig::Passthrough`]. A container is not one that the VM has already; an
        /// iommufd and its address space are those of the functions that it has, if it has any.
        way: PassedBy,
        /// The functions.
        functions: Vec<Descriptor>,
    },
    /// Takes functions from the VM, whether the guest has let go of them or not: they are reset,
    /// reach nothing of its memory any more, and their descriptors are closed before the answer.
    RemoveFunctions {
        /// Which: [`AddedFunctions::set`].
        set: u32,
    },
    /// Adds a disk to a VM that runs. The guest finds it when it looks for new devices.
    AddDisk {
        /// As in [`DeviceConfig::Block`].
        file: Descriptor,
        /// As in [`DeviceConfig::Block`].
        read_only: bool,
        /// As in [`DeviceConfig::Block`].
        serial: String,
        /// What the guest is told of it, and how it is cached.
        shape: DiskShape,
        /// With which memory a ring of io_uring for this disk is used (`struct io_uring_params`, as words). The ring itself
        /// comes when the VMM asks for it, which it does before it answers (crate `vial-ring`). Without, its requests are
        /// done one after the other.
        ring: Option<[u32; 30]>,
    },
    /// Takes a disk that [`Action::AddDisk`] brought, whether the guest has let go of it or not: when this is answered,
    /// nothing is read from it or written to it any more.
    RemoveDisk {
        /// Which: that of [`Reply::DiskAdded`].
        device: u8,
    },
    /// Adds a network interface to a VM that runs. The guest finds it when it looks for new devices.
    AddInterface {
        /// As in [`DeviceConfig::Net`].
        taps: Vec<Descriptor>,
        /// As in [`DeviceConfig::Net`].
        mac: [u8; 6],
        /// As in [`DeviceConfig::Net`].
        mtu: u16,
        /// As in [`DeviceConfig::Net`].
        vhosts: Vec<Descriptor>,
    },
    /// Takes an interface that [`Action::AddInterface`] brought, whether the guest has let go of it or not: when this is
    /// answered, its tap is closed.
    RemoveInterface {
        /// Which: that of [`Reply::InterfaceAdded`].
        device: u8,
    },
    /// Gives a device of [`DeviceConfig::VhostUser`] another connection in place of one that
    /// [`Event::BackendGone`] has told of. Answered when it is taken; a backend that does not serve
    /// the device as the one before is told of by another such event.
    ReconnectBackend {
        /// As in the event.
        backend: u8,
        /// As in [`DeviceConfig::VhostUser`].
        socket: Descriptor,
    },
    /// Changes what a VM has that was restored with [`RestoreConfig::max_memory_mib`]. Answered when
    /// the guest is asked, with [`Reply::Size`]. After a failure the VM may have some of the vCPUs,
    /// and the guest is asked for the memory that it was asked for before.
    Resize {
        /// As many as there are, or more, as in [`RestoreConfig::vcpus`]. The guest's kernel starts
        /// the new ones, and stops those that it is not to use: none is ever taken away.
        vcpus: u8,
        /// The memory in MiB that the guest is asked to have: as much as was saved, or more by a
        /// multiple of [`GROWTH_STEP_MIB`]. What it has over that, it gives back when it can.
        memory_mib: u32,
    },
    /// What such a VM has. Answered by [`Reply::Size`].
    Size,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// The answer to the request of that id.
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it.
        result: Result<Reply, Failure>,
    },
    /// Something happened that nobody asked for.
    Event(Event),
}

/// What came of a request that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// The answer to [`Action::Status`].
    Status(VmState),
    /// The answer to [`Action::Boot`], [`Action::BootTemplate`] and [`Action::Restore`].
    Booted(BootReport),
    /// The answer to [`Action::AddFunctions`].
    FunctionsAdded(AddedFunctions),
    /// The answer to [`Action::AddDisk`].
    DiskAdded {
        /// Its device number on the guest's PCI bus 0, 1 to 31.
        device: u8,
    },
    /// The answer to [`Action::AddInterface`].
    InterfaceAdded {
        /// Its device number on the guest's PCI bus 0, 1 to 31.
        device: u8,
    },
    /// The answer to [`Action::Resize`] and [`Action::Size`].
    Size(VmSize),
}

/// How large a VM is that can grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// vCPUs, whether the guest uses them or not.
    pub vcpus: u8,
    /// The memory in MiB that the guest is asked to have.
    pub memory_mib: u32,
    /// The memory in MiB that it has. Only the guest knows when it becomes what it is asked for.
    pub plugged_mib: u32,
}

/// Functions of the host that came together, and go together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedFunctions {
    /// What they are taken back by. No other set of the VM ever has the same.
    pub set: u32,
    /// The device number of each on the guest's PCI bus 0, 1 to 31, in the order of the request.
    pub devices: Vec<u8>,
}

/// The phases of building the machine, each as its moment on the host's `CLOCK_MONOTONIC`, in
/// nanoseconds and in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootReport {
    /// Name and moment of each phase's end.
    pub marks: Vec<(String, u64)>,
    /// The functions of [`DeviceConfig::Passthrough`], if there are any.
    pub functions: Option<AddedFunctions>,
    /// The device number on the guest's PCI bus 0 of each [`DeviceConfig::VhostUser`], in their
    /// order.
    pub backends: Vec<u8>,
}

/// The states of a VM as its owner can see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Nothing was configured yet.
    Empty,
    /// The vCPUs run.
    Running,
    /// The guest has ended; the process is about to.
    Ended,
}

/// What a guest is told of a disk, and how the host caches it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShape {
    /// See [`DISK_QUEUES`].
    pub queues: u8,
    /// The smallest unit that can be addressed, in bytes: a power of two, see [`LOGICAL_BLOCKS`].
    pub logical_block: u32,
    /// The smallest unit that is written at once, in bytes: the logical block times a power of two.
    pub physical_block: u32,
    /// The smallest and the best size of a request, in bytes; 0 for none.
    pub io_sizes: (u32, u32),
    /// How it is cached.
    pub cache: DiskCache,
    /// What can be discarded, if anything.
    pub discard: Option<DiscardLimits>,
}

impl Default for DiskShape {
    /// As a file of the host's is.
    fn default() -> Self {
        Self {
            queues: 1,
            logical_block: 512,
            physical_block: 512,
            io_sizes: (0, 0),
            cache: DiskCache::Writeback,
            discard: Some(DiscardLimits { granularity: 4096, bytes: 1 << 30 }),
        }
    }
}

/// How the host caches a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskCache {
    /// In its page cache.
    Writeback,
    /// Not at all: the file is open with `O_DIRECT`, which wants memory at multiples of this, in bytes, a power of two up to
    /// the size of a page, and whole logical blocks.
    Direct {
        /// The alignment.
        alignment: u32,
    },
}

/// What of a disk can be discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardLimits {
    /// In pieces of this size, in bytes.
    pub granularity: u32,
    /// So much at once, in bytes.
    pub bytes: u64,
}

/// Why a request failed, as one sentence with its remedy, and as a kind to branch on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// What to branch on.
    pub kind: FailureKind,
    /// What failed, on what, and what to do.
    pub message: String,
}

/// The kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The request, or a file that came with it, is wrong.
    Invalid,
    /// The request does not fit the state the VM is in.
    State,
    /// The host refused something that the VM needs.
    Host,
}

/// What the VMM tells unasked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The guest connected to a port that [`DeviceConfig::Vsock`] names. The stream socket of
    /// that connection is attached.
    GuestConnected {
        /// The host's port.
        port: u32,
        /// The connection.
        socket: Descriptor,
    },
    /// The connection to a vhost-user backend broke. The guest waits for another.
    BackendGone {
        /// The place of the device among those of [`DeviceConfig::VhostUser`], from 0.
        backend: u8,
    },
    /// The VM ended. The last message; the process exits with [`ExitReason::status`].
    Exited(ExitReason),
}

/// Why a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU met a triple fault.
    TripleFault,
    /// [`Action::Stop`], or the socket to the shim broke.
    Stopped,
    /// The VMM itself, or KVM, failed.
    Failed,
}

impl ExitReason {
    /// All of them.
    pub const ALL: [ExitReason; 6] =
        [Self::PowerOff, Self::Reset, Self::Panic, Self::TripleFault, Self::Stopped, Self::Failed];

    /// The exit status of the process. 1 and 2 are left to errors before a VM exists.
    pub const fn status(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reset => 10,
            Self::Panic => 11,
            Self::TripleFault => 12,
            Self::Stopped => 13,
            Self::Failed => 14,
        }
    }

    /// The reason that an exit status stands for.
    pub fn from_status(status: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.status() == status)
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Reset => "the guest asked for a reset",
            Self::Panic => "the guest's kernel panicked",
            Self::TripleFault => "a vCPU met a triple fault",
            Self::Stopped => "the VM was stopped",
            Self::Failed => "the VMM failed",
        })
    }
}

/// A machine. Every descriptor is open, of the right kind, and given to the VMM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmConfig {
    /// [`API_VERSION`] of the sender.
    pub version: u32,
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: Descriptor,
    /// See [`VCPUS`].
    pub vcpus: u8,
    /// See [`MEMORY_MIB`].
    pub memory_mib: u32,
    /// An uncompressed 64-bit ELF kernel, open for reading.
    pub kernel: Descriptor,
    /// A file system that the guest finds as persistent memory which it can only read, open for reading: a multiple of
    /// [`IMAGE_UNIT_BYTES`], at most [`MAX_IMAGE_BYTES`]. It is an EROFS, and the guest's root: the VMM tells the kernel so.
    pub image: Option<Descriptor>,
    /// The kernel's command line, see [`MAX_COMMAND_LINE_BYTES`].
    pub command_line: String,
    /// Where the guest's serial console writes to, and reads from. Without it the guest has no
    /// serial port.
    pub console: Option<Descriptor>,
    /// See [`MAX_DEVICES`]. The order decides the devices' numbers on the PCI bus.
    pub devices: Vec<DeviceConfig>,
    /// Whether [`Action::AddFunctions`] can follow. It leaves the VMM's threads a few system calls
    /// more. A VM that is to be saved cannot have it.
    pub hot_plug: bool,
    /// Where the memory lies.
    pub placement: Placement,
    /// The memory itself, for a machine with [`DeviceConfig::VhostUser`], whose backends map it: a
    /// file (memfd_create(2)) of its size that cannot be made shorter, of huge pages if the
    /// placement says so. Other machines have memory of their own.
    pub shared_memory: Option<Descriptor>,
}

/// Where a machine's memory lies on the host, and what the guest is told of it. By default, it
/// lies where the host puts it, and the guest is told nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The guest's NUMA nodes, at most [`MAX_NODES`], or none. The first has the lowest memory and
    /// the first vCPUs, and so on; together they have all of both. A guest with one is told
    /// nothing.
    pub nodes: Vec<NodeConfig>,
    /// How far node `b` is for node `a`, at `a * nodes + b`; see [`DISTANCES`]. For one node,
    /// nothing.
    pub distances: Vec<u8>,
    /// The node that the PCI bus is near to.
    pub bus_node: Option<u8>,
    /// The pages that the memory consists of, all of which are taken at the start: the sizes of
    /// all nodes are multiples of theirs.
    pub huge_pages: Option<HugePages>,
}

/// A NUMA node of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConfig {
    /// In MiB, 1 or more.
    pub memory_mib: u32,
    /// How many of the vCPUs.
    pub vcpus: u8,
    /// The host's node that its memory comes from, see [`HOST_NODES`].
    pub host_node: u16,
    /// Whether it comes from there alone. Without, what that node does not have comes from others.
    pub bound: bool,
}

/// Sizes of pages beyond the usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePages {
    /// Their size in MiB.
    pub const fn mib(self) -> u32 {
        match self {
            Self::Mib2 => 2,
            Self::Gib1 => 1024,
        }
    }
}

/// A machine that is to be saved, for others to go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TemplateConfig {
    /// The machine. Its vCPUs are those that it has until it is saved; the guest's kernel must not
    /// look for the others before.
    pub machine: VmConfig,
    /// The most vCPUs that a machine can have that goes on from it, as the guest is told.
    pub max_vcpus: u8,
}

/// A machine that was saved. Every descriptor is open, of the right kind, and given to the VMM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// [`API_VERSION`] of the sender.
    pub version: u32,
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: Descriptor,
    /// What [`Action::Save`] left of the memory, open for reading. It is mapped, and must not
    /// change for as long as the VM lives.
    pub memory: Descriptor,
    /// What [`Action::Save`] left of all else, open for reading.
    pub state: Descriptor,
    /// As many as were saved, or more, up to [`TemplateConfig::max_vcpus`]. Those that were not
    /// saved wait for the guest's kernel to start them.
    pub vcpus: u8,
    /// See [`MEMORY_MIB`]. As it was saved, or more by a multiple of [`GROWTH_STEP_MIB`] when it
    /// has [`DeviceConfig::Memory`], by which the guest takes it.
    pub memory_mib: u32,
    /// First those that were saved, in their order, then others, which the guest finds when it
    /// looks for new ones.
    pub devices: Vec<DeviceConfig>,
    /// As in [`VmConfig`].
    pub hot_plug: bool,
    /// The most memory in MiB that [`Action::Resize`] can give it, up to the end of
    /// [`MEMORY_MIB`]; `None` for a VM that keeps its size. It costs addresses and no memory, and
    /// leaves the VMM's threads a few system calls more. Only with [`DeviceConfig::Memory`] and
    /// without `hot_plug`, since functions reach all memory that there is when they come.
    pub max_memory_mib: Option<u32>,
}

/// A device of the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// A socket device (virtio 1.2, 5.10). At most one.
    Vsock {
        /// The guest's context id, 3 or more.
        guest_cid: u32,
        /// The host's ports that the guest may connect to; a connection to another is refused.
        host_ports: Vec<u32>,
    },
    /// A shared directory, served by the VMM itself (virtio 1.2, 5.11).
    Fs {
        /// The name that the guest mounts it by, 1 to 36 bytes.
        tag: String,
        /// The directory (`O_PATH` or open for reading).
        root: Descriptor,
        /// `/proc/<pid of the VMM>/fd`, by which the server opens again what it holds. The VMM's
        /// own `/proc/self/fd` is used without it.
        proc_fd: Option<Descriptor>,
    },
    /// A network interface on a tap (virtio 1.2, 5.1).
    Net {
        /// The queues of a tap made with `IFF_NO_PI | IFF_VNET_HDR`, open for reading and writing:
        /// one for each pair of the guest's, see [`NETWORK_PAIRS`]. Where there are several, it was
        /// made with `IFF_MULTI_QUEUE`, and all but the first are detached (`TUNSETQUEUE`): the VMM
        /// attaches as many as the guest uses.
        taps: Vec<Descriptor>,
        /// The guest's address.
        mac: [u8; 6],
        /// The largest packet without its Ethernet header, 68 to 65535.
        mtu: u16,
        /// `/dev/vhost-net`, opened for each of these queues: then the host's kernel carries the
        /// packets, and without any the VMM.
        vhosts: Vec<Descriptor>,
    },
    /// A disk (virtio 1.2, 5.2): a regular file or a block device, never a disk format.
    Block {
        /// What holds the data; open for writing too unless `read_only`.
        file: Descriptor,
        /// Whether the guest can only read.
        read_only: bool,
        /// The serial number that the guest sees, at most 20 bytes.
        serial: String,
    },
    /// A source of random numbers (virtio 1.2, 5.4).
    Rng,
    /// Where more memory comes to a machine that goes on from a saved one (virtio 1.2, 5.15). At
    /// most one, and none in a machine that is never saved: that has all its memory at once.
    Memory,
    /// Gives the host back what the guest has used and has free again (virtio 1.3, 5.5, free page
    /// reporting), while no function of the host is there, which could still write to it. At most
    /// one, and none where the memory is shared or in huge pages.
    Balloon,
    /// PCI functions of the host, which share an IOMMU address space. At most one entry, and none
    /// in a VM that is restored: those come by [`Action::AddFunctions`]. Each function has a device
    /// number on the bus.
    Passthrough {
        /// By what they reach the guest's memory.
        way: PassedBy,
        /// The functions, at most [`MAX_PASSED_FUNCTIONS`]: opened by their groups
        /// (`VFIO_GROUP_GET_DEVICE_FD`), or each by itself and bound to the iommufd
        /// (`VFIO_DEVICE_BIND_IOMMUFD`).
        functions: Vec<Descriptor>,
    },
    /// A device that a process of the host serves, by vhost-user. None in a VM that is restored,
    /// and only with [`VmConfig::shared_memory`].
    VhostUser {
        /// What it is.
        kind: VhostUserKind,
        /// How many queues at most, see [`VHOST_USER_QUEUES`]. The backend may have fewer.
        queues: u8,
        /// A stream socket that is connected to the backend.
        socket: Descriptor,
    },
}

/// By what functions of the host reach the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PassedBy {
    /// VFIO's groups.
    Groups {
        /// `/dev/vfio/vfio`, to which the groups were joined and whose IOMMU type is set.
        container: Descriptor,
        /// The groups of the functions.
        groups: Vec<Descriptor>,
    },
    /// An address space of iommufd's, which the VMM fills, and attaches the functions to.
    Iommufd {
        /// `/dev/iommu`.
        iommufd: Descriptor,
        /// The number of the address space (`IOMMU_IOAS_ALLOC`).
        address_space: u32,
    },
}

/// The kinds of devices that vhost-user backends serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostUserKind {
    /// A network interface (virtio 1.2, 5.1).
    Net {
        /// The guest's address.
        mac: [u8; 6],
        /// As in [`DeviceConfig::Net`].
        mtu: u16,
    },
    /// A disk (virtio 1.2, 5.2).
    Block {
        /// Whether the backend has to be one that refuses writes.
        read_only: bool,
        /// A file as [`VmConfig::shared_memory`], of [`VHOST_USER_RING_BYTES`], all zeros.
        rings: Descriptor,
    },
    /// A file system (virtio 1.2, 5.11).
    Fs {
        /// The name that the guest mounts it by, 1 to [`MAX_TAG_BYTES`] bytes.
        tag: String,
    },
}

/// Why a message could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// It would not fit [`MAX_MESSAGE_BYTES`].
    #[error("a message of {0} bytes is over the limit of {MAX_MESSAGE_BYTES}")]
    TooLarge(usize),
    /// The bytes are no message of this version.
    #[error("the message is damaged or of another version: {0}")]
    Malformed(postcard::Error),
}

/// The bytes of a message.
///
/// # Errors
/// [`CodecError::TooLarge`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = postcard::to_stdvec(message).map_err(CodecError::Malformed)?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(CodecError::TooLarge(bytes.len()));
    }
    Ok(bytes)
}

/// The message of some bytes; nothing may be left over.
///
/// # Errors
/// [`CodecError::TooLarge`] or [`CodecError::Malformed`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(CodecError::TooLarge(bytes.len()));
    }
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(CodecError::Malformed(postcard::Error::DeserializeBadEncoding)),
        Err(error) => Err(CodecError::Malformed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> VmConfig {
        VmConfig {
            version: API_VERSION,
            kvm: Descriptor(0),
            vcpus: 2,
            memory_mib: 128,
            kernel: Descriptor(1),
            image: Some(Descriptor(2)),
            command_line: "quiet".into(),
            console: None,
            devices: vec![
                DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![1024] },
                DeviceConfig::Rng,
            ],
            hot_plug: true,
            placement: Placement::default(),
            shared_memory: None,
        }
    }

    #[test]
    fn request_survives_its_encoding() {
        let request = Request { id: 7, action: Action::Boot(Box::new(config())) };
        assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
    }

    #[test]
    fn bytes_left_over_are_refused() {
        let mut bytes = encode(&Request { id: 1, action: Action::Status }).unwrap();
        bytes.push(0);
        assert!(matches!(decode::<Request>(&bytes), Err(CodecError::Malformed(_))));
    }

    #[test]
    fn message_over_the_limit_is_refused() {
        let mut config = config();
        config.command_line = "x".repeat(MAX_MESSAGE_BYTES);
        let request = Request { id: 1, action: Action::Boot(Box::new(config)) };
        assert!(matches!(encode(&request), Err(CodecError::TooLarge(_))));
        assert!(matches!(
            decode::<Request>(&vec![0; MAX_MESSAGE_BYTES + 1]),
            Err(CodecError::TooLarge(_))
        ));
    }

    #[test]
    fn exit_statuses_are_told_apart() {
        for reason in ExitReason::ALL {
            assert_eq!(ExitReason::from_status(reason.status()), Some(reason));
        }
        assert_eq!(ExitReason::from_status(1), None);
    }

    proptest! {
        #[test]
        fn decode_of_any_bytes_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Message>(&bytes);
        }
    }
}

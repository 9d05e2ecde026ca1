//! PCI functions of the host that a pod is given: by VFIO, for the guest's own driver.
//!
//! A pod gets them in one of two ways. Somebody else, a device plugin as a rule, has bound them to
//! vfio-pci, and the container's spec names their group as `/dev/vfio/N`, or each of them as
//! `/dev/vfio/devices/vfioN`. Or the pod's annotation
//! [`ANNOTATION`] names addresses, which the operator's configuration has to list; those are bound
//! here, and given back to the driver that they came from when the pod has ended, however it did.
//!
//! - [`address`]: how a function is called.
//! - [`pci`]: what sysfs says of it, and how its driver is changed.
//! - [`wanted`]: what a pod asks for. Pure.
//! - [`binding`]: checks, binds, gives back.
//! - [`ways`]: by iommufd, or by groups.
//! - [`handles`]: opens what the VMM is handed.
//! - [`iommufd`]: the same, where it is by iommufd.
//! - [`passed`]: which functions a VM has, and whose they are. Pure.
//! - [`list`]: what of this node can be given, behind `vial devices`.

pub mod address;
pub mod binding;
pub mod handles;
pub mod iommufd;
pub mod list;
pub mod passed;
pub mod pci;
pub mod wanted;
pub mod ways;

use std::path::PathBuf;

use address::Address;
use ways::Node;

/// The number in a device's name: digits, without a sign.
fn number(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

/// The annotation of a pod that names addresses, with commas between them.
pub const ANNOTATION: &str = "io.vial/pci-devices";
/// What binds a function for VFIO.
pub const VFIO_DRIVER: &str = "vfio-pci";

/// Why a pod does not get the devices that it asks for.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A word that is no address.
    #[error(
        "'{0}' is no address of a PCI function; write it as `lspci -D` does, such as 0000:3b:02.0"
    )]
    Address(String),
    /// A device of VFIO's that is not understood.
    #[error(
        "the device {0} is neither an IOMMU group, such as /dev/vfio/42, nor a function, such as \
         /dev/vfio/devices/vfio3; have the device plugin name one of those"
    )]
    Node(String),
    /// More than a VM can have.
    #[error("the pod asks for more than {0} PCI functions; ask for fewer")]
    TooMany(usize),
    /// The operator has not listed it.
    #[error(
        "the pod's annotation {ANNOTATION} names {0}, which the node does not give to pods; add \
         it to `pci_devices` in Vial's configuration"
    )]
    NotListed(Address),
    /// It is not there.
    #[error("there is no PCI function {0} on this node; see `vial devices`")]
    Absent(Address),
    /// A group is not there.
    #[error("there is no IOMMU group {0} on this node; see `vial devices`")]
    NoGroup(u32),
    /// A device of VFIO's is not there.
    #[error("there is no PCI function {} on this node; see `vial devices`", .0.path().display())]
    NoFunction(Node),
    /// Nothing keeps it from the host's memory.
    #[error(
        "the PCI function {0} is behind no IOMMU; enable VT-d or AMD-Vi in the firmware, and boot \
         with intel_iommu=on or amd_iommu=on"
    )]
    NoIommu(Address),
    /// Another function has the same group.
    #[error(
        "IOMMU group {group} also has {stranger} (driver {driver}), which the pod does not get: \
         functions of one group can reach each other; bind it to vfio-pci and ask for all of the \
         group, or use a function in a group of its own"
    )]
    Stranger {
        /// The group.
        group: u32,
        /// The other function.
        stranger: Address,
        /// Who has it.
        driver: String,
    },
    /// Nobody has made it ready.
    #[error(
        "{address} in IOMMU group {group} is not bound to vfio-pci but to {driver}; bind it, or \
         have the device plugin do so"
    )]
    NotBound {
        /// The function.
        address: Address,
        /// Its group.
        group: u32,
        /// Who has it.
        driver: String,
    },
    /// It would carry what one pod left in it to the next.
    #[error("the PCI function {0} cannot be reset; give pods virtual functions, which can")]
    NoReset(Address),
    /// The driver is not there.
    #[error("the host has no driver vfio-pci; load it: `modprobe vfio-pci`")]
    NoDriver,
    /// The driver does not take it.
    #[error("vfio-pci does not take {0}; the kernel's log says why")]
    NotTaken(Address),
    /// Another VM has it.
    #[error("IOMMU group {0} is in use by another VM or program; see `vial devices`")]
    Busy(u32),
    /// The kernel gives it to nobody, or to somebody else alone.
    #[error(
        "the kernel does not give {address} out: another program has a function of its IOMMU group \
         {group}, or its interrupts cannot be kept from others; see `vial devices` and the kernel's \
         log, and enable interrupt remapping in the firmware"
    )]
    NotOwned {
        /// The function.
        address: Address,
        /// Its group.
        group: u32,
    },
    /// It has no device for itself, as others of the VM's have.
    #[error(
        "{0} has no device below /dev/vfio/devices, by which the pod's other functions were opened; \
         bind it to vfio-pci anew"
    )]
    NoNode(Address),
    /// The kernel does not give it out.
    #[error("IOMMU group {0} is not viable: a function in it has a driver other than vfio-pci")]
    NotViable(u32),
    /// A container wants what the VM was started without.
    #[error(
        "the container asks for IOMMU group {0}, and its pod's VM was started as one that gets no \
         functions later: no function of the node was bound to vfio-pci then, or the configuration \
         has `hot_plug_devices = false`; make the pod anew, set that key, or name the functions in \
         the pod's annotation {ANNOTATION}"
    )]
    Late(u32),
    /// The VM had it, and did not let go of it.
    #[error("the pod's VM still holds {0}, which it had before; make the pod anew")]
    Kept(Address),
    /// The kernel makes no devices of groups.
    #[error(
        "there is no /dev/vfio/vfio, by which functions of IOMMU groups are passed, and iommufd is \
         off or not there: `modprobe vfio`, or `modprobe iommufd` and `iommufd = true` in Vial's \
         configuration; see `vial check`"
    )]
    NoGroups,
    /// VFIO is of another kind.
    #[error("the host's VFIO has no IOMMU of type 1 (version 2); load vfio_iommu_type1")]
    Type,
    /// A file of the system.
    #[error("cannot {action} {path}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// A request to VFIO.
    #[error("cannot {action}: {error}")]
    Request {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: std::io::Error,
    },
}

impl DeviceError {
    /// Whether the pod itself asks for what cannot be, on any node.
    pub fn is_of_the_pod(&self) -> bool {
        matches!(self, Self::Address(_) | Self::Node(_) | Self::TooMany(_))
    }
}

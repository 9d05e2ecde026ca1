//! Opens functions, for the VMM to be handed: it opens nothing, and none of the requests here can
//! be made by it. By groups, container, groups and functions are opened and joined; by iommufd,
//! functions are opened and bound ([`super::iommufd`]). A VM's functions are all opened by one way.
#![allow(unsafe_code)]

use std::{
    collections::BTreeSet,
    ffi::{CString, c_ulong},
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    DeviceError,
    address::Address,
    binding::Record,
    iommufd::Iommufd,
    number,
    pci::Sysfs,
    ways::{self, Node, Way},
};
use crate::jail::descriptors;

// linux/vfio.h: requests have no direction and no size.
const GET_API_VERSION: c_ulong = 0x3b << 8 | 100;
const CHECK_EXTENSION: c_ulong = 0x3b << 8 | 101;
const SET_IOMMU: c_ulong = 0x3b << 8 | 102;
const GROUP_GET_STATUS: c_ulong = 0x3b << 8 | 103;
const GROUP_SET_CONTAINER: c_ulong = 0x3b << 8 | 104;
const GROUP_GET_DEVICE_FD: c_ulong = 0x3b << 8 | 106;
const API_VERSION: i32 = 0;
const TYPE1_V2_IOMMU: c_ulong = 3;
const GROUP_FLAGS_VIABLE: u32 = 1;

/// Whether there are functions bound to vfio-pci, which a container could ask for.
pub fn are_any() -> bool {
    has_any("/dev/vfio", |name| number(name).is_some())
        || has_any(ways::DEVICES, |name| Node::of_name(name).is_some())
}

fn has_any(directory: &str, is: impl Fn(&str) -> bool) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_str().is_some_and(&is))
}

/// What the VMM is handed of functions of the host.
#[derive(Debug)]
pub struct Handles {
    /// By what they reach memory.
    pub by: By,
    /// The functions, in the order of the records.
    pub functions: Vec<OwnedFd>,
}

/// By what functions reach memory.
#[derive(Debug)]
pub enum By {
    /// Groups.
    Groups {
        /// The groups' IOMMU address space.
        container: File,
        /// The groups.
        groups: Vec<File>,
    },
    /// An iommufd, which is the same for all functions of a VM.
    Iommufd(Arc<Iommufd>),
}

/// Opens the functions of one VM.
#[derive(Debug)]
pub struct Opener {
    /// Whether it may be by iommufd.
    iommufd: bool,
    chosen: Option<Chosen>,
}

#[derive(Debug)]
enum Chosen {
    Groups,
    Iommufd(Arc<Iommufd>),
}

impl Opener {
    /// For a VM that has none yet; `iommufd` is what the configuration allows.
    pub fn new(iommufd: bool) -> Self {
        Self { iommufd, chosen: None }
    }

    /// By which way it is, once there were any.
    pub fn way(&self) -> Option<Way> {
        self.chosen.as_ref().map(|chosen| match chosen {
            Chosen::Groups => Way::Groups,
            Chosen::Iommufd(_) => Way::Iommufd,
        })
    }

    /// Opens what the records name, all of it bound to vfio-pci.
    ///
    /// # Errors
    /// [`DeviceError`]. Nothing stays open then but an iommufd without functions.
    pub fn open_all(&mut self, records: &[Record]) -> Result<Handles, DeviceError> {
        let sysfs = Sysfs::default();
        let addresses: Vec<Address> = records.iter().map(|record| record.address).collect();
        if self.chosen.is_none() {
            let way = ways::choose(self.iommufd, ways::IOMMUFD.as_ref(), &sysfs, &addresses);
            self.chosen = Some(match way {
                Way::Groups => Chosen::Groups,
                Way::Iommufd => Chosen::Iommufd(Iommufd::open()?.into()),
            });
        }
        let handles = match &self.chosen {
            Some(Chosen::Iommufd(iommufd)) => bind_all(iommufd, &sysfs, records)?,
            _ => join_all(records)?,
        };
        let names: Vec<String> = addresses.iter().map(Address::to_string).collect();
        if let Some(way) = self.way() {
            tracing::info!("{} opened by {way}", names.join(", "));
        }
        Ok(handles)
    }
}

fn bind_all(
    iommufd: &Arc<Iommufd>,
    sysfs: &Sysfs,
    records: &[Record],
) -> Result<Handles, DeviceError> {
    let bind = |record: &Record| {
        let node = sysfs.vfio_node(record.address).ok_or(DeviceError::NoNode(record.address))?;
        iommufd.bind(record, &node)
    };
    let functions = records.iter().map(bind).collect::<Result<_, _>>()?;
    Ok(Handles { by: By::Iommufd(iommufd.clone()), functions })
}

pub(super) fn request(action: &'static str, result: i32) -> Result<i32, DeviceError> {
    match result {
        0.. => Ok(result),
        _ => Err(DeviceError::Request { action, error: io::Error::last_os_error() }),
    }
}

fn open(path: &Path) -> Result<File, DeviceError> {
    open_by(descriptors::open_device, path)
}

/// As [`open`], and the VMM cannot open it again.
pub(super) fn open_once(path: &Path) -> Result<File, DeviceError> {
    open_by(descriptors::open_device_once, path)
}

fn open_by(open: fn(&Path) -> io::Result<File>, path: &Path) -> Result<File, DeviceError> {
    open(path).map_err(|error| {
        let path = PathBuf::from(path);
        DeviceError::Io { action: "open", path, error }
    })
}

fn join_all(records: &[Record]) -> Result<Handles, DeviceError> {
    let container = open(Path::new("/dev/vfio/vfio")).map_err(|error| match error {
        DeviceError::Io { error, .. } if error.kind() == io::ErrorKind::NotFound => {
            DeviceError::NoGroups
        }
        other => other,
    })?;
    let fd = container.as_raw_fd();
    // SAFETY: no argument is looked at.
    let version = unsafe { libc::ioctl(fd, GET_API_VERSION, 0) };
    // SAFETY: the argument is a number.
    let has_type = unsafe { libc::ioctl(fd, CHECK_EXTENSION, TYPE1_V2_IOMMU) };
    if version != API_VERSION || has_type <= 0 {
        return Err(DeviceError::Type);
    }
    let numbers: BTreeSet<u32> = records.iter().map(|record| record.group).collect();
    let mut groups = Vec::new();
    for number in numbers {
        groups.push((number, join(&container, number)?));
    }
    // The type can be set once a group is there.
    // SAFETY: the argument is a number.
    request("set the IOMMU's type", unsafe { libc::ioctl(fd, SET_IOMMU, TYPE1_V2_IOMMU) })?;
    let functions = records
        .iter()
        .map(|record| {
            // Every record's group was opened above.
            let group = groups.iter().find(|(number, _)| *number == record.group);
            let (_, group) = group.ok_or(DeviceError::NoGroup(record.group))?;
            function(group, record)
        })
        .collect::<Result<_, _>>()?;
    let groups = groups.into_iter().map(|(_, group)| group).collect();
    Ok(Handles { by: By::Groups { container, groups }, functions })
}

/// Opens a group and joins it to the container.
fn join(container: &File, number: u32) -> Result<File, DeviceError> {
    let group = match open(Path::new(&format!("/dev/vfio/{number}"))) {
        Err(DeviceError::Io { error, .. }) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(DeviceError::Busy(number));
        }
        result => result?,
    };
    // `struct vfio_group_status`: its size and the flags.
    let mut status = [8u32, 0];
    // SAFETY: the array has the structure's layout, and is as large as its first field says.
    let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_STATUS, &raw mut status) };
    request("ask for the state of an IOMMU group", result)?;
    if status[1] & GROUP_FLAGS_VIABLE == 0 {
        return Err(DeviceError::NotViable(number));
    }
    let fd = container.as_raw_fd();
    // SAFETY: the kernel reads a number.
    let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const fd) };
    request("join an IOMMU group to its container", result)?;
    Ok(group)
}

fn function(group: &File, record: &Record) -> Result<OwnedFd, DeviceError> {
    let action = "open a PCI function by its IOMMU group";
    let name = CString::new(record.address.to_string())
        .map_err(|error| DeviceError::Request { action, error: error.into() })?;
    // SAFETY: the name ends with a NUL, and lives until the call returns.
    let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
    let fd = request(action, result)?;
    // SAFETY: the kernel has just made the descriptor, for us alone; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

//! iommufd, and the devices of their own that functions have with it: opened and bound to each
//! other, for the VMM to be handed. The VMM says what of its memory the address space has, and
//! attaches the functions; none of the requests here can be made by it.
#![allow(unsafe_code)]

use std::{
    ffi::c_ulong,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use super::{
    DeviceError,
    binding::Record,
    handles::{open_once, request},
    ways::{self, Node},
};

// linux/vfio.h and linux/iommufd.h: requests have no direction and no size.
const DEVICE_BIND_IOMMUFD: c_ulong = 0x3b << 8 | (100 + 18);
const IOAS_ALLOC: c_ulong = 0x3b << 8 | 0x81;
const OPTION: c_ulong = 0x3b << 8 | 0x87;
const OPTION_RLIMIT_MODE: u32 = 0;
const OPTION_OP_SET: u16 = 0;
/// Locked memory is counted for the process that has it, and not for its user.
const RLIMIT_MODE_PROCESS: u64 = 1;

/// `struct iommu_option`.
#[repr(C)]
#[derive(Debug)]
struct IommuOption {
    size: u32,
    option_id: u32,
    op: u16,
    reserved: u16,
    object_id: u32,
    val64: u64,
}

/// `struct iommu_ioas_alloc`.
#[repr(C)]
#[derive(Debug)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct vfio_device_bind_iommufd`, as far as all kernels know it.
#[repr(C)]
#[derive(Debug)]
struct BindIommufd {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    out_devid: u32,
}

/// An iommufd with an address space, for all functions of a VM.
#[derive(Debug)]
pub struct Iommufd {
    file: File,
    address_space: u32,
}

impl Iommufd {
    /// Opens it.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn open() -> Result<Self, DeviceError> {
        let file = open_once(ways::IOMMUFD.as_ref())?;
        // As by VFIO's containers: a VMM without a user of its own would share the limit with
        // whatever else that user has. The limit is the one that the shim sets for the process.
        let mut option = IommuOption {
            size: size_of::<IommuOption>() as u32,
            option_id: OPTION_RLIMIT_MODE,
            op: OPTION_OP_SET,
            reserved: 0,
            object_id: 0,
            val64: RLIMIT_MODE_PROCESS,
        };
        // SAFETY: the structure is as large as it says.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), OPTION, &raw mut option) };
        request("have iommufd count locked memory by process", set)?;
        let mut alloc = IoasAlloc { size: size_of::<IoasAlloc>() as u32, flags: 0, out_ioas_id: 0 };
        // SAFETY: the structure is as large as it says.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), IOAS_ALLOC, &raw mut alloc) };
        request("make an address space of iommufd", made)?;
        Ok(Self { file, address_space: alloc.out_ioas_id })
    }

    /// Its descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The number of its address space.
    pub fn address_space(&self) -> u32 {
        self.address_space
    }

    /// Opens a function and binds it, which gives it to whoever has the iommufd, and resets it.
    ///
    /// # Errors
    /// [`DeviceError`]; it is free then.
    pub fn bind(&self, record: &Record, node: &Node) -> Result<OwnedFd, DeviceError> {
        let file = open_once(&node.path())?;
        let mut bind = BindIommufd {
            argsz: size_of::<BindIommufd>() as u32,
            flags: 0,
            iommufd: self.file.as_raw_fd(),
            out_devid: 0,
        };
        // SAFETY: the structure is as large as it says.
        match unsafe { libc::ioctl(file.as_raw_fd(), DEVICE_BIND_IOMMUFD, &raw mut bind) } {
            0.. => Ok(file.into()),
            _ => Err(refused(record, io::Error::last_os_error())),
        }
    }
}

/// What the kernel's answer to binding a function means.
fn refused(record: &Record, error: io::Error) -> DeviceError {
    match error.raw_os_error() {
        // Its group is open, or another function of the group is with its driver; the function
        // itself is bound elsewhere (Linux drivers/vfio: `vfio_device_block_group`,
        // `vfio_df_open`).
        Some(libc::EBUSY | libc::EINVAL) => DeviceError::Busy(record.group),
        // drivers/iommu/iommufd/device.c, `iommufd_device_bind`.
        Some(libc::EPERM) => DeviceError::NotOwned { address: record.address, group: record.group },
        _ => DeviceError::Request { action: "bind a PCI function to iommufd", error },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!((size_of::<IommuOption>(), align_of::<IommuOption>()), (24, 8));
        assert_eq!(std::mem::offset_of!(IommuOption, object_id), 12);
        assert_eq!(std::mem::offset_of!(IommuOption, val64), 16);
        assert_eq!((size_of::<IoasAlloc>(), size_of::<BindIommufd>()), (12, 16));
        assert_eq!(std::mem::offset_of!(BindIommufd, iommufd), 8);
        assert_eq!((DEVICE_BIND_IOMMUFD, IOAS_ALLOC, OPTION), (0x3b76, 0x3b81, 0x3b87));
    }

    #[test]
    fn refusals_name_the_function_or_its_group_and_what_to_do() {
        let record = Record {
            address: "0000:3b:10.0".parse().unwrap(),
            group: 42,
            bound_here: false,
            driver: None,
        };
        for (number, words) in [
            (libc::EBUSY, ["group 42", "in use by another"]),
            (libc::EINVAL, ["group 42", "vial devices"]),
            (libc::EPERM, ["0000:3b:10.0", "interrupt remapping"]),
            (libc::ENOMEM, ["bind a PCI function to iommufd", "memory"]),
        ] {
            let text = refused(&record, io::Error::from_raw_os_error(number)).to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{number}: {text}");
        }
    }
}

//! The requests to iommufd (linux/iommufd.h), by which functions reach the guest's memory.
//!
//! Whoever configures the VM has opened `/dev/iommu`, made an address space there and bound the
//! functions to it. What is left to this process is to say what of its own memory the address space
//! has, and to attach functions and detach them.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::requests::{answer, prefer_large_pages};
use crate::memory::GuestRam;

/// A request's number: iommufd's have no direction and no size (linux/iommufd.h, `IOMMUFD_TYPE`).
const fn iommufd(number: libc::c_ulong) -> libc::c_ulong {
    0x3b << 8 | number
}

const IOAS_MAP: libc::c_ulong = iommufd(0x85);
const IOAS_UNMAP: libc::c_ulong = iommufd(0x86);

// `enum iommufd_ioas_map_flags`.
const MAP_FIXED_IOVA: u32 = 1 << 0;
const MAP_WRITEABLE: u32 = 1 << 1;
const MAP_READABLE: u32 = 1 << 2;

/// `struct iommu_ioas_map`.
#[repr(C)]
#[derive(Debug, Default)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[repr(C)]
#[derive(Debug, Default)]
struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

/// An address space of iommufd's that has the guest's memory, for all functions that are attached
/// to it. Dropping it takes the memory out.
#[derive(Debug)]
pub struct AddressSpace {
    iommufd: OwnedFd,
    id: u32,
    /// Stays mapped for as long as it is in the address space.
    _ram: GuestRam,
}

impl AddressSpace {
    /// Puts all of the guest's memory into the address space, at the guest's own addresses. That
    /// only says where it is: it is pinned, as [`super::requests::Container::map`] tells, while a
    /// function is attached. All functions that are attached together pin it once.
    ///
    /// # Errors
    /// The descriptor is of another kind, there is no such address space, or it has something
    /// there.
    pub fn new(iommufd: OwnedFd, id: u32, ram: &GuestRam) -> io::Result<Self> {
        // What was put into it goes with this when one of the regions is refused.
        let this = Self { iommufd, id, _ram: ram.clone() };
        for region in ram.iter() {
            prefer_large_pages(region)?;
            let mut map = IoasMap {
                size: size_of::<IoasMap>() as u32,
                flags: MAP_FIXED_IOVA | MAP_WRITEABLE | MAP_READABLE,
                ioas_id: id,
                reserved: 0,
                user_va: region.as_ptr() as u64,
                length: region.len(),
                iova: region.start_addr().0,
            };
            // SAFETY: the structure is as large as it says. The range is a mapping of guest
            // memory, which is the guest's and its devices' to change, and which `ram` keeps for as
            // long as it is in the address space.
            answer(unsafe { libc::ioctl(this.iommufd.as_raw_fd(), IOAS_MAP, &raw mut map) })?;
        }
        Ok(this)
    }

    /// What functions are attached to.
    pub fn id(&self) -> u32 {
        self.id
    }

    fn unmap(&self) -> io::Result<()> {
        // All that there is, whatever it is (linux/iommufd.h, `struct iommu_ioas_unmap`).
        let mut unmap = IoasUnmap {
            size: size_of::<IoasUnmap>() as u32,
            ioas_id: self.id,
            iova: 0,
            length: u64::MAX,
        };
        // SAFETY: the structure is as large as it says; nothing of this process is changed.
        answer(unsafe { libc::ioctl(self.iommufd.as_raw_fd(), IOAS_UNMAP, &raw mut unmap) })
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // The shim has the address space, too, so that it does not go with the descriptor.
        match self.unmap() {
            // There was nothing in it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => {
                tracing::warn!(%error, "guest memory stays in an address space of iommufd")
            }
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        // linux/iommufd.h and ioctl(2) in it: _IO(';', number).
        assert_eq!((size_of::<IoasMap>(), align_of::<IoasMap>()), (40, 8));
        assert_eq!((size_of::<IoasUnmap>(), align_of::<IoasUnmap>()), (24, 8));
        assert_eq!(std::mem::offset_of!(IoasMap, user_va), 16);
        assert_eq!(std::mem::offset_of!(IoasMap, iova), 32);
        assert_eq!(std::mem::offset_of!(IoasUnmap, iova), 8);
        assert_eq!((IOAS_MAP, IOAS_UNMAP), (u64::from(b';') << 8 | 0x85, 0x3b86));
    }

    #[test]
    fn descriptor_of_another_kind_is_refused() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        let error = AddressSpace::new(file.into(), 1, &ram).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}");
    }
}

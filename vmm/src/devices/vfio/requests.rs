//! The requests to VFIO (linux/vfio.h), and mappings of what they lead to. All calls that need
//! `unsafe` on the way to a passed function are in this file and in [`super::iommufd`].
//!
//! The descriptors come from whoever configures the VM, who has opened container and groups and
//! joined them, or bound the functions to iommufd: nothing is opened here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    vfio_device_attach_iommufd_pt, vfio_device_detach_iommufd_pt, vfio_device_info,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_irq_info, vfio_region_info,
};
use vm_memory::{GuestMemory, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::regions::{Area, HostRegion};
use crate::memory::GuestRam;

/// A request's number: VFIO's have no direction and no size (linux/vfio.h, `VFIO_BASE`).
const fn vfio(number: libc::c_ulong) -> libc::c_ulong {
    0x3b << 8 | (100 + number)
}

const DEVICE_GET_INFO: libc::c_ulong = vfio(7);
const DEVICE_GET_REGION_INFO: libc::c_ulong = vfio(8);
const DEVICE_GET_IRQ_INFO: libc::c_ulong = vfio(9);
const DEVICE_SET_IRQS: libc::c_ulong = vfio(10);
const DEVICE_RESET: libc::c_ulong = vfio(11);
const IOMMU_MAP_DMA: libc::c_ulong = vfio(13);
const IOMMU_UNMAP_DMA: libc::c_ulong = vfio(14);
const DEVICE_ATTACH_IOMMUFD_PT: libc::c_ulong = vfio(19);
const DEVICE_DETACH_IOMMUFD_PT: libc::c_ulong = vfio(20);

/// The most bytes of a region's description that are asked for, capabilities included.
const MAX_REGION_INFO_BYTES: usize = 4096;

/// Has a region of guest memory in large pages, which make few entries in the IOMMU's tables. A host without them refuses,
/// which only costs time.
pub(super) fn prefer_large_pages(region: &GuestRegionMmap) -> io::Result<()> {
    let bytes = usize::try_from(region.len()).map_err(io::Error::other)?;
    // SAFETY: the range is a mapping of guest memory, and this changes no byte of it.
    let _ = unsafe { libc::madvise(region.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    Ok(())
}

pub(super) fn answer(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn size<T>() -> u32 {
    // Of structures of a few dozen bytes.
    size_of::<T>() as u32
}

/// An IOMMU address space that groups were joined to.
#[derive(Debug)]
pub struct Container(OwnedFd);

impl Container {
    /// Takes a descriptor of `/dev/vfio/vfio` whose IOMMU type is set.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Lets the functions reach all of the guest's memory, at the guest's own addresses. It is
    /// pinned by that: the host gives it all of its pages now, and takes none back before
    /// [`Container::unmap`].
    ///
    /// Memory that is mapped privately from a file is as good as any: the pages are pinned for
    /// writing, so each becomes this process's own copy first, and a pinned copy is exclusive: no
    /// later write copies it again (Linux mm/gup.c, `FOLL_WRITE | FOLL_LONGTERM` of
    /// drivers/vfio/vfio_iommu_type1.c). What could replace it is not done here: this process never
    /// forks, merges no pages (`MADV_MERGEABLE`) and gives none back (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// The kernel refuses; for want of a limit on locked memory as a rule.
    pub fn map(&self, ram: &GuestRam) -> io::Result<()> {
        for region in ram.iter() {
            prefer_large_pages(region)?;
            let map = vfio_iommu_type1_dma_map {
                argsz: size::<vfio_iommu_type1_dma_map>(),
                flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                vaddr: region.as_ptr() as u64,
                iova: region.start_addr().0,
                size: region.len(),
            };
            // SAFETY: the structure is as large as it says. The range is a mapping of guest
            // memory, which is the guest's and its devices' to change; the kernel pins its pages,
            // so they outlive the mapping if that should go first.
            answer(unsafe { libc::ioctl(self.0.as_raw_fd(), IOMMU_MAP_DMA, &raw const map) })?;
        }
        Ok(())
    }

    /// Ends what [`Container::map`] began. All regions are tried.
    ///
    /// # Errors
    /// The first that the kernel refuses, because it is not mapped.
    pub fn unmap(&self, ram: &GuestRam) -> io::Result<()> {
        let mut result = Ok(());
        for region in ram.iter() {
            let mut unmap = vfio_iommu_type1_dma_unmap {
                argsz: size::<vfio_iommu_type1_dma_unmap>(),
                flags: 0,
                iova: region.start_addr().0,
                size: region.len(),
                ..Default::default()
            };
            // SAFETY: the structure is as large as it says; nothing of this process is changed.
            let answered =
                answer(unsafe { libc::ioctl(self.0.as_raw_fd(), IOMMU_UNMAP_DMA, &raw mut unmap) });
            result = result.and(answered);
        }
        result
    }
}

/// The descriptor of a function of the host's.
#[derive(Debug, Clone)]
pub struct FunctionFile(Arc<File>);

impl FunctionFile {
    /// Lets a function that is bound to an iommufd reach what an address space of that has, which
    /// is pinned by that.
    ///
    /// # Errors
    /// The kernel refuses; for want of a limit on locked memory as a rule.
    pub fn attach(&self, address_space: u32) -> io::Result<()> {
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: size::<vfio_device_attach_iommufd_pt>(),
            pt_id: address_space,
            ..Default::default()
        };
        // SAFETY: the structure is as large as it says; a descriptor of another kind is answered
        // with an error.
        answer(unsafe {
            libc::ioctl(self.0.as_raw_fd(), DEVICE_ATTACH_IOMMUFD_PT, &raw mut attach)
        })
    }

    /// Ends what [`FunctionFile::attach`] began: the function reaches nothing.
    ///
    /// # Errors
    /// The function is bound to no iommufd.
    pub fn detach(&self) -> io::Result<()> {
        let detach = vfio_device_detach_iommufd_pt {
            argsz: size::<vfio_device_detach_iommufd_pt>(),
            ..Default::default()
        };
        // SAFETY: as above.
        answer(unsafe {
            libc::ioctl(self.0.as_raw_fd(), DEVICE_DETACH_IOMMUFD_PT, &raw const detach)
        })
    }
}

impl AsRawFd for FunctionFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A function of the host's, by its descriptor.
#[derive(Debug)]
pub struct HostFunction {
    file: Arc<File>,
    config_offset: u64,
    vectors: [u32; 3],
}

/// Interrupts of a function, by VFIO's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupts {
    /// Message-signalled, one to 32.
    Msi = 1,
    /// With a table, up to 2048.
    Msix = 2,
}

impl HostFunction {
    /// Takes a descriptor that `VFIO_GROUP_GET_DEVICE_FD` made, or one that
    /// `VFIO_DEVICE_BIND_IOMMUFD` bound, and resets the function.
    ///
    /// # Errors
    /// It is no PCI function, cannot be reset, or does not answer.
    pub fn new(descriptor: OwnedFd) -> Result<Self, HostFunctionError> {
        let mut info = vfio_device_info { argsz: size::<vfio_device_info>(), ..Default::default() };
        let file = File::from(descriptor);
        // SAFETY: the structure is as large as it says; a descriptor of another kind is answered
        // with an error.
        answer(unsafe { libc::ioctl(file.as_raw_fd(), DEVICE_GET_INFO, &raw mut info) })
            .map_err(refused("describe itself"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 || info.num_regions < VFIO_PCI_NUM_REGIONS {
            return Err(HostFunctionError::NotPci);
        }
        if info.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(HostFunctionError::NoReset);
        }
        let mut this = Self { file: Arc::new(file), config_offset: 0, vectors: [0; 3] };
        this.reset().map_err(refused("be reset"))?;
        this.config_offset = this
            .region(VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(refused("show its registers"))?
            .offset;
        for kind in [Interrupts::Msi, Interrupts::Msix] {
            this.vectors[kind as usize] =
                this.ask_vectors(kind).map_err(refused("tell its interrupts"))?;
        }
        Ok(this)
    }

    /// Its descriptor.
    pub fn file(&self) -> FunctionFile {
        FunctionFile(self.file.clone())
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: no argument is looked at.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), DEVICE_RESET, 0) })
    }

    fn ask_vectors(&self, kind: Interrupts) -> io::Result<u32> {
        let mut info = vfio_irq_info {
            argsz: size::<vfio_irq_info>(),
            index: kind as u32,
            ..Default::default()
        };
        // SAFETY: the structure is as large as it says.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), DEVICE_GET_IRQ_INFO, &raw mut info) })?;
        Ok(info.count)
    }

    /// What the host says of a region: BAR 0 to 5, or configuration space.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn region(&self, index: u32) -> io::Result<HostRegion> {
        // In words of 8 bytes, which is how its structures are aligned.
        let mut words = vec![0u64; size_of::<vfio_region_info>() / 8];
        let mut info = self.ask_region(index, &mut words)?;
        let needed = (info.argsz as usize).min(MAX_REGION_INFO_BYTES);
        if needed > words.len() * 8 {
            words = vec![0; needed.div_ceil(8)];
            info = self.ask_region(index, &mut words)?;
        }
        let mappable = info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let sparse = (info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0)
            .then(|| sparse_areas(&bytes, info.cap_offset as usize))
            .flatten();
        let areas = match (mappable, sparse) {
            (false, _) => Vec::new(),
            (true, Some(areas)) => areas,
            (true, None) => vec![Area { start: 0, end: info.size }],
        };
        Ok(HostRegion { offset: info.offset, size: info.size, areas })
    }

    fn ask_region(&self, index: u32, words: &mut [u64]) -> io::Result<vfio_region_info> {
        let asked =
            vfio_region_info { argsz: (words.len() * 8) as u32, index, ..Default::default() };
        // SAFETY: `words` has room for the structure, is aligned as it is, and is as large as
        // `argsz` says; every bit pattern is a valid structure.
        unsafe {
            words.as_mut_ptr().cast::<vfio_region_info>().write(asked);
            answer(libc::ioctl(self.file.as_raw_fd(), DEVICE_GET_REGION_INFO, words.as_mut_ptr()))?;
            Ok(words.as_ptr().cast::<vfio_region_info>().read())
        }
    }

    /// How many interrupts of the kind the function has.
    pub fn vectors(&self, kind: Interrupts) -> u32 {
        self.vectors[kind as usize]
    }

    /// Reads configuration space as the host shows it.
    ///
    /// # Errors
    /// The host does not answer.
    pub fn read_config(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.config_offset + u64::from(offset))
    }

    /// Writes configuration space, of which the host lets through what is safe for it.
    ///
    /// # Errors
    /// The host refuses.
    pub fn write_config(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.config_offset + u64::from(offset))
    }

    /// Maps a part of the function's memory. Nothing is read or written by that.
    ///
    /// # Errors
    /// The host refuses.
    pub fn map(&self, region_offset: u64, area: Area) -> io::Result<DeviceMemory> {
        let bytes = usize::try_from(area.end - area.start).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(region_offset + area.start).map_err(io::Error::other)?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                self.file.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(DeviceMemory { start: start as usize, bytes })
    }
}

impl super::function::Host for HostFunction {
    fn write_config(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        Self::write_config(self, offset, data)
    }

    fn read_region(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    fn write_region(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn reset(&self) -> io::Result<()> {
        Self::reset(self)
    }

    /// `struct vfio_irq_set`, followed by a descriptor for each vector.
    fn set_interrupts(&self, kind: Interrupts, events: &[Arc<EventFd>]) -> io::Result<()> {
        let data =
            if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
        let count = events.len() as u32;
        let header = [
            (5 + count) * 4,
            data | VFIO_IRQ_SET_ACTION_TRIGGER,
            kind as u32,
            0, // The first of them.
            count,
        ];
        let descriptors = events.iter().map(|event| event.as_raw_fd().cast_unsigned());
        let words: Vec<u32> = header.into_iter().chain(descriptors).collect();
        // SAFETY: the array has the structure's layout, all of whose fields are 32 bits wide, and
        // is as large as its first field says. The kernel takes references of its own.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), DEVICE_SET_IRQS, words.as_ptr()) })
    }
}

/// The areas of a `vfio_region_info_cap_sparse_mmap` among the capabilities in `bytes`.
fn sparse_areas(bytes: &[u8], first: usize) -> Option<Vec<Area>> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let mut at = first;
    // Each header has 8 bytes, so there are no more of them than that.
    for _ in 0..bytes.len() / 8 {
        if at == 0 {
            return None;
        }
        // Id and version in one word.
        if u32_at(at)? & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = u32_at(at + 8)? as usize;
            return (0..count.min(bytes.len() / 16))
                .map(|index| {
                    let (start, size) =
                        (u64_at(at + 16 + index * 16)?, u64_at(at + 24 + index * 16)?);
                    Some(Area { start, end: start.checked_add(size)? })
                })
                .collect();
        }
        at = u32_at(at + 4)? as usize;
    }
    None
}

/// A mapping of a function's memory, unmapped when dropped.
#[derive(Debug)]
pub struct DeviceMemory {
    start: usize,
    bytes: usize,
}

impl DeviceMemory {
    /// Where it begins in this process.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's, and nothing here ever reads or writes it; whoever
        // gives it to KVM keeps the object for as long as KVM may use it.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
    }
}

/// Why a function of the host cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum HostFunctionError {
    /// The host refused.
    #[error("the function does not {action}: {error}")]
    Refused {
        /// What was asked of it.
        action: &'static str,
        /// The host's answer.
        error: io::Error,
    },
    /// The descriptor is of another kind.
    #[error("the descriptor is that of no PCI function; give one of VFIO's for PCI")]
    NotPci,
    /// It would carry what one guest left in it to the next.
    #[error("the function cannot be reset; pass one that can, such as a virtual function")]
    NoReset,
}

fn refused(action: &'static str) -> impl FnOnce(io::Error) -> HostFunctionError {
    move |error| HostFunctionError::Refused { action, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(id: u16, next: u32, rest: &[u64]) -> Vec<u8> {
        let mut bytes = [id.to_ne_bytes(), 1u16.to_ne_bytes()].concat();
        bytes.extend(next.to_ne_bytes());
        bytes.extend(rest.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn sparse_areas_are_found_behind_another_capability() {
        let mut bytes = vec![0; 32];
        bytes.extend(capability(3, 40, &[]));
        bytes.extend(capability(1, 0, &[2, 0x1000, 0x1000, 0x4000, 0x2000]));
        let areas = sparse_areas(&bytes, 32).unwrap();
        assert_eq!(
            areas,
            [Area { start: 0x1000, end: 0x2000 }, Area { start: 0x4000, end: 0x6000 }]
        );
    }

    #[test]
    fn capabilities_that_lead_nowhere_are_no_areas() {
        assert_eq!(sparse_areas(&[0; 32], 0), None);
        assert_eq!(sparse_areas(&[0; 32], 4096), None);
        // One that names itself as the next.
        assert_eq!(sparse_areas(&capability(3, 8, &[8 << 32 | 3]), 8), None);
        // More areas than there are bytes.
        assert_eq!(sparse_areas(&capability(1, 0, &[1000, 0, 0x1000]), 0), None);
        let mut cut = vec![0; 8];
        cut.extend(capability(1, 0, &[1000, 0, 0x1000]));
        assert_eq!(sparse_areas(&cut, 8), None);
    }

    #[test]
    fn structures_of_iommufd_are_the_kernels() {
        // linux/vfio.h. The last word of the first two is one that older kernels do not read.
        assert_eq!(size::<vfio_device_attach_iommufd_pt>(), 16);
        assert_eq!(size::<vfio_device_detach_iommufd_pt>(), 12);
        assert_eq!(std::mem::offset_of!(vfio_device_attach_iommufd_pt, pt_id), 8);
        assert_eq!((DEVICE_ATTACH_IOMMUFD_PT, DEVICE_DETACH_IOMMUFD_PT), (0x3b77, 0x3b78));
    }

    #[test]
    fn function_that_is_bound_to_no_iommufd_is_not_attached() {
        let file = FunctionFile(Arc::new(tempfile::tempfile().unwrap()));
        assert_eq!(file.attach(1).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(file.detach().unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn descriptor_of_another_kind_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = HostFunction::new(file.into()).unwrap_err();
        assert!(matches!(error, HostFunctionError::Refused { .. }), "{error}");
    }
}

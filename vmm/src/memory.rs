//! The guest's memory: where it lies in the guest's physical address space, and its mapping.
//!
//! Saved memory is mapped at multiples of a huge page, in file, process and guest alike, so that what the file has in
//! huge pages, the guest has too ([`gather`]).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;
use std::sync::Arc;

use vial_vmm_api::{HugePages, Placement};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use crate::arch::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::devices::mem::Room;
use crate::numa::{self, NumaError};

/// The guest's memory. Cloning it is cheap: all clones are the same memory.
pub type GuestRam = GuestMemoryMmap<()>;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error(
        "map {bytes} bytes of guest memory: {reason}; give the pod less memory or the node more"
    )]
    Map {
        /// The mapping's size.
        bytes: u64,
        /// What the host said.
        reason: String,
    },
    /// The host has too few huge pages.
    #[error(
        "map {mib} MiB of guest memory in pages of {page_mib} MiB: {reason}; reserve more of them \
         (/sys/kernel/mm/hugepages/*/nr_hugepages), or give the pod less memory"
    )]
    MapHuge {
        /// The mapping's size.
        mib: u64,
        /// A page's.
        page_mib: u32,
        /// What the host said.
        reason: String,
    },
    /// It is not where it should be.
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// The file ends before the memory does.
    #[error("map {bytes} bytes of saved guest memory: the file has {file_bytes}; make it again")]
    Short {
        /// What is needed.
        bytes: u64,
        /// What there is.
        file_bytes: u64,
    },
    /// The file cannot be asked.
    #[error("map saved guest memory: {0}")]
    File(std::io::Error),
    /// The ranges overlap, which means the layout is wrong.
    #[error("lay out guest memory: {0}")]
    Layout(String),
}

/// The ranges of RAM for a size, as start and length: below the 32-bit hole, and what does not
/// fit there above 4 GiB.
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let high = bytes - low;
    let mut ranges = vec![(GuestAddress(0), low)];
    if high > 0 {
        ranges.push((GuestAddress(HIGH_RAM_START), high));
    }
    ranges
}

/// Maps anonymous private memory for each range. Nothing is touched, so nothing is allocated.
///
/// # Errors
/// The host refuses the mapping.
pub fn map_ram(bytes: u64) -> Result<GuestRam, MemoryError> {
    from_regions(map(bytes, &Backing::Anonymous, None)?)
}

/// As [`map_ram`], from where the placement says. Huge pages are taken at once.
///
/// # Errors
/// The host refuses the mapping, a node, or so many huge pages.
pub fn map_placed(bytes: u64, placement: &Placement) -> Result<GuestRam, MemoryError> {
    let ram = from_regions(map(bytes, &Backing::Anonymous, placement.huge_pages)?)?;
    numa::place(&ram, placement)?;
    Ok(ram)
}

/// As [`map_placed`], in `file`, which others map as well. It is as long as the guest's memory, and
/// nobody can make it shorter.
///
/// # Errors
/// As [`map_placed`], or the file is too short.
pub fn map_shared(bytes: u64, placement: &Placement, file: File) -> Result<GuestRam, MemoryError> {
    let file = Backing::Shared(long_enough(bytes, file)?);
    let ram = from_regions(map(bytes, &file, placement.huge_pages)?)?;
    numa::place(&ram, placement)?;
    Ok(ram)
}

/// Maps `file`, which holds the ranges one behind the other, for this machine alone: what the
/// guest does not write, it shares with all others that have mapped the file. The file is as long
/// as the guest's memory, or longer, and has to stay so. What is present of `room`, or may come to
/// be, `most` bytes of it, comes on top, and is as empty as that of [`map_ram`].
///
/// What is not present yet is in no slot of KVM's, so no vCPU reaches it. A driver that names it to a
/// device has it written: what that takes counts for the VMM's cgroup, as all of its memory does.
///
/// # Errors
/// The file is too short, or the host refuses the mapping.
pub fn map_saved_ram(
    bytes: u64,
    file: File,
    room: Room,
    most: u64,
) -> Result<GuestRam, MemoryError> {
    let mut regions = map(bytes, &Backing::Saved(long_enough(bytes, file)?), None)?;
    let most = most.min(room.bytes).max(room.present);
    if most > 0 {
        let range = (GuestAddress(room.start), most);
        regions.push(map_range(range, &Backing::Anonymous, 0, None)?);
    }
    from_regions(regions)
}

/// A page behind the file's end would end the VMM when the guest touches it.
fn long_enough(bytes: u64, file: File) -> Result<Arc<File>, MemoryError> {
    let file_bytes = file.metadata().map_err(MemoryError::File)?.len();
    if file_bytes < bytes {
        return Err(MemoryError::Short { bytes, file_bytes });
    }
    Ok(Arc::new(file))
}

/// Bytes of a huge page, as a table of the processor's maps it.
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const PAGE_BYTES: usize = 4096;
/// A huge page is worth its memory when so many of its pages are more than zeros.
const GATHERED_FROM: usize = HUGE_PAGE_BYTES as usize / PAGE_BYTES * 3 / 4;

/// Asks the kernel to keep a file of saved memory in huge pages, where most of one is more than zeros. What a guest only
/// reads, its kernel's code above all, then takes it one fault for 512 pages. Returns for how many the kernel did it: none
/// on a file system that cannot (a tmpfs can, and others with CONFIG_READ_ONLY_THP_FOR_FS).
///
/// # Errors
/// The file cannot be read or mapped.
pub fn gather(file: &File) -> io::Result<u32> {
    let bytes = file.metadata()?.len() / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if bytes == 0 {
        return Ok(0);
    }
    let start = map_at_huge_page(file, 0, bytes, libc::PROT_READ, libc::MAP_SHARED)?;
    let mut gathered = 0;
    for at in (0..bytes).step_by(HUGE_PAGE_BYTES as usize) {
        if used_pages(file, at)? < GATHERED_FROM {
            continue;
        }
        // SAFETY: the range is of the mapping above, which nothing else knows.
        let result = unsafe {
            let page = start.add(at as usize).cast();
            libc::madvise(page, HUGE_PAGE_BYTES as usize, libc::MADV_COLLAPSE)
        };
        gathered += u32::from(result == 0);
    }
    // SAFETY: as above; nothing points into it any more.
    unsafe { libc::munmap(start.cast(), bytes as usize) };
    Ok(gathered)
}

/// How many pages of a huge page are more than zeros.
fn used_pages(file: &File, at: u64) -> io::Result<usize> {
    let mut used = 0;
    let mut page = [0; PAGE_BYTES];
    for offset in (at..at + HUGE_PAGE_BYTES).step_by(PAGE_BYTES) {
        file.read_exact_at(&mut page, offset)?;
        used += usize::from(page != [0; PAGE_BYTES]);
    }
    Ok(used)
}

/// Maps a part of a file where `offset` and the address are the same distance behind a multiple of a huge page.
fn map_at_huge_page(
    file: &impl AsFd,
    offset: u64,
    bytes: u64,
    protection: libc::c_int,
    flags: libc::c_int,
) -> io::Result<*mut u8> {
    let too_large = || io::Error::from_raw_os_error(libc::ENOMEM);
    let length = usize::try_from(bytes).map_err(|_| too_large())?;
    let huge = HUGE_PAGE_BYTES as usize;
    let reserved = length.checked_add(2 * huge).ok_or_else(too_large)?;
    let checked = |at: *mut libc::c_void| match at {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        at => Ok(at.cast::<u8>()),
    };
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let position = libc::off_t::try_from(offset).map_err(|_| too_large())?;
    // SAFETY: the kernel chooses addresses that nobody uses; what is mapped over them, and taken from both of their ends,
    // stays within them.
    unsafe {
        let start = checked(libc::mmap(null_mut(), reserved, libc::PROT_NONE, nothing, -1, 0))?;
        let before = (start as usize).wrapping_neg() % huge + (offset % HUGE_PAGE_BYTES) as usize;
        let at = start.add(before).cast();
        let descriptor = file.as_fd().as_raw_fd();
        let flags = flags | libc::MAP_FIXED;
        let mapped = checked(libc::mmap(at, length, protection, flags, descriptor, position));
        if mapped.is_err() {
            libc::munmap(start.cast(), reserved);
            return mapped;
        }
        let end = before + length.next_multiple_of(PAGE_BYTES);
        libc::munmap(start.cast(), before);
        libc::munmap(start.add(end).cast(), reserved - end);
        mapped
    }
}

/// What memory is mapped from.
enum Backing {
    /// Nothing.
    Anonymous,
    /// A file that stays as it is.
    Saved(Arc<File>),
    /// A file that the guest writes, and others too.
    Shared(Arc<File>),
}

/// Gives memory back to the host, which the guest then finds full of zeros.
///
/// # Errors
/// It is no memory of the guest's, or the host refuses.
pub fn discard(ram: &GuestRam, range: Range<u64>) -> io::Result<()> {
    let bytes = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
    let slice = ram.get_slice(GuestAddress(range.start), bytes).map_err(io::Error::other)?;
    // SAFETY: the range is a mapping of guest memory, which is only ever accessed as memory that
    // may change at any moment; it stays mapped.
    let result =
        unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn from_regions(regions: Vec<GuestRegionMmap>) -> Result<GuestRam, MemoryError> {
    GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Layout(error.to_string()))
}

fn map(
    bytes: u64,
    backing: &Backing,
    huge_pages: Option<HugePages>,
) -> Result<Vec<GuestRegionMmap>, MemoryError> {
    let mut offset = 0;
    ram_ranges(bytes)
        .into_iter()
        .map(|range| {
            let start = offset;
            offset += range.1;
            map_range(range, backing, start, huge_pages)
        })
        .collect()
}

/// Maps a part of what there is, from `offset` of a file on.
fn map_range(
    (start, length): (GuestAddress, u64),
    backing: &Backing,
    offset: u64,
    huge_pages: Option<HugePages>,
) -> Result<GuestRegionMmap, MemoryError> {
    let (file, kind) = match backing {
        Backing::Anonymous => (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        Backing::Saved(file) => return map_saved((start, length), file, offset),
        Backing::Shared(file) => (Some(file), libc::MAP_SHARED),
    };
    let file = file.map(|file| FileOffset::from_arc(file.clone(), offset));
    // Huge pages are reserved with the mapping, so that another process cannot take them away.
    let pages = match huge_pages {
        None => libc::MAP_NORESERVE,
        // The file's pages are what they are.
        Some(_) if file.is_some() => 0,
        Some(HugePages::Mib2) => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        Some(HugePages::Gib1) => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
    };
    let refused = |reason: String| match huge_pages {
        None => MemoryError::Map { bytes: length, reason },
        Some(pages) => {
            let (mib, page_mib) = (length >> 20, pages.mib());
            MemoryError::MapHuge { mib, page_mib, reason }
        }
    };
    let size = usize::try_from(length).map_err(|error| refused(error.to_string()))?;
    let mapping = MmapRegion::build(file, size, libc::PROT_READ | libc::PROT_WRITE, pages | kind)
        .map_err(|error| refused(error.to_string()))?;
    region(mapping, start)
}

/// Maps a part of saved memory. It stays mapped for as long as the process lives, as the machine does.
fn map_saved(
    (start, length): (GuestAddress, u64),
    file: &Arc<File>,
    offset: u64,
) -> Result<GuestRegionMmap, MemoryError> {
    let refused = |reason: String| MemoryError::Map { bytes: length, reason };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let at = map_at_huge_page(file, offset, length, protection, flags)
        .map_err(|error| refused(error.to_string()))?;
    let size = usize::try_from(length).map_err(|error| refused(error.to_string()))?;
    // SAFETY: that is the mapping that was just made, which nobody else has, and nobody unmaps.
    let mapping = unsafe { MmapRegion::build_raw(at, size, protection, flags) }
        .map_err(|error| refused(error.to_string()))?;
    region(mapping, start)
}

fn region(mapping: MmapRegion, start: GuestAddress) -> Result<GuestRegionMmap, MemoryError> {
    GuestRegionMmap::new(mapping, start)
        .ok_or_else(|| MemoryError::Layout(format!("the range at {:#x}", start.0)))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_over_the_hole_continues_at_four_gib() {
        assert_eq!(ram_ranges(128 << 20), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ram_ranges(LOW_RAM_END), [(GuestAddress(0), LOW_RAM_END)]);
        assert_eq!(
            ram_ranges(64 << 30),
            [
                (GuestAddress(0), LOW_RAM_END),
                (GuestAddress(HIGH_RAM_START), (64 << 30) - LOW_RAM_END)
            ]
        );
    }

    #[test]
    fn saved_memory_lies_as_its_file_does_and_huge_pages_change_no_byte() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(7 << 20).unwrap();
        // All of the second huge page, little of the first, none of the third, and half of one at the end.
        for page in 512..1024u64 {
            file.write_all_at(&page.to_le_bytes().repeat(512), page * 4096).unwrap();
        }
        file.write_all_at(b"little", 4096).unwrap();
        file.write_all_at(b"end", (7 << 20) - 3).unwrap();
        assert_eq!(used_pages(&file, 0).unwrap(), 1);
        assert_eq!(used_pages(&file, 2 << 20).unwrap(), 512);
        let gathered = gather(&file).unwrap();
        assert!(gathered <= 1, "{gathered}");
        let none = Room { start: 4 << 30, bytes: 1 << 30, present: 0 };
        let ram = map_saved_ram(7 << 20, file.try_clone().unwrap(), none, 0).unwrap();
        let at = ram.get_host_address(GuestAddress(0)).unwrap() as u64;
        assert!(at.is_multiple_of(HUGE_PAGE_BYTES), "{at:#x}");
        ram.write_slice(b"own", GuestAddress(0x20_0000)).unwrap();
        let mut page = [0; 8];
        for number in [513, 700, 1023u64] {
            ram.read_slice(&mut page, GuestAddress(number * 4096)).unwrap();
            assert_eq!(u64::from_le_bytes(page), number);
        }
        ram.read_slice(&mut page[..3], GuestAddress((7 << 20) - 3)).unwrap();
        assert_eq!(&page[..3], b"end");
        file.read_exact_at(&mut page, 0x20_0000).unwrap();
        assert_eq!(u64::from_le_bytes(page), 512, "a guest's write has reached the template");
        assert_eq!(gather(&tempfile::tempfile().unwrap()).unwrap(), 0);
    }

    #[test]
    fn memory_that_is_not_there_is_not_discarded() {
        let ram = map_ram(32 << 20).unwrap();
        discard(&ram, 0..32 << 20).unwrap();
        for range in [0..33 << 20, 32 << 20..34 << 20, 0..u64::MAX] {
            assert!(discard(&ram, range.clone()).is_err(), "{range:?}");
        }
    }
}

//! The guest's memory: where it lies in the guest's physical address space, and its mapping.
//!
//! Saved memory is mapped at multiples of a huge page, in file, process and guest alike, so that what the file has in
//! huge pages, the guest has too ([`gather`]).
#![allow(unsafe_code)]

mod huge;
pub mod image;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use vial_vmm_api::{HugePages, Placement};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

pub use self::huge::{HUGE_PAGE_BYTES, gather, keep_small, write_pages};
pub use self::image::{Image, ImageError};
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
/// With the file come the numbers of its huge pages that are `empty`. They are not mapped from it: a page that a guest writes
/// there would be one of the file's as well, which in memory stays when the guest has gone.
///
/// What is not present yet is in no slot of KVM's, so no vCPU reaches it. A driver that names it to a
/// device has it written: what that takes counts for the VMM's cgroup, as all of its memory does.
///
/// # Errors
/// The file is too short, or the host refuses the mapping.
pub fn map_saved_ram(
    bytes: u64,
    (file, empty): (File, &[u32]),
    room: Room,
    most: u64,
) -> Result<GuestRam, MemoryError> {
    let mut regions = map(bytes, &Backing::Saved(long_enough(bytes, file)?), None)?;
    let in_file = ram_ranges(bytes).into_iter().zip(&regions);
    huge::leave_empty(in_file.map(|((_, length), region)| (length, region.as_ptr())), empty)
        .map_err(|error| MemoryError::Map { bytes, reason: error.to_string() })?;
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

/// What memory is mapped from.
enum Backing {
    /// Nothing.
    Anonymous,
    /// A file that stays as it is.
    Saved(Arc<File>),
    /// A file that the guest writes, and others too.
    Shared(Arc<File>),
}

/// The size of the host's pages, those that are not huge.
const PAGE_BYTES: u64 = 4096;

/// By which guest memory goes back to the host, while nobody holds it. Cloning it is cheap: all clones
/// are the same.
///
/// Functions of the host hold it: the IOMMU leads them to the pages that were the guest's when they
/// came, and in place of one that was given back the guest gets another.
#[derive(Debug, Clone, Default)]
pub struct Discards {
    holders: Arc<RwLock<usize>>,
}

/// For as long as it lives, no guest memory goes back to the host.
#[derive(Debug)]
pub struct Hold(Discards);

impl Discards {
    /// Lets nothing go back any more. What is on its way has gone when this returns.
    pub fn hold(&self) -> Hold {
        *self.holders.write().unwrap_or_else(PoisonError::into_inner) += 1;
        Hold(self.clone())
    }

    /// Gives the whole pages of a range back to the host, unless the memory is held. The guest then
    /// finds there what a private mapping has that was never written: zeros, or what was saved.
    ///
    /// # Errors
    /// It is no memory of the guest's, or the host refuses.
    pub fn discard(&self, ram: &GuestRam, range: Range<u64>) -> io::Result<()> {
        let holders = self.holders.read().unwrap_or_else(PoisonError::into_inner);
        if *holders > 0 { Ok(()) } else { discard(ram, range) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        *self.0.holders.write().unwrap_or_else(PoisonError::into_inner) -= 1;
    }
}

/// A page of which a part is not in the range stays.
fn discard(ram: &GuestRam, range: Range<u64>) -> io::Result<()> {
    let last = range.end / PAGE_BYTES * PAGE_BYTES;
    let Some(first) = range.start.checked_next_multiple_of(PAGE_BYTES).filter(|at| *at < last)
    else {
        return Ok(());
    };
    let bytes = usize::try_from(last - first).map_err(io::Error::other)?;
    let slice = ram.get_slice(GuestAddress(first), bytes).map_err(io::Error::other)?;
    // SAFETY: the range is a mapping of guest memory, which is only ever accessed as memory that
    // may change at any moment; it stays mapped. Mappings begin at pages' starts on either side, so
    // what is whole pages for the guest is so here.
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
    let at = huge::map(file, offset, length, protection, flags)
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
    fn memory_that_is_not_there_is_not_discarded() {
        let (ram, discards) = (map_ram(32 << 20).unwrap(), Discards::default());
        discards.discard(&ram, 0..32 << 20).unwrap();
        for range in [0..33 << 20, 32 << 20..34 << 20, 0..u64::MAX] {
            assert!(discards.discard(&ram, range.clone()).is_err(), "{range:?}");
        }
    }

    const PAGE: u64 = PAGE_BYTES;

    fn write(ram: &GuestRam, page: u64, text: &[u8; 4]) {
        ram.write_slice(text, GuestAddress(page * PAGE)).unwrap();
    }

    fn read(ram: &GuestRam, page: u64) -> [u8; 4] {
        ram.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    #[test]
    fn pages_of_which_a_part_is_named_stay() {
        let (ram, discards) = (map_ram(32 << 20).unwrap(), Discards::default());
        (0..6).for_each(|page| write(&ram, page, b"here"));
        // Each but the last names less than a page; some end before they begin.
        let empty = Range { start: 3 * PAGE, end: 2 * PAGE };
        for range in [1..PAGE, PAGE + 1..2 * PAGE + PAGE - 1, 0..0, empty, PAGE - 1..PAGE + 1] {
            discards.discard(&ram, range).unwrap();
        }
        discards.discard(&ram, u64::MAX - 1..u64::MAX).unwrap();
        assert!((0..6).all(|page| read(&ram, page) == *b"here"));
        discards.discard(&ram, PAGE + 1..5 * PAGE - 1).unwrap();
        let left = [0, 1, 2, 3, 4, 5].map(|page| read(&ram, page) == *b"here");
        assert_eq!(left, [true, true, false, false, true, true]);
    }

    #[test]
    fn memory_of_a_saved_machine_is_as_it_was_saved() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"base", PAGE).unwrap();
        let none = Room { start: HIGH_RAM_START, bytes: 1 << 30, present: 2 << 20 };
        let ram = map_saved_ram(32 << 20, (file, &[]), none, 0).unwrap();
        let grown = HIGH_RAM_START / PAGE;
        for page in [1, grown] {
            write(&ram, page, b"mine");
            Discards::default().discard(&ram, page * PAGE..(page + 1) * PAGE).unwrap();
        }
        assert_eq!((read(&ram, 1), read(&ram, grown)), (*b"base", [0; 4]));
    }

    #[test]
    fn nothing_is_discarded_while_somebody_holds_it() {
        let (ram, discards) = (map_ram(32 << 20).unwrap(), Discards::default());
        write(&ram, 1, b"held");
        let holds = [discards.hold(), discards.clone().hold()];
        for hold in holds {
            discards.discard(&ram, 0..2 * PAGE).unwrap();
            assert_eq!(read(&ram, 1), *b"held");
            drop(hold);
        }
        discards.discard(&ram, 0..2 * PAGE).unwrap();
        assert_eq!(read(&ram, 1), [0; 4]);
    }

    #[test]
    fn hold_waits_for_what_is_on_its_way() {
        let discards = Discards::default();
        let on_its_way = discards.holders.read().unwrap();
        std::thread::scope(|scope| {
            let held = scope.spawn(|| discards.hold());
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!held.is_finished());
            drop(on_its_way);
            held.join().unwrap();
        });
    }
}

//! Where a kernel's file goes in memory, so that what little lies alone there takes no huge page.
//!
//! The text that Linux shows user processes has a huge page for itself, and fills few pages of it; a kernel's file that
//! leaves the padding out (`kernel-config/arrange`) then has a huge page's worth of memory cleared for them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use vm_memory::ByteValued;

use crate::memory::HUGE_PAGE_BYTES;

/// With no more of it from the file, a huge page inside of a kernel is not worth being one: 64 pages, each brought in by
/// itself, cost a fifth of what it takes to clear it.
const SPARSE_BYTES: u64 = HUGE_PAGE_BYTES / 8;

/// A segment that is memory (System V ABI, "Program Header").
const TYPE_LOAD: u32 = 1;

/// The physical addresses of what a kernel's file has for memory, as its headers say. They may say anything: whether it is
/// an ELF file, and fits, is found out when it is loaded.
///
/// # Errors
/// The file ends in its headers, or cannot be read.
pub(super) fn read(kernel: &File) -> io::Result<Vec<Range<u64>>> {
    let mut header = Elf64_Ehdr::default();
    kernel.read_exact_at(header.as_mut_slice(), 0)?;
    let mut segments = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    let mut at = header.e_phoff;
    for segment in &mut segments {
        kernel.read_exact_at(segment.as_mut_slice(), at)?;
        at = at.saturating_add(size_of::<Elf64_Phdr>() as u64);
    }
    let in_memory = |segment: &Elf64_Phdr| {
        let end = segment.p_paddr.checked_add(segment.p_filesz)?;
        (segment.p_type == TYPE_LOAD && segment.p_paddr < end).then_some(segment.p_paddr..end)
    };
    Ok(segments.iter().filter_map(in_memory).collect())
}

/// The huge pages below `ram_end` in which little of a kernel's file lies while more of it lies before and behind. What
/// follows its end there is the guest's to use, as much of it as it likes.
pub(super) fn sparse(segments: &[Range<u64>], ram_end: u64) -> Vec<u64> {
    let mut filled = BTreeMap::<u64, u64>::new();
    for segment in segments.iter().filter(|segment| segment.end <= ram_end) {
        let mut at = segment.start;
        while at < segment.end {
            let page = at / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
            let end = segment.end.min(page + HUGE_PAGE_BYTES);
            *filled.entry(page).or_default() += end - at;
            at = end;
        }
    }
    let ends = filled.keys().next().copied().zip(filled.keys().last().copied());
    let inside = |page: u64| ends.is_some_and(|(first, last)| first < page && page < last);
    let little =
        |(page, bytes): (&u64, &u64)| (inside(*page) && *bytes <= SPARSE_BYTES).then_some(*page);
    filled.iter().filter_map(little).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn pages_with_little_in_them_are_found_between_those_with_more() {
        // As Vial's kernel has it: text, the entry's two pages and one, constants, data.
        let kernel = [
            16 * MIB..24 * MIB - 0x31000,
            24 * MIB..24 * MIB + 0x2000,
            25 * MIB + 0x4000..25 * MIB + 0x5000,
            26 * MIB..27 * MIB + 0x24000,
            28 * MIB..29 * MIB,
        ];
        assert_eq!(sparse(&kernel, 128 * MIB), [24 * MIB]);
        // At its ends, the rest of a huge page is the guest's.
        assert_eq!(sparse(&kernel[1..], 128 * MIB), [0; 0]);
        assert_eq!(sparse(&kernel[..3], 128 * MIB), [0; 0]);
        // What lies behind the memory is not loaded.
        assert_eq!(sparse(&kernel, 26 * MIB), [0; 0]);
        assert_eq!(sparse(&[], 128 * MIB), [0; 0]);
    }

    #[test]
    fn headers_that_lie_are_read_within_the_file() {
        let file = tempfile::tempfile().unwrap();
        assert!(read(&file).is_err());
        let header = |e_phoff, e_phnum| Elf64_Ehdr { e_phoff, e_phnum, ..Default::default() };
        for (place, count) in [(64, u16::MAX), (u64::MAX, 1), (64, 3)] {
            file.write_all_at(header(place, count).as_slice(), 0).unwrap();
            assert!(read(&file).is_err(), "{place} {count}");
        }
        // The first wraps, the second has nothing, the third is no memory.
        let segment = |p_type, p_paddr, p_filesz| Elf64_Phdr {
            p_type,
            p_paddr,
            p_filesz,
            ..Default::default()
        };
        let segments = [
            segment(TYPE_LOAD, u64::MAX, 2),
            segment(TYPE_LOAD, MIB, 0),
            segment(TYPE_LOAD + 1, MIB, MIB),
            segment(TYPE_LOAD, 2 * MIB, MIB),
            segment(TYPE_LOAD, 4 * MIB, 1),
        ];
        for (place, segment) in (64..).step_by(size_of::<Elf64_Phdr>()).zip(segments) {
            file.write_all_at(segment.as_slice(), place).unwrap();
        }
        file.write_all_at(header(64, 5).as_slice(), 0).unwrap();
        assert_eq!(read(&file).unwrap(), [2 * MIB..3 * MIB, 4 * MIB..4 * MIB + 1]);
    }

    proptest! {
        #[test]
        fn sparse_pages_are_memory_and_hold_little(
            segments in prop::collection::vec((0..64 * MIB, 1..4 * MIB), 0..12),
        ) {
            let segments: Vec<_> =
                segments.into_iter().map(|(start, length)| start..start + length).collect();
            for page in sparse(&segments, 64 * MIB) {
                prop_assert!(page % HUGE_PAGE_BYTES == 0 && page + HUGE_PAGE_BYTES <= 64 * MIB);
                let within = segments.iter().filter(|segment| segment.end <= 64 * MIB).map(|segment| {
                    let end = segment.end.min(page + HUGE_PAGE_BYTES);
                    end.saturating_sub(segment.start.max(page))
                });
                prop_assert!((1..=SPARSE_BYTES).contains(&within.sum::<u64>()));
            }
        }
    }
}

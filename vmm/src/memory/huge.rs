//! Files of saved memory in huge pages.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;

use vm_memory::{GuestAddress, GuestMemory};

use super::GuestRam;

/// Bytes of a huge page, as a table of the processor's maps it.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
const PAGE_BYTES: usize = 4096;
/// A huge page is worth its memory when so many of its pages are more than zeros.
const GATHERED_FROM: u16 = (HUGE_PAGE_BYTES as usize / PAGE_BYTES * 3 / 4) as u16;

/// Asks the kernel to keep a file of saved memory in huge pages, where most of one is more than zeros: `used` tells of each, in
/// order, how many of its pages are. What a guest only reads, its kernel's code above all, then takes it one fault for 512
/// pages. Returns for how many the kernel did it: none on a file system that cannot (a tmpfs can, and others with
/// CONFIG_READ_ONLY_THP_FOR_FS).
///
/// # Errors
/// The file cannot be mapped.
pub fn gather(file: &File, used: &[u16]) -> io::Result<u32> {
    let bytes = used.len() as u64 * HUGE_PAGE_BYTES;
    if bytes == 0 {
        return Ok(0);
    }
    let start = map(file, 0, bytes, libc::PROT_READ, libc::MAP_SHARED)?;
    let mut gathered = 0;
    for (number, _) in used.iter().enumerate().filter(|(_, pages)| **pages >= GATHERED_FROM) {
        // SAFETY: the range is of the mapping above, which nothing else knows.
        let result = unsafe {
            let page = start.add(number * HUGE_PAGE_BYTES as usize).cast();
            libc::madvise(page, HUGE_PAGE_BYTES as usize, libc::MADV_COLLAPSE)
        };
        gathered += u32::from(result == 0);
    }
    // SAFETY: as above; nothing points into it any more.
    unsafe { libc::munmap(start.cast(), bytes as usize) };
    Ok(gathered)
}

/// Asks the kernel to bring in the huge page of guest memory that begins at `start` by pages of the usual size, as they are
/// touched. Of memory that is in huge pages whatever the kernel is asked (hugetlbfs), or on a kernel that knows none, it is
/// no more than asked.
pub fn keep_small(ram: &GuestRam, start: u64) {
    let bytes = HUGE_PAGE_BYTES as usize;
    if let Ok(slice) = ram.get_slice(GuestAddress(start), bytes) {
        let at = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the range is a mapping of guest memory, and what is in it stays as it is.
        unsafe { libc::madvise(at, bytes, libc::MADV_NOHUGEPAGE) };
    }
}

/// Writes `bytes` bytes into a file from `offset` on, page by page as `read` has them by their place behind that, and leaves holes
/// for pages of zeros. `used` is, for each huge page of the file, how many of its pages are more than that; what is behind its
/// end is not counted.
///
/// # Errors
/// The host's, of writing, and those of `read`.
pub fn write_pages(
    file: &File,
    offset: u64,
    bytes: u64,
    used: &mut [u16],
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut page = [0; PAGE_BYTES];
    for at in (0..bytes).step_by(PAGE_BYTES) {
        read(at, &mut page)?;
        if page != [0; PAGE_BYTES] {
            file.write_all_at(&page, offset + at)?;
            let huge = used.get_mut(((offset + at) / HUGE_PAGE_BYTES) as usize);
            huge.into_iter().for_each(|pages| *pages += 1);
        }
    }
    Ok(())
}

/// Maps nothing but zeros in place of huge pages of a file, by their numbers, in the mappings of the file, one behind the
/// other: how long each is, and where. They are taken in pages of the usual size, since a guest writes few of them.
///
/// # Errors
/// There is no such page in one mapping, or the host refuses.
pub(super) fn leave_empty(
    mappings: impl Iterator<Item = (u64, *mut u8)>,
    empty: &[u32],
) -> io::Result<()> {
    let mut numbers = empty.iter().copied().map(u64::from).peekable();
    let mut offset = 0;
    for (length, start) in mappings {
        while let Some(first) =
            numbers.next_if(|number| (number + 1) * HUGE_PAGE_BYTES <= offset + length)
        {
            let mut last = first;
            while let Some(next) = numbers.next_if(|number| {
                *number == last + 1 && (number + 1) * HUGE_PAGE_BYTES <= offset + length
            }) {
                last = next;
            }
            let at = (first * HUGE_PAGE_BYTES).checked_sub(offset);
            let at = at.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            map_zeros(start, at, (last + 1 - first) * HUGE_PAGE_BYTES)?;
        }
        offset += length;
    }
    match numbers.next() {
        None => Ok(()),
        Some(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// Maps zeros over a part of the mapping that begins at `start`, which has it.
fn map_zeros(start: *mut u8, at: u64, bytes: u64) -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the caller's mapping has the range, and holds there what is replaced by the same: zeros.
    let result = unsafe {
        let place = start.add(at as usize).cast();
        match libc::mmap(place, bytes as usize, protection, flags, -1, 0) {
            libc::MAP_FAILED => -1,
            _ => libc::madvise(place, bytes as usize, libc::MADV_NOHUGEPAGE),
        }
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Maps a part of a file where `offset` and the address are the same distance behind a multiple of a huge page.
pub(super) fn map(
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;
    use crate::devices::mem::Room;
    use crate::memory::map_saved_ram;

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
        let gathered = gather(&file, &[1, 512, 0]).unwrap();
        assert!(gathered <= 1, "{gathered}");
        let none = Room { start: 4 << 30, bytes: 1 << 30, present: 0 };
        let ram = map_saved_ram(7 << 20, (file.try_clone().unwrap(), &[2]), none, 0).unwrap();
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
        assert_eq!(gather(&tempfile::tempfile().unwrap(), &[]).unwrap(), 0);
    }
}

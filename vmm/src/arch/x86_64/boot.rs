//! Puts the kernel, its command line and the zero page into guest memory.

use std::fs::File;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion};

use super::layout::{
    ACPI_REGION_END, ACPI_START, BASE_RAM_END, COMMAND_LINE_MAX, COMMAND_LINE_START, ECAM_SIZE,
    ECAM_START, HIGH_RAM_START, IMAGE_START, KERNEL_START, LOW_RAM_END, ZERO_PAGE_START,
};
use super::segments;
use crate::memory::{self, GuestRam};

/// Why a kernel could not be made ready to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is no kernel of the right kind, or its headers lie.
    #[error(
        "load the guest kernel: {0}; give an uncompressed 64-bit ELF file (vmlinux, not bzImage)"
    )]
    Kernel(linux_loader::loader::Error),
    /// A segment or the entry point lies where the kernel must not be.
    #[error(
        "load the guest kernel: it wants to lie at {start:#x} to {end:#x}, outside the guest's \
         memory of {KERNEL_START:#x} to {ram_end:#x}; give the VM more memory, or another kernel"
    )]
    KernelPlace {
        /// Its entry point.
        start: u64,
        /// Its end.
        end: u64,
        /// End of the RAM below 4 GiB.
        ram_end: u64,
    },
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line has {0} bytes, more than {COMMAND_LINE_MAX}")]
    CommandLine(usize),
    /// The boot structures do not fit guest memory.
    #[error("write the boot parameters to guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// How the kernel is told that the image is its root: the only persistent memory, read where it lies (DAX).
pub const IMAGE_ROOT: &str =
    "root=/dev/pmem0 rootfstype=erofs ro rootflags=dax=always rootwait init=/init";

/// Loads the kernel's segments where its headers say.
///
/// # Errors
/// It is no 64-bit ELF file, it is cut off, or it does not fit.
pub fn load_kernel(ram: &GuestRam, kernel: &mut File) -> Result<KernelLoaderResult, BootError> {
    // A file that has no such headers is refused below.
    let segments = segments::read(kernel).unwrap_or_default();
    for page in segments::sparse(&segments, low_ram_end(ram)) {
        memory::keep_small(ram, page);
    }
    let loaded = Elf::load(ram, None, kernel, None).map_err(BootError::Kernel)?;
    let ram_end = low_ram_end(ram);
    let (start, end) = (loaded.kernel_load.0, loaded.kernel_end);
    if start < KERNEL_START || start >= end || end > ram_end {
        return Err(BootError::KernelPlace { start, end, ram_end });
    }
    Ok(loaded)
}

fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.iter()
        .map(|region| region.start_addr().0 + region.len())
        .filter(|end| *end <= LOW_RAM_END)
        .max()
        .unwrap_or(0)
}

/// Writes the command line and the zero page (Linux Documentation/arch/x86/zero-page.rst), for a guest that has an image of so
/// many bytes, or none.
///
/// # Errors
/// The command line is too long, or guest memory too small.
pub fn write_parameters(
    ram: &GuestRam,
    command_line: &str,
    image_bytes: Option<u64>,
    acpi_root: GuestAddress,
) -> Result<(), BootError> {
    let mut text = command_line.as_bytes().to_vec();
    text.push(0);
    if text.len() > COMMAND_LINE_MAX {
        return Err(BootError::CommandLine(text.len()));
    }
    ram.write_slice(&text, GuestAddress(COMMAND_LINE_START))?;

    let mut params = boot_params::default();
    params.hdr.type_of_loader = 0xff; // A loader without a number of its own.
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.cmd_line_ptr = COMMAND_LINE_START as u32;
    params.hdr.cmdline_size = text.len() as u32;
    params.hdr.kernel_alignment = 0x100_0000;
    params.acpi_rsdp_addr = acpi_root.0;
    let map = memory_map(ram, image_bytes);
    for (entry, slot) in map.iter().zip(&mut params.e820_table) {
        *slot = *entry;
    }
    params.e820_entries = map.len() as u8;
    ram.write_obj(params, GuestAddress(ZERO_PAGE_START))?;
    Ok(())
}

// Types of memory (ACPI 6.5, 15.1).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;
/// Persistent memory by a number that is no specification's, but what Linux takes for it (E820_TYPE_PRAM): it needs no tables
/// that describe it (NFIT).
const E820_PERSISTENT: u32 = 12;

fn memory_map(ram: &GuestRam, image_bytes: Option<u64>) -> Vec<boot_e820_entry> {
    let entry = |addr, end, type_| boot_e820_entry { addr, size: end - addr, type_ };
    let mut map = vec![
        entry(0, BASE_RAM_END, E820_RAM),
        entry(ACPI_START, ACPI_REGION_END, E820_ACPI),
        entry(KERNEL_START, low_ram_end(ram), E820_RAM),
        entry(ECAM_START, ECAM_START + ECAM_SIZE, E820_RESERVED),
    ];
    let image = image_bytes.map(|bytes| entry(IMAGE_START, IMAGE_START + bytes, E820_PERSISTENT));
    map.extend(image);
    let high = ram.iter().filter(|region| region.start_addr().0 >= HIGH_RAM_START);
    map.extend(high.map(|region| {
        let start = region.start_addr().0;
        entry(start, start + region.len(), E820_RAM)
    }));
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::map_ram;

    /// An ELF file with one loadable segment.
    fn elf(address: u64, file_size: u64, memory_size: u64, body: &[u8]) -> File {
        let mut bytes = vec![0u8; 120];
        bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
        bytes[16..20].copy_from_slice(&[2, 0, 0x3e, 0]);
        bytes[20] = 1;
        bytes[24..32].copy_from_slice(&address.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
        bytes[64..72].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
        for (index, value) in
            [120, address, address, file_size, memory_size, 0x1000].into_iter().enumerate()
        {
            bytes[72 + index * 8..80 + index * 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        bytes.extend_from_slice(body);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn kernel_lands_where_its_header_says() {
        let ram = map_ram(32 << 20).unwrap();
        let loaded = load_kernel(&ram, &mut elf(0x100_0000, 4, 0x1000, b"boot")).unwrap();
        assert_eq!(loaded.kernel_load, GuestAddress(0x100_0000));
        let text: [u8; 4] = ram.read_obj(GuestAddress(0x100_0000)).unwrap();
        assert_eq!(&text, b"boot");
    }

    #[test]
    fn kernel_with_little_alone_in_a_huge_page_is_loaded_all_the_same() {
        let ram = map_ram(32 << 20).unwrap();
        let place = [(0x100_0000, 0x1000), (0x120_0000, 1), (0x140_0000, 0x1000)];
        let mut bytes = vec![0; 64 + 3 * 56];
        bytes[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
        bytes[16..20].copy_from_slice(&[2, 0, 0x3e, 0]);
        bytes[20] = 1;
        bytes[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..58].copy_from_slice(&[56, 0, 3, 0]);
        for (number, (address, length)) in place.into_iter().enumerate() {
            let header = &mut bytes[64 + number * 56..][..56];
            header[0] = 1;
            let numbers = [0, address, address, length, length, 0x1000u64];
            for (at, number) in (8..).step_by(8).zip(numbers) {
                header[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
        }
        bytes.resize(0x1000, 7);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let loaded = load_kernel(&ram, &mut file).unwrap();
        assert_eq!(loaded.kernel_end, 0x140_1000);
        let of_huge_page: [u8; 2] = ram.read_obj(GuestAddress(0x120_0000)).unwrap();
        assert_eq!(of_huge_page, [0x7f, 0]);
    }

    #[test]
    fn kernel_that_lies_is_refused() {
        let ram = map_ram(32 << 20).unwrap();
        let mut text = tempfile::tempfile().unwrap();
        text.write_all(b"#!/bin/sh\n").unwrap();
        assert!(matches!(load_kernel(&ram, &mut text), Err(BootError::Kernel(_))));
        let mut short = elf(0x100_0000, 4096, 4096, b"cut off");
        assert!(matches!(load_kernel(&ram, &mut short), Err(BootError::Kernel(_))));
        let mut outside = elf(1 << 40, 4, 4, b"boot");
        assert!(load_kernel(&ram, &mut outside).is_err());
        let mut low = elf(0x1000, 4, 4, b"boot");
        assert!(matches!(load_kernel(&ram, &mut low), Err(BootError::KernelPlace { .. })));
        let mut bloated = elf(0x100_0000, 4, 1 << 30, b"boot");
        assert!(matches!(load_kernel(&ram, &mut bloated), Err(BootError::KernelPlace { .. })));
        let mut wraps = elf(0x100_0000, 4, u64::MAX, b"boot");
        assert!(load_kernel(&ram, &mut wraps).is_err());
    }

    #[test]
    fn memory_map_leaves_the_hole_out() {
        let ram = map_ram(4 << 30).unwrap();
        let map = memory_map(&ram, Some(6 << 20));
        let ram_bytes: u64 = map
            .iter()
            .filter(|entry| {
                let kind = entry.type_;
                kind == E820_RAM
            })
            .map(|entry| entry.size)
            .sum();
        assert_eq!(ram_bytes, (4 << 30) - (KERNEL_START - BASE_RAM_END));
        assert!(
            map.iter()
                .all(|entry| entry.addr + entry.size <= LOW_RAM_END || entry.addr >= ECAM_START)
        );
        let image = map.iter().find(|entry| entry.addr == IMAGE_START).map(|entry| entry.size);
        assert_eq!(image, Some(6 << 20));
        assert_eq!(memory_map(&ram, None).len(), map.len() - 1);
    }

    #[test]
    fn command_line_over_the_kernels_limit_is_refused() {
        let ram = map_ram(32 << 20).unwrap();
        let fits = "x".repeat(COMMAND_LINE_MAX - 1);
        write_parameters(&ram, &fits, None, GuestAddress(0)).unwrap();
        let long = "x".repeat(COMMAND_LINE_MAX);
        let result = write_parameters(&ram, &long, None, GuestAddress(0));
        assert!(matches!(result, Err(BootError::CommandLine(_))));
    }
}

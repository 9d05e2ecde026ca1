//! Where everything lies in the guest's physical address space and among its I/O ports.
//!
//! ```text
//! 0x0000_0000  RAM: boot structures below 640 KiB, ACPI tables from 0xe0000
//! 0x0010_0000  RAM: the kernel where its ELF headers say
//! 0xc000_0000  32-bit hole: BARs of PCI devices
//! 0xe000_0000    PCI configuration space (ECAM), one bus
//! 0xf000_0000    the guest image, which can only be read
//! 0xfec0_0000    I/O APIC, local APIC, pages that KVM keeps for itself
//! 0x1_0000_0000  RAM that does not fit below the hole, then room for what comes at a restore
//! upper half     64-bit BARs of passed functions, in a machine that has any
//! ```

/// End of RAM below 4 GiB, and start of the 32-bit hole.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Start of RAM above 4 GiB.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// The BARs of PCI devices are placed here.
pub const PCI_MMIO_START: u64 = LOW_RAM_END;
/// Size of that window, in bytes.
pub const PCI_MMIO_SIZE: u64 = 0x2000_0000;
/// PCI configuration space (PCI Express base specification, 7.2.2).
pub const ECAM_START: u64 = 0xe000_0000;
/// One bus: 32 devices, 8 functions, 4 KiB each.
pub const ECAM_SIZE: u64 = 1 << 20;

/// The guest image, which the kernel finds as persistent memory. It has room up to the I/O APIC.
pub const IMAGE_START: u64 = 0xf000_0000;
const _: () = assert!(IMAGE_START + vial_vmm_api::MAX_IMAGE_BYTES <= IO_APIC_START as u64);

/// The window for 64-bit BARs: the upper half of what a processor with that many bits of physical
/// address can name, memory being far below. Bits beyond 46 are left alone, which not every
/// processor's nested paging translates.
pub fn high_window(address_bits: u8) -> std::ops::Range<u64> {
    let bits = address_bits.clamp(HIGH_WINDOW_BITS_MIN, 46);
    1 << (bits - 1)..1 << bits
}
/// With fewer bits, the window would begin in the largest memory that a VM can have.
const HIGH_WINDOW_BITS_MIN: u8 = 38;

/// Where memory can come to a machine that has `ram_bytes`, and how much: from 4 GiB on or behind
/// its RAM, in whole blocks as Linux adds them, up to `most_bytes` with what there is.
pub fn growth_room(ram_bytes: u64, most_bytes: u64) -> std::ops::Range<u64> {
    let end = HIGH_RAM_START + ram_bytes.saturating_sub(LOW_RAM_END);
    let start = end.next_multiple_of(GROWTH_ALIGNMENT);
    let bytes = most_bytes.saturating_sub(ram_bytes).next_multiple_of(GROWTH_ALIGNMENT);
    start..start + bytes.max(GROWTH_ALIGNMENT)
}
const GROWTH_ALIGNMENT: u64 = 128 << 20;

/// The I/O APIC's registers.
pub const IO_APIC_START: u32 = 0xfec0_0000;
/// A local APIC's registers.
pub const LOCAL_APIC_START: u32 = 0xfee0_0000;
/// A page that KVM uses on Intel processors (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;
/// Three pages that KVM uses on Intel processors (KVM_SET_TSS_ADDR).
pub const KVM_TSS_START: u64 = 0xfffb_d000;

/// The boot GDT.
pub const GDT_START: u64 = 0x500;
/// The boot IDT, empty.
pub const IDT_START: u64 = 0x520;
/// The boot parameters ("zero page", Linux Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE_START: u64 = 0x7000;
/// The boot stack grows down from here.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// The boot page tables: one page each of level 4, 3 and 2.
pub const PML4_START: u64 = 0x9000;
/// See [`PML4_START`].
pub const PDPT_START: u64 = 0xa000;
/// See [`PML4_START`].
pub const PD_START: u64 = 0xb000;
/// The kernel's command line.
pub const COMMAND_LINE_START: u64 = 0x2_0000;
/// The most bytes of it, the ending zero included: what the kernel reads (COMMAND_LINE_SIZE).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the RAM below 640 KiB.
pub const BASE_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI tables.
pub const ACPI_END: u64 = GENERATION_START;
/// The VM generation identifier: a page that is memory of ACPI's to the guest.
pub const GENERATION_START: u64 = 0xf_f000;
/// End of what ACPI has.
pub const ACPI_REGION_END: u64 = 0x10_0000;
/// Start of the RAM above 1 MiB; the kernel is loaded no lower.
pub const KERNEL_START: u64 = 0x10_0000;

/// The 16550 console: 8 ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The interrupt that tells of another VM generation.
pub const GENERATION_GSI: u32 = 5;
/// The pvpanic device: one port.
pub const PVPANIC_PORT: u16 = 0x505;
/// The ACPI sleep control register (ACPI 6.5, 4.8.3.7.1): one port.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The ACPI sleep status register (ACPI 6.5, 4.8.3.7.2): one port.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The ACPI reset register (ACPI 6.5, 4.8.3.6): one port.
pub const RESET_PORT: u16 = 0x602;

/// The first interrupt line that message-signalled interrupts use: those below belong to the I/O
/// APIC's pins.
pub const FIRST_MSI_GSI: u32 = 24;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vial_vmm_api::MEMORY_MIB;

    use super::*;
    use crate::memory::ram_ranges;

    proptest! {
        #[test]
        fn growth_has_room_behind_the_ram_and_below_the_windows_of_functions(mib in MEMORY_MIB) {
            let (bytes, most) = (u64::from(mib) << 20, u64::from(*MEMORY_MIB.end()) << 20);
            let room = growth_room(bytes, most);
            prop_assert!(room.start >= HIGH_RAM_START && room.start.is_multiple_of(GROWTH_ALIGNMENT));
            prop_assert!(ram_ranges(bytes).iter().all(|(at, length)| at.0 + length <= room.start));
            prop_assert!(bytes + (room.end - room.start) >= most);
            // But for the largest, whose window a processor with few bits places in RAM's reach.
            prop_assert!(room.end <= high_window(38).start || mib > 60 << 10);
        }
    }
}

//! The ACPI tables (ACPI 6.5, 5.2): hardware-reduced, so that the guest looks for none of a PC's
//! old devices. They tell it of its processors, of PCI configuration space, of the registers that
//! power it off and reset it, of pvpanic, of the VM generation identifier, and of NUMA nodes where
//! there are several. Hot-plug is not theirs: the agent does that.

mod numa;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method,
    Name, Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vial_vmm_api::Placement;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    ACPI_END, ACPI_START, ECAM_SIZE, ECAM_START, GENERATION_GSI, GENERATION_START, IO_APIC_START,
    LOCAL_APIC_START, PCI_MMIO_SIZE, PCI_MMIO_START, PVPANIC_PORT, RESET_PORT, SERIAL_GSI,
    SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"VIAL  ";
const OEM_TABLE_ID: [u8; 8] = *b"VIALVMM ";
const OEM_REVISION: u32 = 1;

/// The sleep type that means "soft off" (S5), as `_S5` tells the guest.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They outgrew their place.
    #[error("the ACPI tables need {0} bytes more than there is room for")]
    TooLarge(u64),
    /// Their place is not in guest memory.
    #[error("write the ACPI tables to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform<'a> {
    /// Processors, with APIC ids from 0.
    pub vcpus: u8,
    /// Whether there is a serial console.
    pub serial: bool,
    /// A window for 64-bit BARs, from its first byte to before its last and one.
    pub high_window: (u64, u64),
    /// Its NUMA nodes.
    pub placement: &'a Placement,
}

/// Writes the tables and returns where the root pointer lies.
///
/// # Errors
/// They do not fit between `ACPI_START` and `ACPI_END`.
pub fn write_tables(ram: &GuestRam, platform: Platform<'_>) -> Result<GuestAddress, AcpiError> {
    let mut place = Place { ram, next: ACPI_START + Rsdp::len() as u64 };
    let dsdt = place.put(&dsdt(platform))?;
    let fadt = place.put(&fadt(dsdt))?;
    let madt = place.put(&madt(platform.vcpus))?;
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    let mcfg = place.put(&mcfg)?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    if platform.placement.nodes.len() > 1 {
        xsdt.add_entry(place.put(&numa::srat(&platform.placement.nodes))?);
        xsdt.add_entry(place.put(&numa::slit(&platform.placement.distances))?);
    }
    let xsdt = place.put(&xsdt)?;
    let mut bytes = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
    ram.write_slice(&bytes, GuestAddress(ACPI_START))?;
    Ok(GuestAddress(ACPI_START))
}

/// Where the next table goes.
struct Place<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.next.next_multiple_of(16);
        let end = address + bytes.len() as u64;
        if end > ACPI_END {
            return Err(AcpiError::TooLarge(end - ACPI_END));
        }
        self.ram.write_slice(&bytes, GuestAddress(address))?;
        self.next = end;
        Ok(address)
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    // IAPC_BOOT_ARCH: no VGA (bit 2), no CMOS clock (bit 5); no legacy devices, no 8042.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC_START),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC_START, 0));
    madt
}

fn dsdt(platform: Platform<'_>) -> Sdt {
    let mut aml = Vec::new();
    // _S5: what the guest writes as the sleep type of registers A and B.
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF]))
        .to_aml_bytes(&mut aml);
    let nodes = platform.placement.nodes.len();
    let bus_node = platform.placement.bus_node.filter(|_| nodes > 1);
    let bridge = host_bridge(platform.high_window, bus_node);
    let (reserved, pvpanic) = (reserved_for_ecam(), pvpanic());
    let (generation, events) = (generation_identifier(), generic_events());
    let serial = platform.serial.then(serial);
    let mut devices: Vec<&dyn Aml> = vec![&bridge, &reserved, &pvpanic, &generation, &events];
    devices.extend(serial.iter().map(|device| device as &dyn Aml));
    Scope::new("_SB_".into(), devices).to_aml_bytes(&mut aml);

    let header = 36;
    let mut dsdt = Sdt::new(*b"DSDT", header, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// AML that was put together already.
struct Assembled(Vec<u8>);

impl Aml for Assembled {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Assembled {
    let mut aml = Vec::new();
    Device::new(Path::new(name), children).to_aml_bytes(&mut aml);
    Assembled(aml)
}

fn host_bridge((high_start, high_end): (u64, u64), bus_node: Option<u8>) -> Assembled {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &0u8);
    let bus = Name::new("_BBN".into(), &0u8);
    // The guest must take the BARs as they are programmed.
    let coherent = Name::new("_CCA".into(), &1u8);
    let window_end = (PCI_MMIO_START + PCI_MMIO_SIZE - 1) as u32;
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let low = AddressSpace::new_memory(uncached, true, PCI_MMIO_START as u32, window_end, None);
    let high = AddressSpace::new_memory(uncached, true, high_start, high_end - 1, None);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &low, &high]));
    // Linux asks a root bridge alone, for all that is behind it.
    let proximity = bus_node.map(|node| Name::new("_PXM".into(), &node));
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid, &segment, &bus, &coherent, &resources];
    children.extend(proximity.iter().map(|name| name as &dyn Aml));
    device("PCI0", children)
}

/// Linux uses ECAM only where ACPI reserves it as a motherboard resource.
fn reserved_for_ecam() -> Assembled {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&Memory32Fixed::new(
            true,
            ECAM_START as u32,
            ECAM_SIZE as u32,
        )]),
    );
    device("ECAM", vec![&hid, &resources])
}

fn pvpanic() -> Assembled {
    let hid = Name::new("_HID".into(), &"QEMU0001");
    let status = Name::new("_STA".into(), &0xfu8);
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1)]),
    );
    device("PEVT", vec![&hid, &status, &resources])
}

/// Where 16 bytes lie that are others in each machine that goes on from the same saved one
/// ("Virtual Machine Generation ID", Microsoft 2012).
fn generation_identifier() -> Assembled {
    let hid = Name::new("_HID".into(), &"VIAL0001");
    let cid = Name::new("_CID".into(), &"VMGENCTR");
    let description = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let address = Package::new(vec![&GENERATION_START, &0u32]);
    let address = Name::new("ADDR".into(), &address);
    device("VGEN", vec![&hid, &cid, &description, &address])
}

/// The generic event device (ACPI 6.5, 5.6.9), whose only interrupt tells of a new generation.
fn generic_events() -> Assembled {
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let interrupt = Interrupt::new(true, true, false, false, GENERATION_GSI);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt]));
    // 0x80: the identifier has changed.
    let (target, changed) = (Path::new("\\_SB_.VGEN"), 0x80u8);
    let notify = Notify::new(&target, &changed);
    let handler = Method::new("_EVT".into(), 1, true, vec![&notify]);
    device("GED_", vec![&hid, &resources, &handler])
}

fn serial() -> Assembled {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &1u8);
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8),
            &Interrupt::new(true, true, false, false, SERIAL_GSI),
        ]),
    );
    device("COM1", vec![&hid, &uid, &resources])
}

#[cfg(test)]
mod tests {
    use vial_vmm_api::NodeConfig;

    use super::super::layout::{HIGH_RAM_START, LOW_RAM_END};
    use super::*;
    use crate::memory::map_ram;

    fn read(ram: &GuestRam, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table(ram: &GuestRam, address: u64) -> Vec<u8> {
        let length: u32 = ram.read_obj(GuestAddress(address + 4)).unwrap();
        read(ram, address, length as usize)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The tables by name, all of which are whole, and the DSDT.
    fn tables(placement: &Placement) -> Vec<Vec<u8>> {
        let ram = map_ram(32 << 20).unwrap();
        let high_window = (1 << 39, 1 << 40);
        let platform = Platform { vcpus: 64, serial: true, high_window, placement };
        let root = write_tables(&ram, platform).unwrap();
        let rsdp = read(&ram, root.0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(sum(&rsdp), 0);
        let xsdt = table(&ram, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        assert_eq!(sum(&xsdt), 0);
        let mut tables = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let bytes = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&bytes), 0);
            if &bytes[..4] == b"FACP" {
                let dsdt = table(&ram, u64::from_le_bytes(bytes[140..148].try_into().unwrap()));
                assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
                tables.push(dsdt);
            }
            tables.push(bytes);
        }
        tables
    }

    fn names(tables: &[Vec<u8>]) -> Vec<&[u8]> {
        tables.iter().map(|table| &table[..4]).collect()
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let tables = tables(&Placement::default());
        assert_eq!(names(&tables), [b"DSDT", b"FACP", b"APIC", b"MCFG"]);
        assert_eq!(tables[2].len(), 44 + 64 * 8 + 12);
    }

    #[test]
    fn nodes_are_told_when_there_are_several() {
        let node = |vcpus| NodeConfig { memory_mib: 1792, vcpus, host_node: 1, bound: false };
        let one = Placement { nodes: vec![node(64)], bus_node: Some(0), ..Default::default() };
        let has_proximity = |table: &[u8]| table.windows(4).any(|name| name == b"_PXM");
        let of_one = tables(&one);
        assert_eq!(names(&of_one), [b"DSDT", b"FACP", b"APIC", b"MCFG"]);
        assert!(!has_proximity(&of_one[0]));

        let two = Placement {
            nodes: vec![node(63), node(1)],
            distances: vec![10, 21, 20, 10],
            bus_node: Some(1),
            huge_pages: None,
        };
        let tables = tables(&two);
        assert_eq!(names(&tables)[4..], [b"SRAT", b"SLIT"]);
        assert!(has_proximity(&tables[0]));
        let (processors, memory) = tables[4][48..].split_at(64 * 16);
        let domains: Vec<(u8, u8)> =
            processors.chunks_exact(16).map(|entry| (entry[3], entry[2])).collect();
        assert_eq!(domains[62..], [(62, 0), (63, 1)]);
        let ranges: Vec<(u8, u64, u64)> = memory
            .chunks_exact(40)
            .map(|entry| {
                let number = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
                (entry[2], number(8), number(16))
            })
            .collect();
        let first = 1792 << 20;
        let below = LOW_RAM_END - first;
        assert_eq!(ranges, [(0, 0, first), (1, first, below), (1, HIGH_RAM_START, first - below)]);
        assert_eq!(tables[5][36..44], 2u64.to_le_bytes());
        assert_eq!(tables[5][44..], [10, 21, 20, 10]);
    }
}

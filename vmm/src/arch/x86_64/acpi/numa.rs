//! The tables that tell of NUMA nodes: which has which processors and which memory, and how far
//! they are from each other. A proximity domain is a node's number.

use acpi_tables::Aml;
use acpi_tables::sdt::Sdt;
use acpi_tables::srat::MemoryAffinity;
use vial_vmm_api::NodeConfig;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::numa;

/// The header that all tables have, in bytes.
const HEADER_BYTES: u32 = 36;
/// Processor local APIC affinity (ACPI 6.5, 5.2.16.1): its type, its length, and that it counts.
const LOCAL_APIC: u8 = 0;
const LOCAL_APIC_BYTES: u8 = 16;
const ENABLED: u8 = 1;

/// The System Resource Affinity Table (ACPI 6.5, 5.2.16).
pub(super) fn srat(nodes: &[NodeConfig]) -> Sdt {
    let mut srat = Sdt::new(*b"SRAT", HEADER_BYTES, 3, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // Reserved; the first has to be 1.
    srat.append_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let domains = (0u8..)
        .zip(nodes)
        .flat_map(|(number, node)| std::iter::repeat_n(number, usize::from(node.vcpus)));
    for (id, domain) in (0u8..).zip(domains) {
        let mut entry = [0; LOCAL_APIC_BYTES as usize];
        entry[..5].copy_from_slice(&[LOCAL_APIC, LOCAL_APIC_BYTES, domain, id, ENABLED]);
        srat.append_slice(&entry);
    }
    for range in numa::ranges(nodes) {
        let mut entry = Vec::new();
        MemoryAffinity::new(range.node as u32, range.start.0, range.bytes)
            .enabled()
            .to_aml_bytes(&mut entry);
        srat.append_slice(&entry);
    }
    srat
}

/// The System Locality Distance Information Table (ACPI 6.5, 5.2.17), of the distances of one node
/// behind those of the other.
pub(super) fn slit(distances: &[u8]) -> Sdt {
    let mut slit = Sdt::new(*b"SLIT", HEADER_BYTES, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    slit.append_slice(&(distances.len().isqrt() as u64).to_le_bytes());
    slit.append_slice(distances);
    slit
}

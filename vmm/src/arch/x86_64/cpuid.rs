//! What the guest's CPUID instruction answers: what KVM supports on this host, with a topology of
//! our own, so that nothing of the host's cores, threads and packages shows.
//!
//! The topology is one package of `vcpus` cores with one thread each, and APIC ids equal to the
//! vCPUs' numbers. They share its last cache, unless there are several NUMA nodes: no cache spans
//! those, and a kernel that is told so complains. (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.)

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Set in leaf 1, ECX: the processor's timer can fire at a value of the time stamp counter.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Set in leaf 1, ECX: a hypervisor is present.
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Set in leaf 1, EDX: EBX holds the number of logical processors of the package.
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Marks an entry whose answer depends on ECX.
const INDEXED: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
/// The leaf at which hypervisors tell the frequency of the time stamp counter and of the local
/// APIC's timer, in kHz.
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
/// What KVM offers its guests (Linux `Documentation/virt/kvm/x86/cpuid.rst`), and of that in EAX: faults of the host's that the
/// guest is told of, and of whose end it is interrupted (KVM_FEATURE_ASYNC_PF, _VMEXIT and _INT). A guest that has turned them
/// on is interrupted whenever its state is set, so each that goes on from a template would begin with that.
const LEAF_FEATURES: u32 = 0x4000_0001;
const FEATURES_ASYNC_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
/// The local APIC's timer as KVM implements it counts nanoseconds.
const LOCAL_APIC_TIMER_KHZ: u32 = 1_000_000;

/// Bits of an APIC id that number the cores of a package of `vcpus`.
fn core_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

/// How many bits a physical address has (leaf 0x80000008, EAX).
pub fn physical_address_bits(supported: &CpuId) -> u8 {
    let sizes = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    // Processors without that leaf have 36 (Intel SDM volume 3, 4.1.4).
    sizes.map_or(36, |entry| entry.eax as u8)
}

/// The answers for vCPU number `index` of `vcpus` on `nodes` NUMA nodes (0 is 1), from those that
/// KVM supports. `tsc_khz` is the guest's time stamp counter's frequency, where the host knows it.
pub fn for_vcpu(
    supported: &CpuId,
    index: u8,
    vcpus: u8,
    nodes: usize,
    tsc_khz: Option<u32>,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Rebuilt below: KVM shows the host's own here.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        set_topology(entry, index, vcpus, nodes);
    }
    let max_leaf = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    if max_leaf >= 0xb {
        entries.extend(extended_topology(0xb, index, vcpus));
    }
    if max_leaf >= 0x1f {
        entries.extend(extended_topology(0x1f, index, vcpus));
    }
    if let Some(khz) = tsc_khz {
        entries.retain(|entry| entry.function != LEAF_TIMING);
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_TIMING,
            eax: khz,
            ebx: LOCAL_APIC_TIMER_KHZ,
            ..Default::default()
        });
        for entry in entries.iter_mut().filter(|entry| entry.function == LEAF_HYPERVISOR) {
            entry.eax = entry.eax.max(LEAF_TIMING);
        }
    }
    entries
}

fn set_topology(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8, nodes: usize) {
    let index = u32::from(index);
    let count = u32::from(vcpus);
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (index << 24);
            entry.ecx |= LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
            entry.edx =
                if vcpus > 1 { entry.edx | LEAF1_EDX_HTT } else { entry.edx & !LEAF1_EDX_HTT };
        }
        // Deterministic cache parameters: bits 25:14 are the logical processors that share the
        // cache, less 1; Intel's leaf also has the cores of the package, less 1, in bits 31:26.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let shared = if level >= 3 && nodes <= 1 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (shared << 14);
            if entry.function == 0x4 {
                entry.eax |= ((1 << core_bits(vcpus)) - 1) << 26;
            }
        }
        LEAF_FEATURES => entry.eax &= !FEATURES_ASYNC_FAULTS,
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (core_bits(vcpus) << 12) | (count - 1),
        0x8000_001e => {
            entry.eax = index;
            entry.ebx = index; // One thread a core.
            entry.ecx = 0; // One node.
        }
        _ => {}
    }
}

/// Leaf 0xb or 0x1f: threads (one), then cores, then nothing.
fn extended_topology(function: u32, index: u8, vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    const LEVEL_THREAD: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    let level = |number: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function,
        index: number,
        flags: INDEXED,
        eax: shift,
        ebx: count,
        ecx: number | (kind << 8),
        edx: u32::from(index),
        ..Default::default()
    };
    [
        level(0, LEVEL_THREAD, 0, 1),
        level(1, LEVEL_CORE, core_bits(vcpus), u32::from(vcpus)),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    fn supported() -> CpuId {
        let entry = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        CpuId::from_entries(&[
            entry(0, 0x1f),
            kvm_cpuid_entry2 { ebx: 0x0910_0800, ..entry(1, 0) },
            kvm_cpuid_entry2 { flags: INDEXED, ..entry(4, 0x3c00_4163) },
            kvm_cpuid_entry2 { edx: 99, ..entry(0xb, 7) },
            entry(LEAF_HYPERVISOR, 0x4000_0001),
            entry(LEAF_FEATURES, 0x0100_7efb),
            entry(0x8000_0008, 0),
            entry(0x8000_001e, 55),
        ])
        .unwrap()
    }

    #[test]
    fn guest_is_not_told_of_the_hosts_faults_and_of_all_else_that_kvm_offers() {
        let entries = for_vcpu(&supported(), 0, 1, 0, None);
        assert_eq!(leaf(&entries, LEAF_FEATURES, 0).eax, 0x0100_3aeb);
    }

    #[test]
    fn timing_leaf_is_announced_by_the_hypervisor_leaf() {
        let entries = for_vcpu(&supported(), 0, 1, 0, Some(2_600_000));
        assert_eq!(leaf(&entries, LEAF_TIMING, 0).eax, 2_600_000);
        assert_eq!(leaf(&entries, LEAF_HYPERVISOR, 0).eax, LEAF_TIMING);
    }

    #[test]
    fn last_cache_is_shared_unless_there_are_several_nodes() {
        let sharers =
            |nodes| leaf(&for_vcpu(&supported(), 0, 4, nodes, None), 4, 0).eax >> 14 & 0xfff;
        assert_eq!((sharers(0), sharers(1), sharers(2)), (3, 3, 0));
    }

    proptest! {
        #[test]
        fn every_vcpu_shows_its_own_id_and_nothing_of_the_host(vcpus in 1u8..=64, pick: u8) {
            let index = pick % vcpus;
            let entries = for_vcpu(&supported(), index, vcpus, 1, None);
            prop_assert_eq!(leaf(&entries, 1, 0).ebx >> 24, u32::from(index));
            prop_assert_eq!(leaf(&entries, 1, 0).ebx >> 16 & 0xff, u32::from(vcpus));
            prop_assert_eq!(leaf(&entries, 0x8000_001e, 0).eax, u32::from(index));
            for function in [0xb, 0x1f] {
                let core = leaf(&entries, function, 1);
                prop_assert_eq!(core.edx, u32::from(index));
                prop_assert_eq!(core.ebx, u32::from(vcpus));
                // All APIC ids of the package agree above the shift.
                prop_assert_eq!(u32::from(index) >> core.eax, 0);
            }
        }
    }
}

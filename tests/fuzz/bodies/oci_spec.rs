//! The OCI spec and the annotations of a pod, which whoever may make pods has written.

use vial_shim::{size::Limits, spec::Spec};

/// Panics where the rules above are broken.
pub(crate) fn run(text: &[u8]) {
    let Ok(mut spec) = Spec::parse(text) else { return };
    let _ = (spec.role(), spec.check_sandbox(), spec.joins_pids());
    let _ = spec.network_namespace();
    let limits = Limits::of_annotations(&spec.annotations);
    let (vcpus, memory_mib) = vial_shim::size::of_vm(limits, 1, 128);
    assert!(vial_vmm_api::VCPUS.contains(&vcpus) && vial_vmm_api::MEMORY_MIB.contains(&memory_mib));
    if let Ok(wanted) = spec.wanted_devices(&[]) {
        assert!(wanted.addresses.is_empty(), "the operator listed none, and one was given");
    }
    spec.take_shared_memory();
}

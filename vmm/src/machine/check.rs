//! What of a machine's configuration can be checked before anything is made.

use vial_vmm_api::{
    API_VERSION, DeviceConfig, MAX_COMMAND_LINE_BYTES, MAX_DEVICES, MAX_PASSED_FUNCTIONS,
    MEMORY_MIB, VCPUS, VmConfig,
};

use super::MachineError;
use crate::numa;

/// Checks all that can be checked before anything is made.
///
/// # Errors
/// [`MachineError::Config`].
pub fn check(config: &VmConfig) -> Result<(), MachineError> {
    check_common(config.version, config.vcpus, config.memory_mib, &config.devices)?;
    numa::check(config).map_err(MachineError::Config)?;
    let wrong = |text: String| Err(MachineError::Config(text));
    if config.command_line.len() > MAX_COMMAND_LINE_BYTES {
        return wrong(format!(
            "the kernel command line has {} bytes: give at most {MAX_COMMAND_LINE_BYTES}",
            config.command_line.len()
        ));
    }
    let backends = config.devices.iter().any(is_of_backend);
    if backends != config.shared_memory.is_some() {
        return wrong(
            "vhost-user backends and shared memory come together; give both, or none".into(),
        );
    }
    if backends && config.devices.contains(&DeviceConfig::Memory) {
        return wrong(
            "vhost-user backends see no memory that comes later; leave the memory device out"
                .into(),
        );
    }
    let keeps = backends || config.placement.huge_pages.is_some();
    if keeps && config.devices.contains(&DeviceConfig::Balloon) {
        return wrong(
            "memory that vhost-user backends share, or that is in huge pages, does not go back to \
             the host by parts; leave the balloon device out"
                .into(),
        );
    }
    if config.command_line.contains(|c: char| c.is_control()) {
        return wrong("the kernel command line holds control characters; take them out".into());
    }
    Ok(())
}

/// Checks what booted and restored machines have in common.
pub(super) fn check_common(
    version: u32,
    vcpus: u8,
    memory_mib: u32,
    devices: &[DeviceConfig],
) -> Result<(), MachineError> {
    let wrong = |text: String| Err(MachineError::Config(text));
    if version != API_VERSION {
        return wrong(format!(
            "the request speaks version {version}, this VMM version {API_VERSION}; install shim \
             and VMM of one release"
        ));
    }
    if !VCPUS.contains(&vcpus) {
        let (least, most) = (VCPUS.start(), VCPUS.end());
        return wrong(format!("{vcpus} vCPUs: give {least} to {most}"));
    }
    if !MEMORY_MIB.contains(&memory_mib) {
        let (least, most) = (MEMORY_MIB.start(), MEMORY_MIB.end());
        return wrong(format!("{memory_mib} MiB of memory: give {least} to {most}"));
    }
    if devices.len() > MAX_DEVICES {
        return wrong(format!("{} devices: give at most {MAX_DEVICES}", devices.len()));
    }
    let sockets = devices.iter().filter(|d| matches!(d, DeviceConfig::Vsock { .. }));
    if sockets.count() > 1 {
        return wrong("two vsock devices: give one".into());
    }
    for (device, name) in [(DeviceConfig::Memory, "memory"), (DeviceConfig::Balloon, "balloon")] {
        if devices.iter().filter(|other| **other == device).count() > 1 {
            return wrong(format!("two {name} devices: give one"));
        }
    }
    let passed: Vec<usize> = devices.iter().filter_map(passed_functions).collect();
    if passed.len() > 1 {
        return wrong("two lists of passed functions: give one with all of them".into());
    }
    if passed.iter().any(|count| *count > MAX_PASSED_FUNCTIONS) {
        return wrong(format!("more than {MAX_PASSED_FUNCTIONS} passed functions: give fewer"));
    }
    Ok(())
}

/// Whether a process of the host serves the device.
pub(super) fn is_of_backend(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::VhostUser { .. })
}

/// How many functions of the host the entry passes, if it is one of those.
pub(super) fn passed_functions(device: &DeviceConfig) -> Option<usize> {
    match device {
        DeviceConfig::Passthrough { functions, .. } => Some(functions.len()),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use vial_vmm_api::{Descriptor, HugePages, PassedBy, Placement};

    use super::*;

    /// A machine that can be.
    pub(crate) fn config() -> VmConfig {
        VmConfig {
            version: API_VERSION,
            kvm: Descriptor(0),
            vcpus: 1,
            memory_mib: 128,
            kernel: Descriptor(1),
            image: None,
            command_line: String::new(),
            console: None,
            devices: Vec::new(),
            hot_plug: false,
            placement: Placement::default(),
            shared_memory: None,
        }
    }

    fn passed(functions: usize) -> DeviceConfig {
        DeviceConfig::Passthrough {
            way: PassedBy::Iommufd { iommufd: Descriptor(2), address_space: 1 },
            functions: vec![Descriptor(3); functions],
        }
    }

    #[test]
    fn machine_beyond_a_bound_is_refused_by_name() {
        type Change = fn(&mut VmConfig);
        let cases: [(Change, &str); 14] = [
            (|c| c.version += 1, "version"),
            (|c| c.vcpus = 0, "vCPUs"),
            (|c| c.vcpus = 65, "vCPUs"),
            (|c| c.memory_mib = 31, "MiB"),
            (|c| c.memory_mib = 65537, "MiB"),
            (|c| c.command_line = "x".repeat(MAX_COMMAND_LINE_BYTES + 1), "command line"),
            (|c| c.command_line = "a\nb".into(), "control characters"),
            (|c| c.devices = vec![DeviceConfig::Rng; MAX_DEVICES + 1], "devices"),
            (
                |c| {
                    c.devices = vec![DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![] }; 2];
                },
                "vsock",
            ),
            (|c| c.shared_memory = Some(Descriptor(2)), "shared memory"),
            (|c| c.devices = vec![DeviceConfig::Balloon; 2], "two balloon devices"),
            (
                |c| {
                    c.devices = vec![DeviceConfig::Balloon];
                    c.placement.huge_pages = Some(HugePages::Mib2);
                },
                "leave the balloon device out",
            ),
            (|c| c.devices = vec![passed(1), passed(1)], "two lists"),
            (|c| c.devices = vec![passed(MAX_PASSED_FUNCTIONS + 1)], "passed functions"),
        ];
        check(&config()).unwrap();
        for (change, word) in cases {
            let mut config = config();
            change(&mut config);
            let text = check(&config).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }
}

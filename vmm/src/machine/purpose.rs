//! What becomes of a machine, and what that asks of its configuration.

use vial_vmm_api::{DeviceConfig, Placement, VCPUS, VmConfig};

use super::MachineError;
use super::assembly::kind;

/// What becomes of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It runs a guest to its end.
    Run,
    /// It is saved before, and what goes on from it has at most that many vCPUs.
    Template {
        /// See [`vial_vmm_api::TemplateConfig::max_vcpus`].
        max_vcpus: u8,
    },
}

impl Purpose {
    /// What is kept of a machine that runs or waits is not saved.
    pub(super) fn check(self, config: &VmConfig) -> Result<(), MachineError> {
        let wrong = |text: String| Err(MachineError::Config(text));
        let Self::Template { max_vcpus } = self else {
            return match config.devices.contains(&DeviceConfig::Memory) {
                true => wrong(
                    "a machine that is never saved has all its memory at once; leave the memory \
                     device out"
                        .into(),
                ),
                false => Ok(()),
            };
        };
        let most = *VCPUS.end();
        if !(config.vcpus..=most).contains(&max_vcpus) {
            let vcpus = config.vcpus;
            return wrong(format!("at most {max_vcpus} vCPUs later: give {vcpus} to {most}"));
        }
        if config.placement != Placement::default() {
            return wrong(
                "a machine whose memory is placed cannot be saved; leave its place to the host"
                    .into(),
            );
        }
        if config.hot_plug {
            return wrong(
                "a machine that can be given functions cannot be saved; leave `hot_plug` out"
                    .into(),
            );
        }
        // How far the queues of a network were served is the kernel's to know where it carries the
        // packets, and what is in flight there is in no state.
        let kept = |device: &DeviceConfig| match device {
            DeviceConfig::Vsock { .. }
            | DeviceConfig::Fs { .. }
            | DeviceConfig::Rng
            | DeviceConfig::Memory
            | DeviceConfig::Balloon => None,
            other => Some(kind(other)),
        };
        let console = config.console.map(|_| "console");
        match config.devices.iter().find_map(kept).or(console) {
            Some(what) => wrong(format!(
                "a machine with a {what} device cannot be saved; leave it out of the template"
            )),
            None => Ok(()),
        }
    }

    /// The vCPUs that the guest is told of.
    pub(super) fn told_vcpus(self, config: &VmConfig) -> u8 {
        match self {
            Self::Run => config.vcpus,
            Self::Template { max_vcpus } => max_vcpus,
        }
    }
}

#[cfg(test)]
mod tests {
    use vial_vmm_api::Descriptor;

    use super::*;
    use crate::machine::{self, check::tests::config};

    #[test]
    fn machine_that_is_given_functions_later_is_no_template() {
        let config = VmConfig { hot_plug: true, ..config() };
        Purpose::Run.check(&config).unwrap();
        let template = Purpose::Template { max_vcpus: 1 };
        let error = template.check(&config).unwrap_err();
        assert!(error.to_string().contains("hot_plug"), "{error}");
    }

    #[test]
    fn machine_with_a_network_is_no_template() {
        let (first, mac) = (Descriptor(1), [2, 0, 0, 0, 0, 1]);
        let several = vec![first, Descriptor(2)];
        for (taps, vhosts) in [
            (vec![first], vec![]),
            (vec![first], vec![Descriptor(2)]),
            (several, vec![Descriptor(3), Descriptor(4)]),
        ] {
            let net = DeviceConfig::Net { taps, mac, mtu: 1500, vhosts };
            let config = VmConfig { devices: vec![net], ..config() };
            Purpose::Run.check(&config).unwrap();
            let error = Purpose::Template { max_vcpus: 1 }.check(&config).unwrap_err();
            assert!(error.to_string().contains("a net device cannot be saved"), "{error}");
        }
    }

    #[test]
    fn only_a_template_has_room_for_more() {
        let config = VmConfig { vcpus: 2, devices: vec![DeviceConfig::Memory], ..config() };
        Purpose::Template { max_vcpus: 2 }.check(&config).unwrap();
        Purpose::Template { max_vcpus: 64 }.check(&config).unwrap();
        for (purpose, word) in [
            (Purpose::Run, "memory device"),
            (Purpose::Template { max_vcpus: 1 }, "vCPUs"),
            (Purpose::Template { max_vcpus: 65 }, "vCPUs"),
        ] {
            let error = purpose.check(&config).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        let two = vec![DeviceConfig::Memory; 2];
        let error = machine::check(&VmConfig { devices: two, ..config }).unwrap_err();
        assert!(error.to_string().contains("two memory devices"), "{error}");
    }
}

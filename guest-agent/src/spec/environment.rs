//! What a container's environment says of the host's PCI functions.
//!
//! A device plugin tells a container what it got by `PCIDEVICE_<RESOURCE>`, addresses with commas
//! between them, and `PCIDEVICE_<RESOURCE>_INFO`, JSON with addresses as keys and values. Those are
//! the host's; in the guest the same functions have other addresses. An address that is none of the
//! VM's stays as it is.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::runtime::Process;
use serde_json::Value;

const PREFIX: &str = "PCIDEVICE_";
const INFO: &str = "_INFO";

/// Addresses of functions, as the host has them, and as the guest has.
pub(crate) type Names = BTreeMap<String, String>;

/// Puts the guest's addresses in place of the host's, and warns of those that are not known.
pub(crate) fn name_functions(process: &mut Process, names: &Names) {
    let Some(environment) = process.env_mut() else { return };
    for address in rewrite(environment, names) {
        tracing::warn!(
            "the environment names the PCI function {address} of the host, which this guest has not"
        );
    }
}

/// Rewrites an environment and returns the addresses that are not known.
fn rewrite(environment: &mut [String], names: &Names) -> BTreeSet<String> {
    let mut renaming = Renaming { names, unknown: BTreeSet::new() };
    for variable in environment {
        let Some((name, value)) = variable.split_once('=') else { continue };
        if !name.starts_with(PREFIX) {
            continue;
        }
        let value = match serde_json::from_str(value) {
            Ok(value @ (Value::Object(_) | Value::Array(_))) if name.ends_with(INFO) => {
                renaming.json(value).to_string()
            }
            _ => renaming.list(value),
        };
        *variable = format!("{name}={value}");
    }
    renaming.unknown
}

struct Renaming<'a> {
    names: &'a Names,
    unknown: BTreeSet<String>,
}

impl Renaming<'_> {
    fn word(&mut self, word: &str) -> String {
        if let Some(guest) = self.names.get(word) {
            return guest.clone();
        }
        if is_address(word) {
            self.unknown.insert(word.to_owned());
        }
        word.to_owned()
    }

    fn list(&mut self, text: &str) -> String {
        let words: Vec<String> = text.split(',').map(|word| self.word(word)).collect();
        words.join(",")
    }

    /// serde_json bounds how deep a value can be.
    fn json(&mut self, value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.word(&text)),
            Value::Array(values) => values.into_iter().map(|value| self.json(value)).collect(),
            Value::Object(fields) => {
                fields.into_iter().map(|(key, value)| (self.word(&key), self.json(value))).collect()
            }
            other => other,
        }
    }
}

/// Whether it is written as an address of a PCI function is: `0000:3b:10.0`.
fn is_address(word: &str) -> bool {
    let hex = |text: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts = || {
        let (domain, rest) = word.split_once(':')?;
        let (bus, rest) = rest.split_once(':')?;
        let (device, function) = rest.split_once('.')?;
        Some(hex(domain, 4..=8) && hex(bus, 2..=2) && hex(device, 2..=2) && hex(function, 1..=1))
    };
    parts().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names() -> Names {
        let pairs = [("0000:3b:10.0", "0000:00:05.0"), ("0000:3b:10.2", "0000:00:06.0")];
        pairs.map(|(host, guest)| (host.to_owned(), guest.to_owned())).into()
    }

    fn rewritten(variables: &[&str]) -> (Vec<String>, Vec<String>) {
        let mut environment: Vec<String> = variables.iter().map(|&text| text.into()).collect();
        let unknown = rewrite(&mut environment, &names());
        (environment, unknown.into_iter().collect())
    }

    #[test]
    fn addresses_of_a_device_plugin_become_the_guests() {
        let (environment, unknown) = rewritten(&[
            "PATH=/bin",
            "PCIDEVICE_INTEL_COM_VF=0000:3b:10.2,0000:3b:10.0",
            "PCIDEVICE_INTEL_COM_VF_INFO={\"0000:3b:10.0\":{\"generic\":{\"deviceID\":\"0000:3b:10.0\"},\
             \"vfio\":{\"dev-mount\":\"/dev/vfio/52\"}}}",
            "OTHER=0000:3b:10.0",
            "PCIDEVICE_WITHOUT",
        ]);
        assert_eq!(
            environment,
            [
                "PATH=/bin",
                "PCIDEVICE_INTEL_COM_VF=0000:00:06.0,0000:00:05.0",
                "PCIDEVICE_INTEL_COM_VF_INFO={\"0000:00:05.0\":{\"generic\":{\"deviceID\":\"0000:00:05.0\"},\
                 \"vfio\":{\"dev-mount\":\"/dev/vfio/52\"}}}",
                "OTHER=0000:3b:10.0",
                "PCIDEVICE_WITHOUT",
            ]
        );
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn addresses_that_are_not_known_stay_and_are_told() {
        let (environment, unknown) = rewritten(&[
            "PCIDEVICE_A=0000:3b:10.0,0000:3b:11.0,",
            "PCIDEVICE_B_INFO={\"0000:3b:11.4\": 1",
            "PCIDEVICE_C=GPU-0a1b,0000:3b:1.0",
            "PCIDEVICE_D_INFO=0000:3b:10.0",
        ]);
        assert_eq!(environment[0], "PCIDEVICE_A=0000:00:05.0,0000:3b:11.0,");
        assert_eq!(environment[1], "PCIDEVICE_B_INFO={\"0000:3b:11.4\": 1");
        assert_eq!(environment[2], "PCIDEVICE_C=GPU-0a1b,0000:3b:1.0");
        assert_eq!(environment[3], "PCIDEVICE_D_INFO=0000:00:05.0");
        assert_eq!(unknown, ["0000:3b:11.0"]);
    }

    #[test]
    fn guest_address_that_another_function_has_on_the_host_is_not_renamed_again() {
        let names = [("0000:00:05.0", "0000:00:06.0"), ("0000:00:06.0", "0000:00:05.0")];
        let names = names.map(|(host, guest)| (host.to_owned(), guest.to_owned())).into();
        let mut environment = ["PCIDEVICE_A=0000:00:05.0,0000:00:06.0".to_owned()];
        rewrite(&mut environment, &names);
        assert_eq!(environment, ["PCIDEVICE_A=0000:00:06.0,0000:00:05.0"]);
    }

    proptest! {
        #[test]
        fn only_variables_of_device_plugins_change(
            name in "[A-Z_]{0,16}",
            value in "[ -~]{0,64}",
        ) {
            prop_assume!(!name.starts_with(PREFIX));
            let variable = format!("{name}={value},0000:3b:10.0");
            let mut environment = [variable.clone()];
            prop_assert!(rewrite(&mut environment, &names()).is_empty());
            prop_assert_eq!(&environment[0], &variable);
            // Of any value, a device plugin's too, only the addresses change.
            let mut environment = [format!("PCIDEVICE_{name}={value},0000:3b:10.0")];
            rewrite(&mut environment, &names());
            prop_assert_eq!(&environment[0], &format!("PCIDEVICE_{name}={value},0000:00:05.0"));
        }
    }
}

//! What of this node's functions can be given to pods, and who has it.

use std::{collections::BTreeMap, fmt::Write, path::PathBuf};

use serde::Serialize;

use super::{DeviceError, VFIO_DRIVER, address::Address, pci::Sysfs, ways::Node};
use crate::ps;

/// A function, as far as it matters to whoever gives it to pods.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its address.
    pub address: Address,
    /// Vendor and device, as `lspci -n` writes them.
    pub id: String,
    /// Class and sub-class, in hexadecimal.
    pub class: String,
    /// Its IOMMU group; none without an IOMMU.
    pub group: Option<u32>,
    /// How many other functions are in that group.
    pub others_in_group: usize,
    /// The NUMA node that it is near to, where there is more than one.
    pub numa_node: Option<u32>,
    /// Who has it on the host.
    pub driver: Option<String>,
    /// The function that it is a virtual one of.
    pub physical_function: Option<Address>,
    /// How many virtual functions it has, and can have.
    pub virtual_functions: Option<(u32, u32)>,
    /// Whether it can be reset alone.
    pub can_be_reset: bool,
    /// The device that it has for itself, if it is bound to vfio-pci and the kernel makes some.
    pub device: Option<PathBuf>,
    /// Whether the operator lets pods name it.
    pub listed: bool,
    /// Namespace and sandbox of the pod that has it.
    pub pod: Option<String>,
}

/// All functions that pods can be given, or, with `all`, every one that is no bridge.
///
/// # Errors
/// [`DeviceError::Io`].
pub fn list(
    sysfs: &Sysfs,
    named: &[Address],
    sandboxes: &[ps::Listed],
    all: bool,
) -> Result<Vec<Listed>, DeviceError> {
    let pods: BTreeMap<Address, String> = sandboxes
        .iter()
        .map(|sandbox| &sandbox.state)
        .flat_map(|state| {
            let name = format!("{}/{}", state.namespace, state.id);
            state.devices.iter().map(move |record| (record.address, name.clone()))
        })
        .collect();
    let mut found = Vec::new();
    for address in sysfs.functions()? {
        if sysfs.is_bridge(address) {
            continue;
        }
        let (vendor, device) = (sysfs.number(address, "vendor"), sysfs.number(address, "device"));
        let group = sysfs.group(address);
        let members = group.map(|group| sysfs.members(group)).transpose()?;
        let function = Listed {
            address,
            id: format!("{:04x}:{:04x}", vendor.unwrap_or_default(), device.unwrap_or_default()),
            class: format!("{:04x}", sysfs.number(address, "class").unwrap_or_default() >> 8),
            group,
            others_in_group: members.map_or(0, |members| members.len().saturating_sub(1)),
            numa_node: sysfs.node(address),
            driver: sysfs.driver(address),
            physical_function: sysfs.physical(address),
            virtual_functions: sysfs.virtual_functions(address),
            can_be_reset: sysfs.can_be_reset(address),
            device: sysfs.vfio_node(address).map(Node::path),
            listed: named.contains(&address),
            pod: pods.get(&address).cloned(),
        };
        if all || function.is_for_pods() {
            found.push(function);
        }
    }
    Ok(found)
}

impl Listed {
    fn is_for_pods(&self) -> bool {
        self.physical_function.is_some()
            || self.virtual_functions.is_some()
            || self.listed
            || self.driver.as_deref() == Some(VFIO_DRIVER)
    }

    /// Whether a pod can have it, and if not, what stands in the way.
    fn verdict(&self) -> String {
        if let Some(pod) = &self.pod {
            return format!("used by {pod}");
        }
        match self {
            Self { group: None, .. } => "no IOMMU".into(),
            Self { can_be_reset: false, .. } => "cannot be reset".into(),
            Self { virtual_functions: Some((some, all)), .. } => {
                format!("has {some} of {all} virtual functions")
            }
            Self { others_in_group: others @ 1.., .. } => format!("shares its group with {others}"),
            Self { driver: Some(driver), .. } if driver == VFIO_DRIVER => "free".into(),
            Self { listed: true, .. } => "free, by annotation".into(),
            _ => "bind it to vfio-pci, or list it".into(),
        }
    }
}

/// The functions as a table, and below it a sentence on the way by which they are passed.
pub fn table(functions: &[Listed], way: &str) -> String {
    let mut text = format!(
        "{:<13} {:<9} {:<5} {:>5} {:>4}  {:<12} FOR PODS\n",
        "FUNCTION", "ID", "CLASS", "GROUP", "NODE", "DRIVER"
    );
    let number = |number: Option<u32>| number.map_or_else(|| "-".into(), |n| n.to_string());
    for function in functions {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<13} {:<9} {:<5} {:>5} {:>4}  {:<12} {}",
            function.address.to_string(),
            function.id,
            function.class,
            number(function.group),
            number(function.numa_node),
            function.driver.as_deref().unwrap_or("-"),
            function.verdict(),
        );
    }
    let _ = writeln!(text, "{way}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> Listed {
        Listed {
            address: "0000:21:10.0".parse().unwrap(),
            id: "8086:10ca".into(),
            class: "0200".into(),
            group: Some(10),
            others_in_group: 0,
            numa_node: Some(1),
            driver: Some("vfio-pci".into()),
            physical_function: None,
            virtual_functions: None,
            can_be_reset: true,
            device: None,
            listed: false,
            pod: None,
        }
    }

    #[test]
    fn verdict_tells_what_stands_in_the_way() {
        type Change = fn(&mut Listed);
        let cases: [(Change, &str); 8] = [
            (|_| {}, "free"),
            (|f| f.pod = Some("k8s.io/a".into()), "used by k8s.io/a"),
            (|f| f.group = None, "no IOMMU"),
            (|f| f.can_be_reset = false, "cannot be reset"),
            (|f| f.virtual_functions = Some((2, 7)), "has 2 of 7 virtual functions"),
            (|f| f.others_in_group = 2, "shares its group with 2"),
            (|f| f.driver = None, "bind it to vfio-pci"),
            (|f| (f.driver, f.listed) = (Some("igbvf".into()), true), "free, by annotation"),
        ];
        for (change, words) in cases {
            let mut function = function();
            change(&mut function);
            assert!(function.verdict().starts_with(words), "{words}: {}", function.verdict());
        }
    }

    #[test]
    fn functions_for_pods_are_told_from_others() {
        let other = Listed { driver: Some("ahci".into()), ..function() };
        assert!(function().is_for_pods() && !other.is_for_pods());
        assert!(Listed { listed: true, ..other }.is_for_pods());
        let table = table(&[function()], "functions are passed by iommufd");
        assert!(table.ends_with("\nfunctions are passed by iommufd\n"), "{table}");
        assert!(
            table.contains("0000:21:10.0  8086:10ca 0200     10    1  vfio-pci     free\n"),
            "{table}"
        );
    }
}

//! What a pod asks for, from its annotations and its spec's devices. Pure.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use vial_vmm_api::MAX_PASSED_FUNCTIONS;

use super::{ANNOTATION, DeviceError, address::Address};

/// Where VFIO's devices are.
const NODES: &str = "/dev/vfio";
/// The one that groups are joined to, which device plugins name beside the groups.
const CONTAINER: &str = "vfio";

/// The functions that a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// IOMMU groups whose functions are bound to vfio-pci already.
    pub groups: BTreeSet<u32>,
    /// Addresses that the pod's annotation names, all of them listed by the operator.
    pub addresses: BTreeSet<Address>,
}

impl Wanted {
    /// What annotations and devices say; `listed` is what the operator gives to pods by address.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn new<'a>(
        annotations: &HashMap<String, String>,
        devices: impl Iterator<Item = &'a Path>,
        listed: &[Address],
    ) -> Result<Self, DeviceError> {
        let groups: BTreeSet<u32> =
            devices.filter_map(|device| group_of(device).transpose()).collect::<Result<_, _>>()?;
        let words = annotations.get(ANNOTATION).map_or("", String::as_str);
        let mut addresses = BTreeSet::new();
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let address = word.parse()?;
            if !listed.contains(&address) {
                return Err(DeviceError::NotListed(address));
            }
            addresses.insert(address);
            if addresses.len() > MAX_PASSED_FUNCTIONS {
                return Err(DeviceError::TooMany(MAX_PASSED_FUNCTIONS));
            }
        }
        if groups.len() > MAX_PASSED_FUNCTIONS {
            return Err(DeviceError::TooMany(MAX_PASSED_FUNCTIONS));
        }
        Ok(Self { groups, addresses })
    }

    /// Whether it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.addresses.is_empty()
    }
}

/// The group that a device of a spec stands for, when it is one of VFIO's.
///
/// # Errors
/// [`DeviceError::Node`].
pub fn group_of(device: &Path) -> Result<Option<u32>, DeviceError> {
    let Ok(name) = device.strip_prefix(NODES) else { return Ok(None) };
    let name = name.to_str().unwrap_or_default();
    if name == CONTAINER {
        return Ok(None);
    }
    let number = name.bytes().all(|byte| byte.is_ascii_digit()).then(|| name.parse().ok());
    let shown = || DeviceError::Node(device.display().to_string().chars().take(64).collect());
    number.flatten().map(Some).ok_or_else(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(annotation: &str, devices: &[&str], listed: &[&str]) -> Result<Wanted, DeviceError> {
        let annotations = HashMap::from([(ANNOTATION.to_owned(), annotation.to_owned())]);
        let listed: Vec<Address> = listed.iter().map(|text| text.parse().unwrap()).collect();
        Wanted::new(&annotations, devices.iter().map(Path::new), &listed)
    }

    #[test]
    fn groups_and_listed_addresses_are_taken_once() {
        let devices =
            ["/dev/vfio/vfio", "/dev/vfio/12", "/dev/fuse", "/dev/vfio/3", "/dev/vfio/12"];
        let found = wanted(
            "0000:21:10.2, 0000:21:10.0,,0000:21:10.2",
            &devices,
            &["0000:21:10.0", "0000:21:10.2"],
        )
        .unwrap();
        assert_eq!(found.groups.into_iter().collect::<Vec<_>>(), [3, 12]);
        assert_eq!(found.addresses.len(), 2);
        assert!(wanted("", &["/dev/null"], &[]).unwrap().is_empty());
    }

    #[test]
    fn what_the_operator_does_not_list_is_refused() {
        let error = wanted("0000:21:10.0", &[], &["0000:21:10.2"]).unwrap_err();
        assert!(matches!(error, DeviceError::NotListed(_)), "{error}");
        let error = wanted("/sys/bus/pci", &[], &[]).unwrap_err();
        assert!(matches!(error, DeviceError::Address(_)), "{error}");
    }

    #[test]
    fn nodes_that_are_no_groups_are_refused() {
        for node in [
            "/dev/vfio/noiommu-0",
            "/dev/vfio/devices/vfio0",
            "/dev/vfio/-1",
            "/dev/vfio/",
            "/dev/vfio/99999999999",
        ] {
            let error = wanted("", &[node], &[]).unwrap_err();
            assert!(matches!(error, DeviceError::Node(_)), "{node}: {error}");
        }
    }

    #[test]
    fn more_than_a_vm_can_have_are_refused() {
        let all: Vec<String> = (0..=MAX_PASSED_FUNCTIONS)
            .map(|n| format!("0000:21:{:02x}.{}", n / 8, n % 8))
            .collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        assert!(wanted(&all[1..].join(","), &[], &all).is_ok());
        let error = wanted(&all.join(","), &[], &all).unwrap_err();
        assert!(matches!(error, DeviceError::TooMany(_)), "{error}");
        let groups: Vec<String> =
            (0..=MAX_PASSED_FUNCTIONS).map(|n| format!("/dev/vfio/{n}")).collect();
        let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
        assert!(matches!(wanted("", &groups, &[]), Err(DeviceError::TooMany(_))));
    }
}

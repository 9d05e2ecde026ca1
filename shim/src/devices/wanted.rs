//! What a pod asks for, from its annotations and its spec's devices. Pure but for which group a
//! function is in.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use vial_vmm_api::MAX_PASSED_FUNCTIONS;

use super::{
    ANNOTATION, DeviceError,
    address::Address,
    number,
    passed::Asked,
    pci::Sysfs,
    ways::{self, Node},
};

/// Where VFIO's devices are.
const NODES: &str = "/dev/vfio";
/// The one that groups are joined to, which device plugins name beside the groups. `/dev/iommu`,
/// which they name beside functions, is not there.
const CONTAINER: &str = "vfio";

/// The functions that a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// IOMMU groups whose functions are bound to vfio-pci already.
    pub groups: BTreeSet<u32>,
    /// Functions that are bound to vfio-pci already.
    pub nodes: BTreeSet<Node>,
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
        let (mut groups, mut nodes) = (BTreeSet::new(), BTreeSet::new());
        for device in devices {
            match named_by(device)? {
                None => {}
                Some(Named::Group(group)) => drop(groups.insert(group)),
                Some(Named::Function(node)) => drop(nodes.insert(node)),
            }
        }
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
        if groups.len().max(nodes.len()) > MAX_PASSED_FUNCTIONS {
            return Err(DeviceError::TooMany(MAX_PASSED_FUNCTIONS));
        }
        Ok(Self { groups, nodes, addresses })
    }

    /// Whether it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.nodes.is_empty() && self.addresses.is_empty()
    }

    /// What devices of a spec name, by the groups that it is in.
    ///
    /// # Errors
    /// [`DeviceError::NoFunction`] and [`DeviceError::NoIommu`].
    pub fn by_group(&self, sysfs: &Sysfs) -> Result<BTreeMap<u32, Self>, DeviceError> {
        let mut found: BTreeMap<u32, Self> = BTreeMap::new();
        for group in &self.groups {
            found.entry(*group).or_default().groups.insert(*group);
        }
        for node in &self.nodes {
            let (_, group) = place_of(sysfs, *node)?;
            found.entry(group).or_default().nodes.insert(*node);
        }
        Ok(found)
    }

    /// The functions that a container's devices stand for, beside those that its pod asks for by address.
    ///
    /// # Errors
    /// [`DeviceError::NoFunction`] and [`DeviceError::NoIommu`].
    pub fn asked(&self, sysfs: &Sysfs, of_pod: &BTreeSet<Address>) -> Result<Asked, DeviceError> {
        let nodes = self.nodes.iter().map(|node| Ok((place_of(sysfs, *node)?.0, *node)));
        let nodes = nodes.collect::<Result<_, DeviceError>>()?;
        Ok(Asked { groups: self.groups.clone(), nodes, addresses: of_pod.clone() })
    }

    /// Asks for what the other asks for, too.
    pub fn extend(&mut self, other: Self) {
        self.groups.extend(other.groups);
        self.nodes.extend(other.nodes);
        self.addresses.extend(other.addresses);
    }
}

/// The device of a group.
pub fn group_path(group: u32) -> PathBuf {
    Path::new(NODES).join(group.to_string())
}

/// The function that a device is of, and its group.
///
/// # Errors
/// [`DeviceError::NoFunction`] and [`DeviceError::NoIommu`].
pub fn place_of(sysfs: &Sysfs, node: Node) -> Result<(Address, u32), DeviceError> {
    let address = sysfs.of_vfio_node(node).ok_or(DeviceError::NoFunction(node))?;
    Ok((address, sysfs.group(address).ok_or(DeviceError::NoIommu(address))?))
}

/// What a device of a spec stands for.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Group(u32),
    Function(Node),
}

/// What a device of a spec stands for, when it is one of VFIO's.
fn named_by(device: &Path) -> Result<Option<Named>, DeviceError> {
    let Ok(name) = device.strip_prefix(NODES) else { return Ok(None) };
    if name == Path::new(CONTAINER) {
        return Ok(None);
    }
    let named = match device.strip_prefix(ways::DEVICES) {
        Ok(name) => name.to_str().and_then(Node::of_name).map(Named::Function),
        Err(_) => name.to_str().and_then(number).map(Named::Group),
    };
    let shown = || DeviceError::Node(device.display().to_string().chars().take(64).collect());
    named.map(Some).ok_or_else(shown)
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
    fn functions_are_taken_by_their_own_devices() {
        let devices = ["/dev/iommu", "/dev/vfio/devices/vfio12", "/dev/vfio/7", "/dev/vfio/vfio"];
        let found = wanted("", &devices, &[]).unwrap();
        assert_eq!(found.nodes.into_iter().collect::<Vec<_>>(), [Node(12)]);
        assert_eq!(found.groups.into_iter().collect::<Vec<_>>(), [7]);
        assert!(wanted("", &["/dev/iommu"], &[]).unwrap().is_empty());
    }

    #[test]
    fn nodes_that_are_neither_groups_nor_functions_are_refused() {
        for node in [
            "/dev/vfio/noiommu-0",
            "/dev/vfio/devices/noiommu-vfio0",
            "/dev/vfio/devices/0",
            "/dev/vfio/devices/vfio",
            "/dev/vfio/devices/../12",
            "/dev/vfio/devices",
            "/dev/vfio/vfio0",
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
        let nodes: Vec<String> =
            (0..=MAX_PASSED_FUNCTIONS).map(|n| format!("/dev/vfio/devices/vfio{n}")).collect();
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        assert!(matches!(wanted("", &nodes, &[]), Err(DeviceError::TooMany(_))));
    }
}

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::{super::ways::Node, *};

/// A tree like sysfs. Its files only keep what is written: what the kernel does by it, no test of
/// a tree can show.
struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for directory in ["bus/pci/devices", "bus/pci/drivers/vfio-pci", "kernel/iommu_groups"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        fs::write(root.path().join("bus/pci/drivers_probe"), "").unwrap();
        Self { root }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.path().join(below)
    }

    fn add(&self, address: &str, group: Option<u32>, driver: Option<&str>, class: &str) {
        let device = self.path("bus/pci/devices").join(address);
        fs::create_dir(&device).unwrap();
        for (name, text) in [("class", class), ("reset", ""), ("driver_override", "(null)\n")] {
            fs::write(device.join(name), text).unwrap();
        }
        if let Some(group) = group {
            let members = self.path(&format!("kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&members).unwrap();
            symlink(&device, members.join(address)).unwrap();
            symlink(members.parent().unwrap(), device.join("iommu_group")).unwrap();
        }
        if let Some(driver) = driver {
            let driver = self.path("bus/pci/drivers").join(driver);
            fs::create_dir_all(&driver).unwrap();
            fs::write(driver.join("unbind"), "").unwrap();
            fs::write(driver.join("bind"), "").unwrap();
            symlink(driver, device.join("driver")).unwrap();
        }
    }

    /// As the kernel does when a function comes to vfio-pci.
    fn add_node(&self, number: u32, address: &str) {
        let class = self.path(&format!("class/vfio-dev/vfio{number}"));
        fs::create_dir_all(&class).unwrap();
        symlink(self.path("bus/pci/devices").join(address), class.join("device")).unwrap();
    }

    fn sysfs(&self) -> Sysfs {
        Sysfs::at(self.root.path())
    }
}

const CARD: &str = "0x020000";
const BRIDGE: &str = "0x060400";

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn wanted(groups: &[u32], addresses: &[&str]) -> Wanted {
    Wanted {
        groups: groups.iter().copied().collect(),
        nodes: BTreeSet::new(),
        addresses: addresses.iter().map(|text| address(text)).collect::<BTreeSet<_>>(),
    }
}

#[test]
fn what_is_fit_is_recorded_with_the_driver_that_it_came_from() {
    let tree = Tree::new();
    tree.add("0000:21:10.0", Some(6), Some("igbvf"), CARD);
    tree.add("0000:21:10.2", Some(7), Some("vfio-pci"), CARD);
    tree.add("0000:20:00.0", Some(7), Some("pcieport"), BRIDGE);
    let records = check(&tree.sysfs(), &wanted(&[7], &["0000:21:10.0"])).unwrap();
    let of = |text: &str, group, bound_here, driver: &str| Record {
        address: address(text),
        group,
        bound_here,
        driver: Some(driver.into()),
    };
    assert_eq!(
        records,
        [of("0000:21:10.0", 6, true, "igbvf"), of("0000:21:10.2", 7, false, "vfio-pci")]
    );
}

#[test]
fn function_is_the_same_by_its_device_its_group_and_its_address() {
    let tree = Tree::new();
    tree.add("0000:21:10.0", Some(6), Some("vfio-pci"), CARD);
    tree.add_node(3, "0000:21:10.0");
    let sysfs = tree.sysfs();
    let by_node = Wanted { nodes: [Node(3)].into(), ..Wanted::default() };
    let by_all = Wanted { nodes: [Node(3)].into(), ..wanted(&[6], &["0000:21:10.0"]) };
    let records = check(&sysfs, &by_node).unwrap();
    assert_eq!((records.len(), records[0].group, records[0].bound_here), (1, 6, false));
    assert_eq!(check(&sysfs, &wanted(&[6], &[])).unwrap(), records);
    assert_eq!(check(&sysfs, &by_all).unwrap(), records);
    assert_eq!(by_all.by_group(&sysfs).unwrap().keys().copied().collect::<Vec<_>>(), [6]);
}

#[test]
fn device_of_a_function_is_refused_with_a_stranger_in_its_group_and_without_vfio() {
    let tree = Tree::new();
    tree.add("0000:21:10.0", Some(6), Some("vfio-pci"), CARD);
    tree.add("0000:21:10.1", Some(6), Some("vfio-pci"), CARD);
    tree.add("0000:21:10.2", Some(7), Some("igbvf"), CARD);
    for (number, address) in [(0, "0000:21:10.0"), (1, "0000:21:10.1"), (2, "0000:21:10.2")] {
        tree.add_node(number, address);
    }
    let told = |numbers: &[u32]| {
        let nodes = numbers.iter().copied().map(Node).collect();
        let found = check(&tree.sysfs(), &Wanted { nodes, ..Wanted::default() });
        found.map_err(|error| error.to_string())
    };
    // The kernel would give it out alone: they can reach each other all the same.
    let error = told(&[0]).unwrap_err();
    assert!(error.contains("0000:21:10.1") && error.contains("all of the group"), "{error}");
    assert_eq!(told(&[0, 1]).unwrap().len(), 2);
    let error = told(&[2]).unwrap_err();
    assert!(error.contains("not bound to vfio-pci but to igbvf"), "{error}");
    let error = told(&[9]).unwrap_err();
    assert!(error.contains("/dev/vfio/devices/vfio9"), "{error}");
}

#[test]
fn stranger_in_the_group_is_named() {
    let tree = Tree::new();
    tree.add("0000:00:1f.0", Some(3), None, "0x060100");
    tree.add("0000:00:1f.2", Some(3), Some("ahci"), "0x010601");
    let error = check(&tree.sysfs(), &wanted(&[], &["0000:00:1f.0"])).unwrap_err().to_string();
    assert!(error.contains("0000:00:1f.2") && error.contains("ahci"), "{error}");
    let error = check(&tree.sysfs(), &wanted(&[3], &[])).unwrap_err().to_string();
    assert!(error.contains("0000:00:1f.0 in IOMMU group 3"), "{error}");
    // Both together have no stranger.
    check(&tree.sysfs(), &wanted(&[], &["0000:00:1f.0", "0000:00:1f.2"])).unwrap();
}

#[test]
fn what_is_not_fit_is_named_with_a_remedy() {
    let tree = Tree::new();
    tree.add("0000:21:10.0", None, Some("igbvf"), CARD);
    tree.add("0000:21:10.2", Some(7), Some("igbvf"), CARD);
    tree.add("0000:21:10.4", Some(8), Some("vfio-pci"), CARD);
    fs::remove_file(tree.path("bus/pci/devices/0000:21:10.4/reset")).unwrap();
    for (wanted, words) in [
        (wanted(&[], &["0000:21:11.0"]), "no PCI function 0000:21:11.0"),
        (wanted(&[], &["0000:21:10.0"]), "intel_iommu=on"),
        (wanted(&[7], &[]), "not bound to vfio-pci but to igbvf"),
        (wanted(&[8], &[]), "cannot be reset"),
        (wanted(&[9], &[]), "no IOMMU group 9"),
    ] {
        let error = check(&tree.sysfs(), &wanted).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn driver_that_does_not_take_a_function_is_told() {
    let tree = Tree::new();
    tree.add("0000:21:10.0", Some(6), Some("igbvf"), CARD);
    let records = check(&tree.sysfs(), &wanted(&[], &["0000:21:10.0"])).unwrap();
    // No kernel moves the link here.
    let error = bind(&tree.sysfs(), &records).unwrap_err();
    assert!(matches!(error, DeviceError::NotTaken(_)), "{error}");
    let read = |path: &str| fs::read_to_string(tree.path(path)).unwrap();
    assert_eq!(read("bus/pci/devices/0000:21:10.0/driver_override"), "vfio-pci");
    assert_eq!(read("bus/pci/drivers/igbvf/unbind"), "0000:21:10.0");
    assert_eq!(read("bus/pci/drivers_probe"), "0000:21:10.0");
    fs::remove_dir_all(tree.path("bus/pci/drivers/vfio-pci")).unwrap();
    let error = bind(&tree.sysfs(), &records).unwrap_err().to_string();
    assert!(error.contains("modprobe"), "{error}");
}

#[test]
fn function_is_given_back_from_vfio_and_left_to_whoever_else_has_it() {
    let tree = Tree::new();
    let device = |below: &str| tree.path("bus/pci/devices/0000:21:10.0").join(below);
    tree.add("0000:21:10.0", Some(6), Some("other"), CARD);
    let record = |driver: Option<&str>| Record {
        address: address("0000:21:10.0"),
        group: 6,
        bound_here: true,
        driver: driver.map(str::to_owned),
    };
    fs::create_dir_all(tree.path("bus/pci/drivers/igbvf")).unwrap();
    // Somebody else took it.
    give_back(&tree.sysfs(), &[record(Some("igbvf"))]).unwrap();
    assert_eq!(fs::read_to_string(device("driver_override")).unwrap(), "\n");
    assert!(!tree.path("bus/pci/drivers/igbvf/bind").exists());
    // It is free.
    fs::remove_file(device("driver")).unwrap();
    give_back(&tree.sysfs(), &[record(None)]).unwrap();
    assert!(!tree.path("bus/pci/drivers/igbvf/bind").exists());
    give_back(&tree.sysfs(), &[record(Some("igbvf"))]).unwrap();
    let bind = fs::read_to_string(tree.path("bus/pci/drivers/igbvf/bind")).unwrap();
    assert_eq!(bind, "0000:21:10.0");
    // Not bound here: not touched. Gone: nothing to do.
    fs::write(device("driver_override"), "kept").unwrap();
    let not_ours = Record { bound_here: false, ..record(Some("vfio-pci")) };
    give_back(&tree.sysfs(), &[not_ours]).unwrap();
    assert_eq!(fs::read_to_string(device("driver_override")).unwrap(), "kept");
    fs::remove_dir_all(Path::new(&device(""))).unwrap();
    give_back(&tree.sysfs(), &[record(Some("igbvf"))]).unwrap();
}

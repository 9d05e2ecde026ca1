//! Tests of nodes, over trees as sysfs and devtmpfs have them.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use serde_json::json;

use super::*;

const ROOT: &str = "devices/pci0000:00";

/// A guest of files.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for directory in ["dev/block", "dev/char", FUNCTIONS, ROOT] {
            fs::create_dir_all(tree.sys().join(directory)).unwrap();
        }
        fs::create_dir(tree.dev()).unwrap();
        tree
    }

    fn sys(&self) -> PathBuf {
        self.0.path().join("sys")
    }

    fn dev(&self) -> PathBuf {
        self.0.path().join("dev")
    }

    fn function(&self, device: u32, class: &str, driver: bool) {
        let address = address(device);
        let at = self.sys().join(ROOT).join(&address);
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join("class"), format!("{class}\n")).unwrap();
        if driver {
            fs::create_dir(at.join("driver")).unwrap();
        }
        let target = Path::new("../../..").join(ROOT).join(&address);
        symlink(target, self.sys().join(FUNCTIONS).join(address)).unwrap();
    }

    /// A device in sysfs, at `at` below it.
    fn listed(&self, kind: LinuxDeviceType, numbers: (u32, u32), at: &str, name: &str) {
        let (major, minor) = numbers;
        let directory = self.sys().join(at);
        fs::create_dir_all(&directory).unwrap();
        let uevent = format!("MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\n");
        fs::write(directory.join("uevent"), uevent).unwrap();
        let link = if kind == LinuxDeviceType::B { "dev/block" } else { "dev/char" };
        let link = self.sys().join(link).join(format!("{major}:{minor}"));
        symlink(Path::new("../..").join(at), link).unwrap();
    }

    /// Its node.
    fn made(&self, kind: LinuxDeviceType, (major, minor): (u32, u32), name: &str) {
        let node = self.dev().join(name);
        fs::create_dir_all(node.parent().unwrap()).unwrap();
        let kind = match kind {
            LinuxDeviceType::B => FileType::BlockDevice,
            _ => FileType::CharacterDevice,
        };
        let mode = Mode::from_raw_mode(0o600);
        mknodat(CWD, &node, kind, mode, makedev(major, minor)).expect("run the tests as root");
    }

    fn device(&self, kind: LinuxDeviceType, numbers: (u32, u32), at: &str, name: &str) {
        self.listed(kind, numbers, at, name);
        self.made(kind, numbers, name);
    }

    /// The names of what the functions have, after `patience`.
    fn names(&self, devices: &[u32], patience: Duration) -> Result<Vec<String>, FunctionError> {
        let given: Vec<GivenFunction> = devices.iter().copied().map(given).collect();
        let functions = functions(&given)?;
        let (sys, dev) = (self.sys(), self.dev());
        let found = of_tree(&sys, &dev, &functions, patience);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let name = |node: Node| node.path.strip_prefix(&dev).unwrap().display().to_string();
        Ok(runtime.block_on(found)?.into_iter().map(name).collect())
    }
}

fn address(device: u32) -> String {
    format!("0000:00:{device:02x}.0")
}

fn given(device: u32) -> GivenFunction {
    GivenFunction { device, ..Default::default() }
}

const B: LinuxDeviceType = LinuxDeviceType::B;
const C: LinuxDeviceType = LinuxDeviceType::C;

/// A disk of an NVMe controller, as Linux has it.
fn nvme(tree: &Tree, device: u32, number: u32) {
    let controller = format!("{ROOT}/{}/nvme/nvme{number}", address(device));
    tree.device(C, (241, number), &controller, &format!("nvme{number}"));
    tree.device(C, (242, number), &format!("{controller}/ng{number}n1"), &format!("ng{number}n1"));
    let disk = format!("{controller}/nvme{number}n1");
    tree.device(B, (259, 2 * number), &disk, &format!("nvme{number}n1"));
    let (part, name) = (format!("{disk}/nvme{number}n1p1"), format!("nvme{number}n1p1"));
    tree.device(B, (259, 2 * number + 1), &part, &name);
}

#[test]
fn disk_has_all_nodes_of_its_function_and_no_others() {
    let tree = Tree::new();
    for (device, number) in [(5, 0), (6, 1)] {
        tree.function(device, "0x010802", true);
        nvme(&tree, device, number);
    }
    tree.device(C, (10, 1), "devices/virtual/misc/nvme-fabrics", "nvme-fabrics");
    // The bus's own, and a function whose address begins alike.
    tree.device(C, (10, 2), ROOT, "bus");
    tree.device(C, (10, 3), &format!("{ROOT}/{}1/x", address(5)), "x");
    let none = Duration::ZERO;
    assert_eq!(tree.names(&[5], none).unwrap(), ["ng0n1", "nvme0", "nvme0n1", "nvme0n1p1"]);
    assert_eq!(tree.names(&[6], none).unwrap(), ["ng1n1", "nvme1", "nvme1n1", "nvme1n1p1"]);
    assert_eq!(tree.names(&[], none).unwrap(), [""; 0]);
}

#[test]
fn node_that_comes_late_is_waited_for_and_not_for_ever() {
    let tree = Tree::new();
    tree.function(5, "0x010802", true);
    let at = format!("{ROOT}/{}/nvme/nvme0", address(5));
    tree.device(C, (241, 0), &at, "nvme0");
    tree.listed(B, (259, 0), &format!("{at}/nvme0n1"), "nvme0n1");
    let start = Instant::now();
    assert_eq!(tree.names(&[5], Duration::from_millis(50)).unwrap(), ["nvme0"]);
    assert!(start.elapsed() >= Duration::from_millis(50));
    // In sysfs before it is in /dev, as the kernel has it.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            tree.made(B, (259, 0), "nvme0n1");
        });
        assert_eq!(tree.names(&[5], Duration::from_secs(60)).unwrap(), ["nvme0", "nvme0n1"]);
    });
}

#[test]
fn function_that_makes_no_nodes_is_not_waited_for() {
    let tree = Tree::new();
    // A network card, a disk that has no driver, and one that has gone.
    tree.function(5, "0x020000", true);
    tree.function(6, "0x010802", false);
    let start = Instant::now();
    assert_eq!(tree.names(&[5, 6, 7], Duration::from_secs(60)).unwrap(), [""; 0]);
    assert!(start.elapsed() < Duration::from_secs(30));
    tree.device(C, (250, 0), &format!("{ROOT}/{}/ptp/ptp0", address(5)), "ptp0");
    assert_eq!(tree.names(&[5, 6, 7], Duration::from_secs(60)).unwrap(), ["ptp0"]);
}

#[test]
fn what_is_not_as_the_kernel_made_it_is_left_out() {
    let tree = Tree::new();
    tree.function(5, "0x020000", true);
    let at = |name: &str| format!("{ROOT}/{}/{name}", address(5));
    tree.listed(C, (10, 1), &at("out"), "../out");
    tree.made(C, (10, 1), "../out");
    // Another device's node, a file and a link in its place.
    tree.listed(C, (10, 2), &at("other"), "other");
    tree.made(C, (10, 9), "other");
    tree.listed(B, (10, 3), &at("kind"), "kind");
    tree.made(C, (10, 3), "kind");
    tree.listed(C, (10, 4), &at("file"), "file");
    fs::write(tree.dev().join("file"), "").unwrap();
    tree.listed(C, (10, 5), &at("link"), "link");
    symlink("other", tree.dev().join("link")).unwrap();
    tree.device(C, (10, 6), &at("dri/card0"), "dri/card0");
    assert_eq!(tree.names(&[5], Duration::ZERO).unwrap(), ["dri/card0"]);
}

#[test]
fn links_are_followed_within_sysfs_alone() {
    let resolved = |link: &str, target: &str| resolve(Path::new(link), Path::new(target));
    assert_eq!(resolved("dev/block/1:2", "../../devices/x"), Some("devices/x".into()));
    for out in ["../../../etc", "/devices/x"] {
        assert_eq!(resolved("dev/block/1:2", out), None, "{out}");
    }
}

#[test]
fn more_nodes_than_a_container_can_have_are_refused() {
    let tree = Tree::new();
    tree.function(5, "0x020000", true);
    for minor in 0..MAX_NODES as u32 {
        let name = format!("x{minor}");
        tree.device(C, (10, minor), &format!("{ROOT}/{}/{name}", address(5)), &name);
    }
    assert_eq!(tree.names(&[5], Duration::ZERO).unwrap().len(), MAX_NODES);
    tree.device(C, (11, 0), &format!("{ROOT}/{}/y", address(5)), "y");
    let error = tree.names(&[5], Duration::ZERO).unwrap_err();
    assert!(matches!(error, FunctionError::TooManyNodes(_)) && !error.is_of_the_request());
}

#[test]
fn requests_past_the_bounds_are_refused() {
    let asked = |path: &str| GivenFunction { asked_by: path.into(), ..given(5) };
    for wrong in [
        vec![given(0)],
        vec![given(32)],
        vec![given(5); vial_agent_protocol::MAX_FUNCTIONS + 1],
        vec![asked("dev/vfio/5")],
        vec![asked("/dev/../vfio")],
        vec![asked(&format!("/{}", "a".repeat(4095)))],
    ] {
        assert!(functions(&wrong).unwrap_err().is_of_the_request(), "{wrong:?}");
    }
}

fn node_of(path: &str, kind: LinuxDeviceType, numbers: (u32, u32), asked_by: &str) -> Node {
    let asked_by = (!asked_by.is_empty()).then(|| asked_by.into());
    let (major, minor) = numbers;
    Node { kind, major, minor, path: path.into(), mode: 0o600, uid: 0, gid: 0, asked_by }
}

#[test]
fn nodes_are_for_whom_the_device_of_the_host_was_for() {
    let mut spec: Spec = serde_json::from_value(json!({
        "ociVersion": "1.2.0",
        "mounts": [{"destination": "/dev/ng0n1", "type": "tmpfs"}],
        "linux": {
            "devices": [
                {"path": "/dev/vfio/7", "type": "c", "major": 243, "minor": 0,
                    "fileMode": 0o20660, "uid": 1000, "gid": 50},
                {"path": "/dev/nvme1n1", "type": "b", "major": 254, "minor": 0}
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }
    }))
    .unwrap();
    let nodes = [
        node_of("/dev/nvme0n1", B, (259, 0), "/dev/vfio/7"),
        node_of("/dev/nvme1n1", B, (259, 1), ""),
        node_of("/dev/nvme2", C, (241, 2), ""),
        node_of("/dev/ng0n1", C, (242, 0), "/dev/vfio/7"),
    ];
    let asked = asked_by(&spec, &nodes);
    assert_eq!(asked.len(), 1);
    let taken = add_to(&mut spec, &nodes, &asked);
    assert_eq!(taken, [Path::new("/dev/nvme1n1"), Path::new("/dev/ng0n1")]);
    // A second time, they are there.
    assert_eq!(add_to(&mut spec, &nodes, &asked), taken);
    let spec = serde_json::to_value(&spec).unwrap();
    let devices = spec["linux"]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 4);
    let disk = json!({"path": "/dev/nvme0n1", "type": "b", "major": 259, "minor": 0,
        "fileMode": 0o660, "uid": 1000, "gid": 50});
    let controller = json!({"path": "/dev/nvme2", "type": "c", "major": 241, "minor": 2,
        "fileMode": 0o600, "uid": 0, "gid": 0});
    assert_eq!(devices[2..], [disk, controller]);
    let rules = spec["linux"]["resources"]["devices"].as_array().unwrap();
    let rule = |kind: &str, major: u32, minor: u32| json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": "rw"});
    assert_eq!(rules[1..], [rule("b", 259, 0), rule("c", 241, 2)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Devices below functions, at any depth, and elsewhere: a container has those of its functions.
    #[test]
    fn nodes_are_those_below_the_functions(
        devices in prop::collection::vec(
            (prop::option::of(1..6u32), any::<bool>(), 1..4usize, any::<bool>()), 0..24),
        mine in prop::collection::btree_set(1..6u32, 0..4),
    ) {
        let tree = Tree::new();
        (1..6).for_each(|device| tree.function(device, "0xff0000", true));
        let mut due = BTreeSet::new();
        for (number, (function, is_block, depth, is_made)) in (0u32..).zip(devices) {
            let kind = if is_block { B } else { C };
            let name = match number % 3 {
                0 => format!("group/x{number}"),
                _ => format!("x{number}"),
            };
            let above = match function {
                Some(function) => format!("{ROOT}/{}", address(function)),
                None => "devices/virtual".into(),
            };
            let at = format!("{above}{}", format!("/x{number}").repeat(depth));
            tree.listed(kind, (200, number), &at, &name);
            if is_made {
                tree.made(kind, (200, number), &name);
                due.extend(function.filter(|one| mine.contains(one)).map(|_| name));
            }
        }
        let mine: Vec<u32> = mine.into_iter().collect();
        let found = tree.names(&mine, Duration::ZERO).unwrap();
        prop_assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), due);
    }
}

//! By which way functions are passed on this host: by iommufd, or by VFIO's groups and a container.
//! Pure but for looking at names.
//!
//! Kernels have the one (CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV), the other
//! (CONFIG_VFIO_GROUP), or both. A function opened by the one cannot be opened by the other
//! meanwhile.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{address::Address, pci::Sysfs};

/// iommufd.
pub const IOMMUFD: &str = "/dev/iommu";
/// Where the devices are that functions have for themselves.
pub const DEVICES: &str = "/dev/vfio/devices";
/// How those are called, before their number.
const NAME: &str = "vfio";

/// A way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By iommufd.
    Iommufd,
    /// By groups and a container.
    Groups,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Iommufd => "iommufd",
            Self::Groups => "IOMMU groups",
        })
    }
}

/// The device that a function bound to vfio-pci has for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node(pub u32);

impl Node {
    /// What a file's name says, as sysfs and /dev have it.
    pub fn of_name(name: &str) -> Option<Self> {
        name.strip_prefix(NAME).and_then(super::number).map(Self)
    }

    /// Where it is.
    pub fn path(self) -> PathBuf {
        Path::new(DEVICES).join(self.to_string())
    }
}

impl std::fmt::Display for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{NAME}{}", self.0)
    }
}

/// The way for functions that are bound to vfio-pci: iommufd where it is there and each of them has
/// a device, unless the configuration says otherwise.
pub fn choose(allowed: bool, iommufd: &Path, sysfs: &Sysfs, functions: &[Address]) -> Way {
    let have_devices = || functions.iter().all(|address| sysfs.vfio_node(*address).is_some());
    match allowed && iommufd.exists() && have_devices() {
        true => Way::Iommufd,
        false => Way::Groups,
    }
}

/// What the host's kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Whether there are IOMMU groups, which is whether there is an IOMMU that is on.
    pub has_iommu: bool,
    /// Whether it has iommufd.
    pub has_iommufd: bool,
    /// Whether functions have devices for themselves.
    pub has_devices: bool,
    /// Whether groups have.
    pub has_groups: bool,
}

impl Host {
    /// What can be seen below `root`, that of the host's tree of files. Nothing of VFIO's can,
    /// before its modules are loaded.
    pub fn look(root: &Path) -> Self {
        let groups = fs::read_dir(root.join("sys/kernel/iommu_groups"));
        let drivers = fs::read_to_string(root.join("proc/devices")).unwrap_or_default();
        // Ranges of numbers that drivers have taken, with their names (proc(5)).
        let has =
            |name: &str| drivers.lines().any(|line| line.split(' ').next_back() == Some(name));
        Self {
            has_iommu: groups.is_ok_and(|mut groups| groups.next().is_some()),
            has_iommufd: root.join(IOMMUFD.trim_start_matches('/')).exists(),
            has_devices: has("vfio-dev"),
            has_groups: has("vfio"),
        }
    }

    /// The way for functions, and a sentence about it, with what is missing.
    pub fn way(self, allowed: bool) -> (Option<Way>, String) {
        if !self.has_iommu {
            let text = "no function can be passed: there is no IOMMU; enable VT-d or AMD-Vi in the \
                        firmware, and boot with intel_iommu=on or amd_iommu=on";
            return (None, text.into());
        }
        let (way, why) = match self {
            Self { has_devices: false, has_groups: false, .. } => {
                let text = "no function can be passed: VFIO is not loaded; `modprobe vfio-pci`";
                return (None, text.into());
            }
            Self { has_iommufd: true, has_devices: true, .. } if allowed => {
                (Way::Iommufd, format!("{IOMMUFD}, {DEVICES}"))
            }
            Self { has_groups: false, .. } => {
                let missing = match allowed {
                    true => format!("there is no {IOMMUFD}; `modprobe iommufd`"),
                    false => "set `iommufd = true`".to_owned(),
                };
                let text = format!(
                    "no function can be passed: the kernel has none by IOMMU groups \
                     (CONFIG_VFIO_GROUP), and {missing}"
                );
                return (None, text);
            }
            _ if !allowed => (Way::Groups, "`iommufd = false`".into()),
            Self { has_iommufd: false, .. } => {
                (Way::Groups, format!("there is no {IOMMUFD} (CONFIG_IOMMUFD)"))
            }
            _ => {
                let text = "functions have no devices of their own (CONFIG_VFIO_DEVICE_CDEV)";
                (Way::Groups, text.into())
            }
        };
        (Some(way), format!("functions are passed by {way}: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const BOTH: Host =
        Host { has_iommu: true, has_iommufd: true, has_devices: true, has_groups: true };

    #[test]
    fn way_is_told_with_what_is_missing() {
        let iommufd = Some(Way::Iommufd);
        let groups = Some(Way::Groups);
        for (host, allowed, way, words) in [
            (BOTH, true, iommufd, "by iommufd: /dev/iommu"),
            (Host { has_groups: false, ..BOTH }, true, iommufd, "by iommufd"),
            (BOTH, false, groups, "iommufd = false"),
            (Host { has_iommufd: false, ..BOTH }, true, groups, "CONFIG_IOMMUFD)"),
            (Host { has_devices: false, ..BOTH }, true, groups, "CONFIG_VFIO_DEVICE_CDEV"),
            (Host { has_groups: false, ..BOTH }, false, None, "iommufd = true"),
            (
                Host { has_groups: false, has_iommufd: false, ..BOTH },
                true,
                None,
                "modprobe iommufd",
            ),
            (Host { has_groups: false, has_devices: false, ..BOTH }, true, None, "vfio-pci"),
            (Host { has_iommu: false, ..BOTH }, true, None, "intel_iommu=on"),
        ] {
            let (found, text) = host.way(allowed);
            assert!(found == way && text.contains(words), "{host:?}: {found:?}: {text}");
        }
    }

    #[test]
    fn host_is_seen_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let nothing =
            Host { has_iommu: false, has_iommufd: false, has_devices: false, has_groups: false };
        assert_eq!(Host::look(root), nothing);
        for directory in ["proc", "dev", "sys/kernel/iommu_groups"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::write(root.join("proc/devices"), "Character devices:\n 10 misc\n243 vfio\n").unwrap();
        assert_eq!(Host::look(root), Host { has_groups: true, ..nothing });
        fs::write(root.join("proc/devices"), "Character devices:\n242 vfio-dev\n243 vfio\n")
            .unwrap();
        fs::write(root.join("dev/iommu"), "").unwrap();
        fs::create_dir(root.join("sys/kernel/iommu_groups/0")).unwrap();
        assert_eq!(Host::look(root), BOTH);
    }

    #[test]
    fn way_is_chosen_by_what_all_functions_have() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let functions: Vec<Address> =
            ["0000:3b:10.0", "0000:3b:10.2"].map(|text| text.parse().unwrap()).into();
        let iommufd = root.join("iommu");
        let chosen = |allowed| choose(allowed, &iommufd, &Sysfs::at(root), &functions);
        let of =
            |at: usize| root.join(format!("bus/pci/devices/{}/vfio-dev/vfio{at}", functions[at]));
        assert_eq!(chosen(true), Way::Groups);
        fs::write(&iommufd, "").unwrap();
        for at in [0, 1] {
            // Without a device's number, as kernels have it that make no device of it.
            fs::create_dir_all(of(at)).unwrap();
            assert_eq!(chosen(true), Way::Groups, "{at}");
            fs::write(of(at).join("dev"), "511:0\n").unwrap();
        }
        assert_eq!(chosen(true), Way::Iommufd);
        assert_eq!(chosen(false), Way::Groups);
        fs::remove_file(&iommufd).unwrap();
        assert_eq!(chosen(true), Way::Groups);
    }

    #[test]
    fn function_is_found_by_its_device() {
        let root = tempfile::tempdir().unwrap();
        let class = root.path().join("class/vfio-dev/vfio7");
        fs::create_dir_all(&class).unwrap();
        let sysfs = Sysfs::at(root.path());
        symlink("../../../0000:3b:10.2", class.join("device")).unwrap();
        assert_eq!(sysfs.of_vfio_node(Node(7)), "0000:3b:10.2".parse().ok());
        assert_eq!(sysfs.of_vfio_node(Node(8)), None);
        fs::remove_file(class.join("device")).unwrap();
        // A mediated device, which is no function.
        symlink("../../../83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", class.join("device")).unwrap();
        assert_eq!(sysfs.of_vfio_node(Node(7)), None);
    }

    #[test]
    fn nodes_are_called_as_the_kernel_does() {
        assert_eq!(Node::of_name("vfio12"), Some(Node(12)));
        assert_eq!(Node(12).path(), Path::new("/dev/vfio/devices/vfio12"));
        for name in ["vfio", "vfio-1", "vfio+1", "12", "vfio99999999999", "noiommu-vfio0", ""] {
            assert_eq!(Node::of_name(name), None, "{name}");
        }
    }
}

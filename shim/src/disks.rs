//! Block devices of the host that containers have: what a container asks for, and which of its pod's containers use which
//! disk of the VM. Pure.
//!
//! A block volume (Kubernetes' `volumeDevices`) is an entry of a spec's `linux.devices`, with the numbers that the host has
//! for it. The VM gets a disk for it when the first container comes, and loses it when the last one that has it goes.

pub mod cache;
pub mod limits;

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;
use vial_agent_protocol::is_plain_path;
use vial_vmm_api::MAX_LATE_DISKS;

use crate::spec::Device;

/// One of a spec's `linux.resources.devices`: what may be done with which devices. The last one that fits decides.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Rule {
    /// Whether it may be done.
    pub allow: bool,
    /// `a` for all, `b`, or `c`; all without it.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// All without it, or with one that is negative.
    #[serde(default)]
    pub major: Option<i64>,
    /// As the major number.
    #[serde(default)]
    pub minor: Option<i64>,
    /// Some of `r`, `w` and `m`.
    #[serde(default)]
    pub access: Option<String>,
}

impl Rule {
    fn is_for(&self, numbers: Option<(u32, u32)>, access: char) -> bool {
        let fits = |rule: Option<i64>, number: fn((u32, u32)) -> u32| {
            rule.is_none_or(|rule| rule < 0)
                || numbers.is_some_and(|numbers| rule == Some(i64::from(number(numbers))))
        };
        let of_kind = match self.kind.as_deref() {
            None | Some("a") => true,
            Some(kind) => numbers.is_some() && kind == "b",
        };
        of_kind
            && fits(self.major, |(major, _)| major)
            && fits(self.minor, |(_, minor)| minor)
            && self.access.as_deref().unwrap_or_default().contains(access)
    }
}

/// Whether the rules let a container do that with the block device of those numbers; without numbers, with every device.
fn allowed(rules: &[Rule], numbers: Option<(u32, u32)>, access: char) -> bool {
    let decides = |rule: &&Rule| rule.is_for(numbers, access);
    rules.iter().rev().find(decides).is_some_and(|rule| rule.allow)
}

/// Why a container does not get a block device.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Nobody can have it there.
    #[error("the container's block device {0:?} has no plain path; give it one without '..'")]
    Path(String),
    /// There is no such device.
    #[error("the container's block device {path:?} has the impossible numbers {major}:{minor}")]
    Numbers {
        /// Where the container has it.
        path: PathBuf,
        /// Its major number.
        major: i64,
        /// Its minor number.
        minor: i64,
    },
    /// There would be too many.
    #[error("the pod would have more than {MAX_LATE_DISKS} block devices; give it fewer")]
    TooMany,
    /// The host has none with those numbers.
    #[error(
        "the host has no block device {}:{} ({error}); is the volume attached to this node?",
        .numbers.0,
        .numbers.1
    )]
    Absent {
        /// Major and minor.
        numbers: (u32, u32),
        /// What went wrong.
        error: std::io::Error,
    },
    /// The annotation says something else.
    #[error(
        "the annotation {annotation} is '{0}'; it can be direct or writeback",
        annotation = cache::ANNOTATION
    )]
    Annotation(String),
    /// It cannot be opened.
    #[error(
        "cannot open the block device {path:?} of the host: {error}; does something else hold it?"
    )]
    Open {
        /// Its node.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
}

impl DiskError {
    /// Whether the pod's specification is at fault, rather than the host.
    pub fn is_of_the_pod(&self) -> bool {
        !matches!(self, Self::Absent { .. } | Self::Open { .. })
    }
}

/// A block device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Major and minor.
    pub numbers: (u32, u32),
    /// Whether it is only read.
    pub read_only: bool,
}

/// A block device that a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Where the container has it.
    pub path: String,
    /// Which it is.
    pub disk: Disk,
}

/// What a spec's devices ask for. A container that may use every device has those of its guest, and none of the host's.
///
/// # Errors
/// [`DiskError`].
pub fn wanted(devices: &[Device], rules: &[Rule]) -> Result<Vec<Wanted>, DiskError> {
    if "rwm".chars().all(|access| allowed(rules, None, access)) {
        return Ok(Vec::new());
    }
    let of_blocks = devices.iter().filter(|device| device.kind == "b");
    let wanted: Vec<Wanted> =
        of_blocks.map(|device| wanted_one(device, rules)).collect::<Result<_, _>>()?;
    if wanted.len() > MAX_LATE_DISKS { Err(DiskError::TooMany) } else { Ok(wanted) }
}

fn wanted_one(device: &Device, rules: &[Rule]) -> Result<Wanted, DiskError> {
    let text = device.path.to_str().filter(|path| is_plain_path(path));
    let shown = || device.path.to_string_lossy().chars().take(64).collect();
    let path = text.ok_or_else(|| DiskError::Path(shown()))?.to_owned();
    // 12 and 20 bits are a device's numbers (include/linux/kdev_t.h).
    let whole = |number: i64, bits: u32| u32::try_from(number).ok().filter(|n| *n < 1 << bits);
    let numbers = whole(device.major, 12).zip(whole(device.minor, 20));
    let numbers = numbers.ok_or_else(|| DiskError::Numbers {
        path: device.path.clone(),
        major: device.major,
        minor: device.minor,
    })?;
    let read_only = !allowed(rules, Some(numbers), 'w');
    Ok(Wanted { path, disk: Disk { numbers, read_only } })
}

/// The disks that a VM has for its containers.
#[derive(Debug, Default)]
pub struct Disks(Vec<Given>);

#[derive(Debug)]
struct Given {
    disk: Disk,
    /// Its number on the guest's bus.
    device: u8,
    /// Containers, by their ids.
    users: BTreeSet<String>,
}

impl Disks {
    /// The VM's disk for a block device, which the container uses from here on, if it has one. The same data by two disks
    /// would be two data: each has a cache in the guest.
    pub fn join(&mut self, disk: Disk, container: &str) -> Option<u8> {
        let given = self.0.iter_mut().find(|given| given.disk == disk)?;
        given.users.insert(container.to_owned());
        Some(given.device)
    }

    /// The VM has another, which the container uses.
    pub fn add(&mut self, disk: Disk, device: u8, container: &str) {
        let users = BTreeSet::from([container.to_owned()]);
        self.0.push(Given { disk, device, users });
    }

    /// A container has gone, or does not come: the numbers of the disks that nobody uses any more.
    pub fn leave(&mut self, container: &str) -> Vec<u8> {
        self.0.iter_mut().for_each(|given| {
            given.users.remove(container);
        });
        self.0.extract_if(.., |given| given.users.is_empty()).map(|given| given.device).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn device(path: &str, kind: &str, major: i64, minor: i64) -> Device {
        Device { path: path.into(), kind: kind.into(), major, minor }
    }

    fn rules(rules: serde_json::Value) -> Vec<Rule> {
        serde_json::from_value(rules).unwrap()
    }

    #[test]
    fn block_devices_are_taken_with_what_may_be_done_with_them() {
        let rules = rules(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "minor": 0, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "r"},
            {"allow": true, "type": "c", "major": 7, "minor": 1, "access": "rw"}
        ]));
        let devices = [
            device("/dev/xvda", "b", 7, 0),
            device("/dev/fuse", "c", 10, 229),
            device("/data/ro", "b", 7, 1),
        ];
        let wanted = wanted(&devices, &rules).unwrap();
        let told: Vec<_> =
            wanted.iter().map(|w| (w.path.as_str(), w.disk.numbers, w.disk.read_only)).collect();
        assert_eq!(told, [("/dev/xvda", (7, 0), false), ("/data/ro", (7, 1), true)]);
    }

    #[test]
    fn container_that_may_use_every_device_gets_none_of_the_hosts() {
        let all =
            rules(json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]));
        assert_eq!(wanted(&[device("/dev/sda", "b", 8, 0)], &all).unwrap(), []);
        let blocks = rules(json!([{"allow": true, "type": "b", "access": "rwm"}]));
        assert!(!wanted(&[device("/dev/sda", "b", 8, 0)], &blocks).unwrap()[0].disk.read_only);
    }

    #[test]
    fn what_is_past_the_bounds_is_refused() {
        for (path, major, minor) in [
            ("dev/x", 7, 0),
            ("/dev/../x", 7, 0),
            ("/x", -1, 0),
            ("/x", 1 << 12, 0),
            ("/x", 7, 1 << 20),
        ] {
            let error = wanted(&[device(path, "b", major, minor)], &[]).unwrap_err();
            assert!(error.is_of_the_pod(), "{error}");
        }
        let many: Vec<_> =
            (0..=MAX_LATE_DISKS as i64).map(|n| device(&format!("/dev/x{n}"), "b", 7, n)).collect();
        assert!(wanted(&many[1..], &[]).is_ok());
        assert!(matches!(wanted(&many, &[]), Err(DiskError::TooMany)));
    }

    proptest! {
        /// However containers come and go, a disk is there as long as one of them uses it, and no longer.
        #[test]
        fn disk_lives_as_long_as_its_users(steps: Vec<(bool, u8, u8)>) {
            let mut disks = Disks::default();
            let mut model: Vec<(u8, BTreeSet<u8>)> = Vec::new();
            for (comes, container, number) in steps {
                let (container, number) = (container % 4, number % 3);
                let disk = Disk { numbers: (7, number.into()), read_only: false };
                let name = container.to_string();
                if comes {
                    let entry = model.iter_mut().find(|(other, _)| *other == number);
                    let device = disks.join(disk, &name);
                    prop_assert_eq!(device, entry.as_ref().map(|_| number + 1));
                    match entry {
                        Some((_, users)) => _ = users.insert(container),
                        None => {
                            disks.add(disk, number + 1, &name);
                            model.push((number, BTreeSet::from([container])));
                        }
                    }
                } else {
                    let mut gone: Vec<u8> = disks.leave(&name);
                    for (_, users) in &mut model {
                        users.remove(&container);
                    }
                    let mut free: Vec<u8> = model
                        .iter()
                        .filter(|(_, users)| users.is_empty())
                        .map(|(number, _)| number + 1)
                        .collect();
                    model.retain(|(_, users)| !users.is_empty());
                    gone.sort();
                    free.sort();
                    prop_assert_eq!(gone, free);
                }
            }
        }
    }
}

//! The devices of a spec, which names those of the host.
//!
//! A privileged container gets every device of the guest in their place. Another one gets those
//! that the guest has under the same numbers: what the kernel numbers alike everywhere, such as
//! /dev/fuse and /dev/net/tun. A block device of the host is a disk of the guest with numbers of its
//! own, put in its place afterwards ([`crate::served`]). VFIO's are left out: the functions that they stand for on the host
//! are the guest's, on its own bus, with its own drivers.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType,
};

use super::SpecError;

/// Where VFIO's devices are, and the one that device plugins name beside them.
const VFIO: [&str; 2] = ["/dev/vfio", "/dev/iommu"];
/// Devices of the guest that are looked at.
const MAX_DEVICES: usize = 1024;
/// How deep they lie below /dev.
const MAX_DEPTH: usize = 4;
/// What every container is given in any case, and what is not a device of the guest's to give.
const LEFT_OUT: [&str; 12] = [
    "null", "zero", "full", "random", "urandom", "tty", "ptmx", "console", "pts", "shm", "mqueue",
    "fd",
];

/// Whether the devices of the spec matter, and so those of the guest have to be known.
pub(crate) fn has_any(linux: Option<&Linux>) -> bool {
    linux.is_some_and(|linux| {
        linux.devices().as_ref().is_some_and(|devices| !devices.is_empty()) || is_privileged(linux)
    })
}

/// The devices of the guest, by what devtmpfs shows.
pub(crate) fn of_guest() -> Vec<LinuxDevice> {
    let mut found = Vec::new();
    collect(Path::new("/dev"), 0, &mut found);
    found
}

fn collect(directory: &Path, depth: usize, found: &mut Vec<LinuxDevice>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let left_out = depth == 0 && LEFT_OUT.iter().any(|left_out| name == *left_out);
        // Of the entry itself: a link is no device.
        let Ok(metadata) = entry.metadata() else { continue };
        if left_out || found.len() == MAX_DEVICES {
            continue;
        }
        if metadata.is_dir() {
            if depth + 1 < MAX_DEPTH {
                collect(&path, depth + 1, found);
            }
            continue;
        }
        let kind = metadata.file_type();
        let kind = match (kind.is_char_device(), kind.is_block_device()) {
            (true, _) => LinuxDeviceType::C,
            (_, true) => LinuxDeviceType::B,
            _ => continue,
        };
        let device = LinuxDeviceBuilder::default()
            .path(path)
            .typ(kind)
            .major(i64::from(rustix::fs::major(metadata.rdev())))
            .minor(i64::from(rustix::fs::minor(metadata.rdev())))
            .file_mode(metadata.mode() & 0o7777)
            .uid(metadata.uid())
            .gid(metadata.gid());
        found.extend(device.build());
    }
}

/// Puts the guest's devices in place of the host's, but for those at `disks`, which are still to be.
///
/// # Errors
/// The spec names one that the guest has not.
pub(super) fn rewrite(
    linux: &mut Linux,
    guest: &[LinuxDevice],
    disks: &[PathBuf],
) -> Result<(), SpecError> {
    if is_privileged(linux) {
        linux.set_devices(Some(guest.to_vec()));
        return Ok(());
    }
    leave_out_vfio(linux);
    let is_disk =
        |device: &&LinuxDevice| device.typ() == LinuxDeviceType::B && disks.contains(device.path());
    for device in linux.devices().iter().flatten().filter(|device| !is_disk(device)) {
        let is_same = |other: &LinuxDevice| {
            is_character(device.typ())
                && is_character(other.typ())
                && (device.major(), device.minor()) == (other.major(), other.minor())
        };
        if !is_common(device) && !guest.iter().any(is_same) {
            return Err(SpecError::Device(PathBuf::from(device.path())));
        }
    }
    Ok(())
}

/// Takes VFIO's devices out, and the rules for their numbers, which mean something else here.
fn leave_out_vfio(linux: &mut Linux) {
    leave_out(linux, |device| VFIO.iter().any(|path| device.path().starts_with(path)));
}

/// Takes the device at `path` out, if there is one, with the rules for its numbers.
pub(crate) fn take(linux: &mut Linux, path: &Path) -> Option<LinuxDevice> {
    leave_out(linux, |device| device.path() == path).pop()
}

fn leave_out(linux: &mut Linux, which: impl Fn(&LinuxDevice) -> bool) -> Vec<LinuxDevice> {
    let Some(devices) = linux.devices_mut() else { return Vec::new() };
    let (taken, kept): (Vec<_>, Vec<_>) =
        std::mem::take(devices).into_iter().partition(|device| which(device));
    *devices = kept;
    let rules =
        linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut());
    let is_for = |rule: &LinuxDeviceCgroup, device: &LinuxDevice| {
        (rule.major(), rule.minor()) == (Some(device.major()), Some(device.minor()))
    };
    if let Some(rules) = rules {
        rules.retain(|rule| !rule.allow() || !taken.iter().any(|device| is_for(rule, device)));
    }
    taken
}

/// Those in [`LEFT_OUT`] that are devices, by their numbers (Documentation/admin-guide/devices.txt).
fn is_common(device: &LinuxDevice) -> bool {
    let numbers = (device.major(), device.minor());
    is_character(device.typ()) && matches!(numbers, (1, 3 | 5 | 7 | 8 | 9) | (5, 0 | 2))
}

fn is_character(kind: LinuxDeviceType) -> bool {
    matches!(kind, LinuxDeviceType::C | LinuxDeviceType::U)
}

/// Whether the container may use every device there is.
fn is_privileged(linux: &Linux) -> bool {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    // The last rule that names all devices decides.
    rules
        .unwrap_or_default()
        .iter()
        .rev()
        .find(|rule| names_all(rule))
        .is_some_and(|rule| rule.allow())
}

fn names_all(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    let access = rule.access().as_deref().unwrap_or_default();
    rule.typ().unwrap_or_default() == LinuxDeviceType::A
        && any(rule.major())
        && any(rule.minor())
        && "rwm".chars().all(|letter| access.contains(letter))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn linux(devices: Value, rules: Value) -> Linux {
        serde_json::from_value(json!({"devices": devices, "resources": {"devices": rules}}))
            .unwrap()
    }

    fn device(path: &str, kind: &str, major: i64, minor: i64) -> Value {
        json!({"path": path, "type": kind, "major": major, "minor": minor})
    }

    fn guest() -> Vec<LinuxDevice> {
        let devices = json!([device("/dev/fuse", "c", 10, 229), device("/dev/vda", "b", 254, 0)]);
        serde_json::from_value(devices).unwrap()
    }

    #[test]
    fn device_that_the_guest_has_too_is_given_and_another_refused() {
        let deny = json!([{"allow": false, "access": "rwm"}]);
        for given in [device("/dev/own", "c", 10, 229), device("/dev/null", "c", 1, 3)] {
            let mut linux = linux(json!([given]), deny.clone());
            rewrite(&mut linux, &guest(), &[]).unwrap();
            assert_eq!(linux.devices().as_ref().unwrap().len(), 1);
        }
        let of_the_host = [
            device("/dev/sda", "b", 8, 0),
            // Numbered as they come: not the same disk.
            device("/dev/vda", "b", 254, 0),
            device("/dev/kvm", "c", 10, 232),
            device("/dev/mem", "c", 1, 1),
        ];
        for refused in of_the_host {
            let error =
                rewrite(&mut linux(json!([refused]), deny.clone()), &guest(), &[]).unwrap_err();
            assert_eq!(error, SpecError::Device(refused["path"].as_str().unwrap().into()));
        }
    }

    #[test]
    fn block_device_that_a_disk_is_put_in_place_of_passes() {
        let rules = json!([{"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm"}]);
        let mut linux = linux(json!([device("/dev/xvda", "b", 8, 0)]), rules);
        rewrite(&mut linux, &guest(), &["/dev/xvda".into()]).unwrap();
        let taken = take(&mut linux, Path::new("/dev/xvda")).unwrap();
        assert_eq!((taken.major(), taken.minor()), (8, 0));
        assert!(take(&mut linux, Path::new("/dev/xvda")).is_none());
        assert_eq!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap(), &[]);
    }

    #[test]
    fn devices_of_vfio_are_left_out_with_their_rules() {
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 243, "minor": 0, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}
        ]);
        let devices = json!([
            device("/dev/vfio/7", "c", 243, 0),
            device("/dev/vfio/vfio", "c", 10, 196),
            device("/dev/vfio/devices/vfio0", "c", 243, 0),
            device("/dev/iommu", "c", 10, 124),
            device("/dev/fuse", "c", 10, 229)
        ]);
        let mut linux = linux(devices, rules);
        rewrite(&mut linux, &guest(), &[]).unwrap();
        let paths: Vec<_> = linux.devices().iter().flatten().map(LinuxDevice::path).collect();
        assert_eq!(paths, [Path::new("/dev/fuse")]);
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        let majors: Vec<_> = rules.iter().map(LinuxDeviceCgroup::major).collect();
        assert_eq!(majors, [None, Some(10)]);
    }

    #[test]
    fn privileged_container_gets_the_guests_devices_and_none_of_the_hosts() {
        let all = json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
        let mut privileged = linux(json!([device("/dev/sda", "b", 8, 0)]), all);
        assert!(has_any(Some(&privileged)));
        rewrite(&mut privileged, &guest(), &[]).unwrap();
        assert_eq!(privileged.devices().as_ref().unwrap(), &guest());
        let none = linux(json!([]), json!([{"allow": true, "type": "c", "access": "rwm"}]));
        assert!(!has_any(Some(&none)) && !has_any(None));
    }

    #[test]
    fn devices_are_found_with_their_numbers() {
        // Left out or not: what tests run on has at least these.
        let mut found = Vec::new();
        collect(Path::new("/dev"), 1, &mut found);
        let null = found.iter().find(|device| device.path() == Path::new("/dev/null")).unwrap();
        assert_eq!((null.major(), null.minor(), null.typ()), (1, 3, LinuxDeviceType::C));
        assert!(of_guest().iter().all(|device| device.path() != Path::new("/dev/null")));
    }
}

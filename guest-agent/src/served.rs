//! Devices of the VM that other processes of the host serve, and block devices of the host, as the
//! pod's containers have them: disks by a node, file systems by a mount.
//!
//! A file system is mounted in the guest with the first container, and stays.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::spec;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxResources,
    Mount, MountBuilder, Spec,
};
use rustix::mount::{MountFlags, mount};
use vial_agent_protocol::agent::ServedDevice;
use vial_agent_protocol::{FUNCTION_DEVICES, MAX_DISKS, MAX_SERVED_DEVICES, is_plain_path};

const FUNCTIONS: &str = "/sys/bus/pci/devices";
/// Where file systems are mounted in the guest.
const MOUNTS: &str = "/run/vial-served";
/// The most devices of a container.
const MOST_DEVICES: usize = MAX_SERVED_DEVICES + MAX_DISKS;
/// The longest name of a file system (virtio 1.2, 5.11.4), in bytes.
const MAX_TAG_BYTES: usize = 36;

/// Why a container does not get a device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServedError {
    #[error("the container has {0} disks and file systems of the host, more than {MOST_DEVICES}")]
    TooMany(usize),
    #[error("{0:?} cannot be where a container has a device or a file system")]
    Path(String),
    #[error("{0} is no device number on the guest's PCI bus")]
    Number(u32),
    #[error("{0:?} cannot be the name of a file system")]
    Tag(String),
    #[error("the guest has no disk at {0}")]
    NoDisk(PathBuf),
    #[error("cannot mount the file system {tag:?} of another process: {source}")]
    Mount { tag: String, source: io::Error },
    #[error("cannot {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
}

impl ServedError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        matches!(self, Self::TooMany(_) | Self::Path(_) | Self::Number(_) | Self::Tag(_))
    }
}

/// What a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Served {
    /// A disk, with its numbers.
    Disk { path: PathBuf, read_only: bool, major: i64, minor: i64 },
    /// A directory of the guest.
    Directory { path: PathBuf, read_only: bool, source: PathBuf },
}

/// Finds the disks, and mounts what is not mounted yet.
///
/// # Errors
/// [`ServedError`].
pub(crate) fn prepare(devices: &[ServedDevice]) -> Result<Vec<Served>, ServedError> {
    if devices.len() > MOST_DEVICES {
        return Err(ServedError::TooMany(devices.len()));
    }
    devices.iter().map(|device| prepare_one(Path::new(FUNCTIONS), device)).collect()
}

fn prepare_one(functions: &Path, device: &ServedDevice) -> Result<Served, ServedError> {
    let path = checked_path(&device.path)?;
    let read_only = device.read_only;
    if device.disk == 0 {
        let source = mounted(checked_tag(&device.tag)?)?;
        return Ok(Served::Directory { path, read_only, source });
    }
    if !FUNCTION_DEVICES.contains(&device.disk) {
        return Err(ServedError::Number(device.disk));
    }
    let (major, minor) = disk(&functions.join(format!("0000:00:{:02x}.0", device.disk)))?;
    Ok(Served::Disk { path, read_only, major, minor })
}

fn checked_path(text: &str) -> Result<PathBuf, ServedError> {
    if is_plain_path(text) {
        Ok(text.into())
    } else {
        Err(ServedError::Path(text.chars().take(64).collect()))
    }
}

fn checked_tag(tag: &str) -> Result<&str, ServedError> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let fits = (1..=MAX_TAG_BYTES).contains(&tag.len()) && tag.bytes().all(is_name);
    if fits { Ok(tag) } else { Err(ServedError::Tag(tag.chars().take(64).collect())) }
}

/// The numbers of the disk that a function's driver has made.
fn disk(function: &Path) -> Result<(i64, i64), ServedError> {
    let none = || ServedError::NoDisk(function.into());
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let found = entries(function)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
        .find_map(|entry| entries(&entry.path().join("block")).next())
        .ok_or_else(none)?;
    let path = found.path().join("dev");
    let text = fs::read_to_string(&path).map_err(|source| ServedError::File {
        action: "read",
        path,
        source,
    })?;
    let (major, minor) = text.trim().split_once(':').ok_or_else(none)?;
    Ok((major.parse().map_err(|_| none())?, minor.parse().map_err(|_| none())?))
}

/// Where a file system is mounted, which it is from here on.
fn mounted(tag: &str) -> Result<PathBuf, ServedError> {
    let at = Path::new(MOUNTS).join(tag);
    let failed = |action| {
        let path = at.clone();
        move |source| ServedError::File { action, path, source }
    };
    fs::create_dir_all(MOUNTS).map_err(failed("make the directory above"))?;
    // Containers are made one after the other: whose directory is there is mounted, too.
    match fs::create_dir(&at) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(at),
        made => made.map_err(failed("make"))?,
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    if let Err(error) = mount(tag, &at, "virtiofs", flags, None) {
        // So that the next container tries, too.
        let _ = fs::remove_dir(&at);
        return Err(ServedError::Mount { tag: tag.into(), source: error.into() });
    }
    Ok(at)
}

/// Adds them to a spec that is the guest's already.
pub(crate) fn add_to(spec: &mut Spec, served: &[Served]) {
    for device in served {
        match device {
            Served::Disk { path, read_only, major, minor } => {
                add_disk(spec, path, *read_only, (*major, *minor));
            }
            Served::Directory { path, read_only, source } => {
                let mounts = spec.mounts_mut().get_or_insert_with(Vec::new);
                mounts.extend(bind(path, *read_only, source));
            }
        }
    }
}

fn bind(path: &Path, read_only: bool, source: &Path) -> Option<Mount> {
    let access = if read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", "nosuid", "nodev", access].map(str::to_owned).to_vec();
    // All that the builder asks for is given.
    MountBuilder::default()
        .destination(path)
        .typ("bind")
        .source(source)
        .options(options)
        .build()
        .ok()
}

fn add_disk(spec: &mut Spec, path: &Path, read_only: bool, (major, minor): (i64, i64)) {
    let Some(linux) = spec.linux_mut() else { return };
    // A block device of the host, which has its numbers there, but the owner and mode that it is to have.
    let of_host = spec::devices::take(linux, path);
    let mode = of_host.as_ref().and_then(LinuxDevice::file_mode);
    let id = |id: fn(&LinuxDevice) -> Option<u32>| of_host.as_ref().and_then(id).unwrap_or(0);
    let device: Option<LinuxDevice> = LinuxDeviceBuilder::default()
        .path(path)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .file_mode(mode.unwrap_or(if read_only { 0o440u32 } else { 0o660 }))
        .uid(id(LinuxDevice::uid))
        .gid(id(LinuxDevice::gid))
        .build()
        .ok();
    linux.devices_mut().get_or_insert_with(Vec::new).extend(device);
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .access(if read_only { "r" } else { "rw" })
        .build();
    let resources = linux.resources_mut().get_or_insert_with(LinuxResources::default);
    resources.devices_mut().get_or_insert_with(Vec::new).extend(rule.ok());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn device(path: &str, disk: u32, tag: &str) -> ServedDevice {
        ServedDevice { path: path.into(), disk, tag: tag.into(), ..Default::default() }
    }

    #[test]
    fn disk_is_found_by_its_function_and_given_with_a_rule() {
        let functions = tempfile::tempdir().unwrap();
        let block = functions.path().join("0000:00:05.0/virtio3/block/vdb");
        fs::create_dir_all(&block).unwrap();
        fs::write(block.join("dev"), "254:16\n").unwrap();
        let served = prepare_one(functions.path(), &device("/dev/fast", 5, "")).unwrap();
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}}
        }))
        .unwrap();
        add_to(&mut spec, &[served]);
        let spec = serde_json::to_value(&spec).unwrap();
        let given = &spec["linux"]["devices"][0];
        assert_eq!((&given["path"], &given["major"]), (&json!("/dev/fast"), &json!(254)));
        let rule = &spec["linux"]["resources"]["devices"][1];
        assert_eq!(
            (&rule["allow"], &rule["minor"], &rule["access"]),
            (&json!(true), &json!(16), &json!("rw"))
        );
        let error = prepare_one(functions.path(), &device("/dev/fast", 6, "")).unwrap_err();
        assert!(matches!(error, ServedError::NoDisk(_)), "{error}");
    }

    #[test]
    fn disk_in_place_of_a_block_device_of_the_host_has_its_owner_and_not_its_numbers() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "linux": {
                "devices": [{"path": "/dev/xvda", "type": "b", "major": 8, "minor": 16,
                    "fileMode": 0o600, "uid": 1000, "gid": 6}],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm"}
                ]}
            }
        }))
        .unwrap();
        let path = PathBuf::from("/dev/xvda");
        add_to(&mut spec, &[Served::Disk { path, read_only: false, major: 254, minor: 0 }]);
        let spec = serde_json::to_value(&spec).unwrap();
        let devices = &spec["linux"]["devices"];
        assert_eq!(
            devices,
            &json!([{"path": "/dev/xvda", "type": "b", "major": 254, "minor": 0,
                "fileMode": 0o600, "uid": 1000, "gid": 6}])
        );
        let rules = spec["linux"]["resources"]["devices"].as_array().unwrap();
        let majors: Vec<_> = rules.iter().map(|rule| &rule["major"]).collect();
        assert_eq!(majors, [&json!(null), &json!(254)]);
    }

    #[test]
    fn directory_becomes_a_mount() {
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.2.0"})).unwrap();
        let (path, source) = ("/data".into(), "/run/vial-served/user-f".into());
        add_to(&mut spec, &[Served::Directory { path, read_only: true, source }]);
        let mount = spec.mounts().as_ref().unwrap().last().unwrap();
        assert_eq!(mount.destination(), Path::new("/data"));
        assert!(mount.options().as_ref().unwrap().iter().any(|option| option == "ro"));
    }

    #[test]
    fn what_is_past_the_bounds_is_refused() {
        let wrong = |device: ServedDevice| {
            let error = prepare(&[device]).unwrap_err();
            assert!(error.is_of_the_request(), "{error}");
        };
        for path in ["", "/", "dev/x", "/dev/../x", "/a\0b", &format!("/{}", "a".repeat(4095))] {
            wrong(device(path, 5, ""));
        }
        wrong(device("/dev/x", 32, ""));
        for tag in ["", "a/b", "..", &"a".repeat(37)] {
            wrong(device("/data", 0, tag));
        }
        let many = vec![device("/dev/x", 5, ""); MOST_DEVICES + 1];
        assert!(matches!(prepare(&many), Err(ServedError::TooMany(_))));
    }
}

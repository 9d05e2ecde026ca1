//! The device nodes of containers in a user namespace, whose root can make none: each is made outside, as
//! its spec describes it, and bound to its place.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, MountBuilder, Spec};
use rustix::fs::{CWD, FileType, Gid, Mode, Uid, chmod, chown, makedev, mknodat};
use rustix::mount::{MountFlags, mount};
use vial_agent_protocol::users::Users;

/// What a device has whose mode nobody says (as with runc).
const DEFAULT_MODE: u32 = 0o666;

/// Why a container does not get a device.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}")]
pub(crate) struct NodeError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> NodeError {
    move |error| NodeError { action, path: path.into(), source: error.into() }
}

/// Makes the nodes of a spec's devices in the directory `name` of `nodes`, and has the spec bind them. Those
/// of owners that the pod does not have belong to its root.
///
/// # Errors
/// [`NodeError`]. What was made until then is in the directory.
pub(crate) fn bind(
    spec: &mut Spec,
    users: &Users,
    nodes: &Path,
    name: &str,
) -> Result<(), NodeError> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let devices = linux.devices().clone().unwrap_or_default();
    if devices.is_empty() {
        return Ok(());
    }
    linux.set_devices(None);
    prepare(nodes)?;
    let directory = nodes.join(name);
    fs::create_dir(&directory).map_err(failed("make", &directory))?;
    let mut mounts = Vec::with_capacity(devices.len());
    for (index, device) in devices.iter().enumerate() {
        let node = directory.join(index.to_string());
        make(device, users, &node)?;
        mounts.extend(mount_of(device, &node));
    }
    spec.mounts_mut().get_or_insert_with(Vec::new).extend(mounts);
    Ok(())
}

/// A file system on which nodes are devices, which what the agent has in /run is not.
fn prepare(nodes: &Path) -> Result<(), NodeError> {
    match fs::create_dir(nodes) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made.map_err(failed("make", nodes))?,
    }
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("nodes", nodes, "tmpfs", flags, c"mode=755").map_err(|error| {
        // So that the next container tries, too.
        let _ = fs::remove_dir(nodes);
        failed("mount", nodes)(error)
    })
}

fn make(device: &LinuxDevice, users: &Users, node: &Path) -> Result<(), NodeError> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        _ => FileType::CharacterDevice,
    };
    let number = |number: i64| u32::try_from(number).unwrap_or(0);
    let numbers = makedev(number(device.major()), number(device.minor()));
    let mode = Mode::from_raw_mode(device.file_mode().unwrap_or(DEFAULT_MODE) & 0o7777);
    let uid = users.uids.on_host(device.uid().unwrap_or(0)).or(users.uids.on_host(0));
    let gid = users.gids.on_host(device.gid().unwrap_or(0)).or(users.gids.on_host(0));
    let path = device.path();
    mknodat(CWD, node, kind, mode, numbers).map_err(failed("make the device", path))?;
    chmod(node, mode).map_err(failed("set the mode of", path))?;
    chown(node, uid.map(Uid::from_raw), gid.map(Gid::from_raw))
        .map_err(failed("set the owner of", path))
}

fn mount_of(device: &LinuxDevice, node: &Path) -> Option<Mount> {
    // All that the builder asks for is given.
    MountBuilder::default()
        .destination(device.path())
        .typ("bind")
        .source(node)
        .options(["bind", "nosuid", "noexec"].map(str::to_owned).to_vec())
        .build()
        .ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    use serde_json::json;

    use super::*;

    #[test]
    fn device_is_a_node_of_the_pods_owner_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let nodes = directory.path().join("nodes");
        let users = Users::new(&[(0, 1000, 50)], &[(0, 2000, 50)]).unwrap();
        let spec = json!({"ociVersion": "1.2.0", "linux": {"devices": [
            {"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 7},
            {"path": "/dev/foreign", "type": "c", "major": 1, "minor": 5, "uid": 99, "gid": 99}
        ]}});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        bind(&mut spec, &users, &nodes, "one").expect("run the tests as root");
        let look = |name: &str| {
            let about = fs::metadata(nodes.join("one").join(name)).unwrap();
            assert!(about.file_type().is_char_device());
            (about.rdev(), about.mode() & 0o777, about.uid(), about.gid())
        };
        let seen = [look("0"), look("1")];
        rustix::mount::unmount(&nodes, rustix::mount::UnmountFlags::DETACH).unwrap();
        assert_eq!(seen[0], (makedev(1, 3), 0o640, 1007, 2000));
        assert_eq!(seen[1], (makedev(1, 5), 0o666, 1000, 2000));
        assert_eq!(spec.linux().as_ref().unwrap().devices(), &None);
        let places: Vec<_> =
            spec.mounts().iter().flatten().map(|mount| mount.destination().clone()).collect();
        assert_eq!(places, [Path::new("/dev/mine"), Path::new("/dev/foreign")]);
    }
}

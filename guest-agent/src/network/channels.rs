//! Interfaces of several pairs of queues in a guest whose processors come later than they: the
//! kernel's virtio_net uses as many pairs as there were processors when it found the device.

use std::fs;
use std::io;
use std::path::Path;

use crate::sys::{self, Channels};
use crate::users;

/// Others know by themselves, and their number is no matter of the VM's size.
const DRIVER: &str = "virtio_net";

/// Has each of the VMM's interfaces use a pair of queues for each of so many processors, as far as
/// it has them. One that uses more keeps them.
pub(crate) fn fit(vcpus: u32) {
    users::for_interfaces(|directory| fit_all(directory, vcpus));
}

fn fit_all(directory: &Path, vcpus: u32) {
    let Ok(interfaces) = fs::read_dir(directory) else { return };
    for interface in interfaces.flatten().filter(|interface| is_of(&interface.path(), DRIVER)) {
        let name = interface.file_name();
        if let Err(error) = fit_one(&name.to_string_lossy(), vcpus) {
            tracing::warn!("{} keeps its pairs of queues: {error}", name.display());
        }
    }
}

fn is_of(interface: &Path, driver: &str) -> bool {
    let found = fs::read_link(interface.join("device/driver"));
    found.is_ok_and(|found| found.file_name().is_some_and(|name| name == driver))
}

fn fit_one(name: &str, vcpus: u32) -> io::Result<()> {
    let mut channels = sys::channels(name)?;
    let Some(count) = wanted(&channels, vcpus) else { return Ok(()) };
    channels.combined = count;
    sys::set_channels(name, channels)
}

/// How many an interface is to use, if not as many as it does.
fn wanted(channels: &Channels, vcpus: u32) -> Option<u32> {
    let count = vcpus.min(channels.max_combined);
    (count > channels.combined).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_uses_a_pair_for_each_processor_as_far_as_it_has_them() {
        for (most, used, vcpus, expected) in [
            (1, 1, 4, None),
            (4, 1, 4, Some(4)),
            (4, 1, 2, Some(2)),
            (2, 1, 8, Some(2)),
            (2, 2, 8, None),
            (4, 4, 2, None),
            (4, 1, 0, None),
        ] {
            let mut channels = Channels::default();
            (channels.max_combined, channels.combined) = (most, used);
            assert_eq!(wanted(&channels, vcpus), expected, "{channels:?} for {vcpus}");
        }
    }

    #[test]
    fn interfaces_are_told_by_their_drivers() {
        let sysfs = tempfile::tempdir().unwrap();
        for (interface, driver) in [("eth0", "virtio_net"), ("eth1", "ixgbevf")] {
            let device = sysfs.path().join(interface).join("device");
            fs::create_dir_all(&device).unwrap();
            std::os::unix::fs::symlink(format!("../drivers/{driver}"), device.join("driver"))
                .unwrap();
        }
        fs::create_dir(sysfs.path().join("lo")).unwrap();
        let has = |name: &str| is_of(&sysfs.path().join(name), DRIVER);
        assert_eq!(["eth0", "eth1", "lo", "none"].map(has), [true, false, false, false]);
    }

    #[test]
    fn interface_without_channels_and_none_at_all_are_errors() {
        for name in ["lo", "vial-none", "a name of more than sixteen bytes"] {
            sys::channels(name).unwrap_err();
            sys::set_channels(name, Channels::default()).unwrap_err();
        }
    }
}

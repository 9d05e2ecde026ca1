//! The kernel's vhost-net, which carries the packets between a tap and the guest where the host has
//! it.

use std::{fs::File, path::Path};

use crate::{config::VhostNet, jail::descriptors};

/// Where it is. Opening it loads its module, if there is one.
pub const PATH: &str = "/dev/vhost-net";

/// An instance for each of a tap's queues. Without any the VMM carries the packets itself.
pub(super) fn open(wanted: VhostNet, queues: usize) -> Vec<File> {
    match wanted {
        VhostNet::Off => Vec::new(),
        VhostNet::Auto => {
            let opened = (0..queues).map(|_| open_at(Path::new(PATH)));
            opened.collect::<Option<_>>().unwrap_or_default()
        }
    }
}

fn open_at(path: &Path) -> Option<File> {
    match descriptors::open_device_once(path) {
        Ok(file) => Some(file),
        Err(error) => {
            let path = path.display();
            match error.raw_os_error() {
                // There is no such device, or nothing behind it, as on many a host.
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
                    tracing::debug!("the VMM carries the pod's packets itself: {path}: {error}");
                }
                _ => {
                    tracing::warn!("the VMM carries the pod's packets itself: {path}: {error}");
                }
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_without_it_and_operator_who_does_not_want_it_have_none() {
        assert!(open_at(Path::new("/dev/nowhere/vhost-net")).is_none());
        assert!(open(VhostNet::Off, 2).is_empty());
    }
}

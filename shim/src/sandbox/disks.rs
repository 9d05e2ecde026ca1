//! Block devices of the host in the VM, which containers bring into it and take with them.
//!
//! The VMM holds the only descriptors, so nothing is to be given back when it ends, however it does.

use std::{
    fs::{self, File},
    io,
    os::{linux::fs::MetadataExt, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::timeout;
use vial_agent_protocol::agent::ServedDevice;
use vial_vmm_api::{Action, Reply};

use super::{Given, Sandbox, vmm};
use crate::{
    disks::{Disk, DiskError, Wanted},
    error::ServiceError,
    jail::descriptors,
    vmm_client::VmmError,
};

/// How long the VMM may take to add a disk, or to take one: what it serves just then may wait for the host's.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where the kernel lists block devices by their numbers.
const BY_NUMBERS: &str = "/sys/dev/block";

impl Sandbox {
    /// Gives the VM disks for a container's block devices, as far as it has none, and tells where the guest finds them.
    ///
    /// # Errors
    /// [`ServiceError`]; the VM has what it had then.
    pub async fn give_disks(
        &self,
        container: &str,
        wanted: &[Wanted],
    ) -> Result<Vec<ServedDevice>, ServiceError> {
        let mut given = Vec::new();
        for Wanted { path, disk } in wanted {
            match self.give_disk(container, *disk).await {
                Ok(device) => given.push(ServedDevice {
                    path: path.clone(),
                    read_only: disk.read_only,
                    disk: device.into(),
                    ..Default::default()
                }),
                Err(error) => {
                    self.take_disks(container).await;
                    return Err(error);
                }
            }
        }
        Ok(given)
    }

    async fn give_disk(&self, container: &str, disk: Disk) -> Result<u8, ServiceError> {
        let mut disks = self.disks.lock().await;
        if let Some(device) = disks.join(disk, container) {
            return Ok(device);
        }
        let file = open(disk)?;
        let (major, minor) = disk.numbers;
        let mut handed = Given::default();
        let action = Action::AddDisk {
            file: handed.add(&file),
            read_only: disk.read_only,
            // What the guest tells it by, besides its place.
            serial: format!("{major}:{minor}"),
        };
        let asked = timeout(PATIENCE, self.vmm.request(action, &handed.0)).await;
        let failed = vmm("give a disk to the VM");
        let device = match asked.unwrap_or(Err(VmmError::Late(PATIENCE))) {
            Ok(Reply::DiskAdded { device }) => device,
            Ok(_) => return Err(failed(VmmError::Answer)),
            Err(error) => return Err(failed(error)),
        };
        // From here on it goes with the container.
        disks.add(disk, device, container);
        drop(disks);
        self.agent.add_functions(vec![device.into()]).await?;
        tracing::info!("the VM has the block device {major}:{minor} of the host");
        Ok(device)
    }

    /// A container has gone, or does not come: takes the disks from the VM that nobody else uses. What cannot be taken
    /// stays with the pod, to its end.
    pub async fn take_disks(&self, container: &str) {
        let left = self.disks.lock().await.leave(container);
        if self.end().is_some() {
            return;
        }
        for device in left {
            if let Err(error) = self.agent.remove_functions(vec![device.into()]).await {
                tracing::warn!("the guest does not let go of its disk {device}: {error}");
            }
            let asked = self.vmm.request(Action::RemoveDisk { device }, &[]);
            match timeout(PATIENCE, asked).await.unwrap_or(Err(VmmError::Late(PATIENCE))) {
                Ok(Reply::Done) | Err(VmmError::Closed) => {}
                Ok(_) => tracing::error!("the VM keeps its disk {device}: {}", VmmError::Answer),
                Err(error) => tracing::error!("the VM keeps its disk {device}: {error}"),
            }
        }
    }
}

/// Opens a block device by its numbers.
fn open(disk: Disk) -> Result<File, DiskError> {
    let numbers = disk.numbers;
    let path = node(Path::new(BY_NUMBERS), numbers)
        .map_err(|error| DiskError::Absent { numbers, error })?;
    let failed = |error| DiskError::Open { path: path.clone(), error };
    let file = descriptors::open_disk(&path, disk.read_only).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    let is = |(major, minor)| rustix::fs::makedev(major, minor) == found.st_rdev();
    if !found.file_type().is_block_device() || !is(numbers) {
        return Err(failed(io::Error::other("the node there is of another device")));
    }
    Ok(file)
}

/// The node of a block device, by what sysfs calls it (Documentation/admin-guide/sysfs-rules.rst).
fn node(by_numbers: &Path, (major, minor): (u32, u32)) -> io::Result<PathBuf> {
    let text = fs::read_to_string(by_numbers.join(format!("{major}:{minor}/uevent")))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("sysfs has no name for it"))?;
    Ok(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_is_what_sysfs_names() {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("253:3")).unwrap();
        let uevent = tree.path().join("253:3/uevent");
        fs::write(&uevent, "MAJOR=253\nMINOR=3\nDEVNAME=mapper/x\nDEVTYPE=disk\n").unwrap();
        assert_eq!(node(tree.path(), (253, 3)).unwrap(), Path::new("/dev/mapper/x"));
        assert!(node(tree.path(), (253, 4)).is_err());
        fs::write(&uevent, "MAJOR=253\n").unwrap();
        assert!(node(tree.path(), (253, 3)).is_err());
    }
}

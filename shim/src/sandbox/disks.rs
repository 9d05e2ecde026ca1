//! Block devices of the host in the VM, which containers bring into it and take with them.
//!
//! The VMM holds the only descriptors, so nothing is to be given back when it ends, however it does.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        linux::fs::MetadataExt,
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    sync::Once,
    time::Duration,
};

use tokio::time::timeout;
use vial_agent_protocol::agent::ServedDevice;
use vial_ring::Layout;
use vial_vmm_api::{Action, DiskCache, DiskShape, Reply};

use super::{Given, Sandbox, vmm};
use crate::{
    disks::{Disk, DiskError, Wanted, cache::Cache, limits::Limits},
    error::ServiceError,
    jail::{descriptors, rings::Promise},
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
        let (file, shape) = open(disk, self.disk_cache, self.placed.size().vcpus)?;
        let (major, minor) = disk.numbers;
        let ring = self.ring(&file, disk);
        let mut handed = Given::default();
        let action = Action::AddDisk {
            file: handed.add(&file),
            read_only: disk.read_only,
            // What the guest tells it by, besides its place.
            serial: format!("{major}:{minor}"),
            shape,
            ring: ring.as_ref().map(|(_, layout)| *layout),
        };
        let failed = vmm("give a disk to the VM");
        let device = match self.ask_for_disk(action, &handed, ring).await {
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

    /// A ring for a disk, unless there is to be none, or the host has none: then its requests are done one after the other.
    fn ring(&self, file: &File, disk: Disk) -> Option<(OwnedFd, Layout)> {
        if !self.io_uring {
            return None;
        }
        let made = match self.process.rings() {
            Some(rings) if !rings.can_promise() => {
                Err("the VMM has not answered to a disk before".into())
            }
            Some(_) => vial_ring::make(file.as_fd(), !disk.read_only).map_err(|e| e.to_string()),
            None => Err("the VMM has no jail, or the kernel no listener for its filter".into()),
        };
        // A shim has one VM.
        static TOLD: Once = Once::new();
        made.inspect_err(|error| {
            TOLD.call_once(|| {
                tracing::warn!("requests to the VM's disks are done one after the other: {error}");
            });
        })
        .ok()
    }

    /// Asks the VMM to add a disk, and gives it the ring that it waits for before it answers.
    async fn ask_for_disk(
        &self,
        action: Action,
        handed: &Given<'_>,
        ring: Option<(OwnedFd, Layout)>,
    ) -> Result<Reply, VmmError> {
        let promise = self.process.rings().zip(ring).map(|(rings, (ring, _))| rings.promise(ring));
        let answer = async {
            let asked = timeout(PATIENCE, self.vmm.request(action, &handed.0)).await;
            asked.unwrap_or(Err(VmmError::Late(PATIENCE)))
        };
        let hand_over = async {
            if let Some(promise) = &promise
                && let Err(error) = promise.keep().await
            {
                tracing::warn!("the VM's disk does not get its ring: {error}");
            }
            // The VMM's answer ends this.
            std::future::pending::<()>().await;
        };
        let reply = tokio::select! {
            reply = answer => reply,
            () = hand_over => Err(VmmError::Answer),
        };
        if !matches!(reply, Err(VmmError::Late(_))) {
            promise.into_iter().for_each(Promise::answered);
        }
        reply
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

/// Opens a block device by its numbers, and says what the guest is to be told of it.
fn open(disk: Disk, cache: Cache, vcpus: u8) -> Result<(File, DiskShape), DiskError> {
    let numbers = disk.numbers;
    let absent = |error| DiskError::Absent { numbers, error };
    let path = node(Path::new(BY_NUMBERS), numbers).map_err(absent)?;
    let (major, minor) = numbers;
    let limits = Limits::read(&Path::new(BY_NUMBERS).join(format!("{major}:{minor}")));
    let mut shape = limits.map_err(absent)?.shape(cache, vcpus);
    let failed = |error| DiskError::Open { path: path.clone(), error };
    let direct = shape.cache != DiskCache::Writeback;
    let opened = match descriptors::open_disk(&path, disk.read_only, direct) {
        // Its driver has no such thing.
        Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
            shape.cache = DiskCache::Writeback;
            descriptors::open_disk(&path, disk.read_only, false)
        }
        opened => opened,
    };
    let file = opened.map_err(failed)?;
    if cache == Cache::Direct && shape.cache == DiskCache::Writeback {
        tracing::warn!(
            "the block device {path:?} is in the host's page cache: it is not to be had without"
        );
    }
    let found = file.metadata().map_err(failed)?;
    let is = |(major, minor)| rustix::fs::makedev(major, minor) == found.st_rdev();
    if !found.file_type().is_block_device() || !is(numbers) {
        return Err(failed(io::Error::other("the node there is of another device")));
    }
    Ok((file, shape))
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

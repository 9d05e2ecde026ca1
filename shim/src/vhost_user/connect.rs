//! Connections to backends, and the memory that they map: the VMM can make neither.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    time::Duration,
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tokio::net::UnixStream;
use vial_vmm_api::{DeviceConfig, HugePages, VHOST_USER_RING_BYTES, VhostUserKind};

use super::{
    VhostUserError,
    listed::{Kind, Listed},
};

/// How long a backend may take to have room for a connection.
const PATIENCE: Duration = Duration::from_secs(2);

/// Devices whose backends are connected, for one VM.
#[derive(Debug)]
pub struct Connected {
    /// The guest's memory.
    pub memory: OwnedFd,
    devices: Vec<(Listed, OwnedFd, Option<OwnedFd>)>,
}

impl Connected {
    /// Connects to the backends of `devices`, for a VM with so much memory. Nothing for no devices.
    ///
    /// # Errors
    /// [`VhostUserError`].
    pub async fn new(
        devices: &[Listed],
        memory_mib: u32,
        huge_pages: Option<HugePages>,
    ) -> Result<Option<Self>, VhostUserError> {
        if devices.is_empty() {
            return Ok(None);
        }
        let memory = shared_memory(u64::from(memory_mib) << 20, huge_pages)
            .map_err(|error| VhostUserError::Memory(error.into()))?;
        let mut connected = Vec::new();
        for device in devices {
            let socket = connect(device).await?;
            let rings = match device.kind {
                Kind::Block { .. } => Some(
                    shared_memory(VHOST_USER_RING_BYTES, None)
                        .map_err(|error| VhostUserError::Memory(error.into()))?,
                ),
                Kind::Net { .. } | Kind::Fs { .. } => None,
            };
            connected.push((device.clone(), socket, rings));
        }
        Ok(Some(Self { memory, devices: connected }))
    }

    /// The devices of a VM with so many vCPUs, whose descriptors `give` numbers. A pair of a network's
    /// queues is for a vCPU.
    pub fn configs<'a>(
        &'a self,
        vcpus: u8,
        mut give: impl FnMut(&'a OwnedFd) -> vial_vmm_api::Descriptor,
    ) -> Vec<DeviceConfig> {
        let config = |(device, socket, rings): &'a (Listed, OwnedFd, Option<OwnedFd>)| {
            let kind = match (&device.kind, rings) {
                (Kind::Block { read_only, .. }, Some(rings)) => {
                    VhostUserKind::Block { read_only: *read_only, rings: give(rings) }
                }
                (Kind::Net { mac, mtu, .. }, _) => VhostUserKind::Net { mac: *mac, mtu: *mtu },
                (Kind::Fs { .. } | Kind::Block { .. }, _) => {
                    VhostUserKind::Fs { tag: device.tag() }
                }
            };
            let queues = match device.kind {
                Kind::Net { .. } => device.queues.min(vcpus).max(1),
                Kind::Block { .. } | Kind::Fs { .. } => device.queues,
            };
            DeviceConfig::VhostUser { kind, queues, socket: give(socket) }
        };
        self.devices.iter().map(config).collect()
    }
}

/// Memory that others can map, and nobody can make shorter: who has it mapped would end by that.
fn shared_memory(bytes: u64, huge_pages: Option<HugePages>) -> rustix::io::Result<OwnedFd> {
    let pages = match huge_pages {
        None => MemfdFlags::empty(),
        Some(HugePages::Mib2) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePages::Gib1) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages;
    let memory = memfd_create(c"vial-guest", flags)?;
    ftruncate(&memory, bytes)?;
    fcntl_add_seals(memory.as_fd(), SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory)
}

/// Connects to a device's backend.
///
/// # Errors
/// [`VhostUserError`].
pub async fn connect(device: &Listed) -> Result<OwnedFd, VhostUserError> {
    let Listed { name, socket, .. } = device;
    let (name, socket) = (name.clone(), socket.clone());
    match std::fs::metadata(&socket) {
        Err(error) => return Err(VhostUserError::Absent { name, socket, error }),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(VhostUserError::NoSocket { name, socket });
        }
        Ok(_) => {}
    }
    let connected = tokio::time::timeout(PATIENCE, UnixStream::connect(&socket)).await;
    let stream = connected.unwrap_or_else(|late| Err(late.into()));
    stream
        .and_then(UnixStream::into_std)
        .map(OwnedFd::from)
        .map_err(|error| VhostUserError::NotServed { name, socket, error })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn device(socket: &std::path::Path) -> Listed {
        let kind = Kind::Block { path: "/dev/fast".into(), read_only: false };
        Listed { name: "disk1".into(), socket: socket.into(), queues: 1, kind }
    }

    #[tokio::test]
    async fn absent_other_and_unserved_sockets_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let error = connect(&device(&path)).await.unwrap_err();
        assert!(matches!(error, VhostUserError::Absent { .. }), "{error}");
        std::fs::write(&path, "").unwrap();
        let error = connect(&device(&path)).await.unwrap_err();
        assert!(matches!(error, VhostUserError::NoSocket { .. }), "{error}");
        std::fs::remove_file(&path).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        connect(&device(&path)).await.unwrap();
        drop(listener);
        let error = connect(&device(&path)).await.unwrap_err();
        assert!(matches!(error, VhostUserError::NotServed { .. }), "{error}");
        assert!(error.to_string().contains("disk1"), "{error}");
    }

    #[tokio::test]
    async fn each_device_has_its_descriptors_and_memory_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(Connected::new(&[], 64, None).await.unwrap().is_none());
        let connected = Connected::new(&[device(&path)], 64, None).await.unwrap().unwrap();
        let mut given = Vec::new();
        let configs = connected.configs(1, |descriptor| {
            given.push(descriptor.as_raw_fd());
            vial_vmm_api::Descriptor(given.len() as u8 - 1)
        });
        assert_eq!((configs.len(), given.len()), (1, 2));
        assert!(matches!(
            configs[0],
            DeviceConfig::VhostUser { kind: VhostUserKind::Block { .. }, queues: 1, .. }
        ));
        assert_eq!(rustix::fs::fstat(&connected.memory).unwrap().st_size, 64 << 20);
        for bytes in [0, 128 << 20] {
            assert!(ftruncate(&connected.memory, bytes).is_err(), "{bytes}");
        }
    }
}

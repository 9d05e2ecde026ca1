//! Puts a machine's devices on its bus, as its configuration lists them.

use std::sync::{Arc, Mutex};

use vial_vmm_api::{AddedFunctions, DeviceConfig, DiskShape, VhostUserKind};

use super::passed::{Given, Passed};
use super::{Descriptors, GuestConnected, MachineError, Platform};
use crate::devices::mem::Room;
use crate::devices::vfio::Placed;
use crate::devices::vhost_user::{self, BackendGone, Handover, VhostUser};
use crate::devices::{balloon, block, fs, mem, net, rng, vsock};
use crate::kvm::Vm;
use crate::memory::{Discards, GuestRam};
use crate::pci::bus::lock;
use crate::virtio::pci::{DeviceState, VirtioPci, Workers};
use crate::virtio::{VirtioDevice, WorkerThread};

/// What devices are put together with.
pub(super) struct Assembly<'a> {
    vm: &'a Arc<Vm>,
    ram: &'a GuestRam,
    platform: &'a Arc<Platform>,
    workers: Workers,
    /// Where memory comes, and how what the guest does not need goes.
    memory: (Room, Discards),
    pub(super) vsock: Option<vsock::VsockConnector>,
    pub(super) functions: Vec<Arc<Mutex<VirtioPci>>>,
    pub(super) passed: Passed,
    /// The functions of the host that the configuration lists.
    pub(super) listed: Option<AddedFunctions>,
    /// Told when a connection to a vhost-user backend breaks.
    pub(super) backend_gone: Option<BackendGone>,
    /// The number on the bus of each device of such a backend, and where it is given another.
    pub(super) backends: Vec<(u8, Handover)>,
    /// By which the owner says how much memory the guest is to have, where there is such a device.
    pub(super) demand: Option<mem::Demand>,
    /// Of the device that is being added.
    handover: Option<Handover>,
}

impl<'a> Assembly<'a> {
    pub(super) fn new(
        vm: &'a Arc<Vm>,
        ram: &'a GuestRam,
        platform: &'a Arc<Platform>,
        workers: Workers,
        passed: Passed,
        memory: (Room, Discards),
    ) -> Self {
        Self {
            vm,
            ram,
            platform,
            workers,
            memory,
            vsock: None,
            functions: Vec::new(),
            passed,
            listed: None,
            backend_gone: None,
            backends: Vec::new(),
            demand: None,
            handover: None,
        }
    }

    /// Adds a device, in the state that it had in another machine, if it had one.
    pub(super) fn add(
        &mut self,
        number: usize,
        config: DeviceConfig,
        saved: Option<&DeviceState>,
        descriptors: &mut Descriptors,
        guest_connected: &mut Option<GuestConnected>,
    ) -> Result<(), MachineError> {
        let kind = kind(&config);
        if let DeviceConfig::Passthrough { way, functions } = config {
            let given = Given { way, functions };
            let added = self.passed.add(given, descriptors, Placed::ByTheBus);
            self.listed = Some(added.map_err(|error| MachineError::Device {
                number,
                kind,
                reason: error.to_string(),
            })?);
            return Ok(());
        }
        let device = self
            .device(config, descriptors, guest_connected)
            .map_err(|reason| MachineError::Device { number, kind, reason })?;
        let mut function = VirtioPci::new(
            device,
            Some(&self.platform.pci),
            self.ram.clone(),
            self.vm.clone(),
            self.vm.clone(),
            self.workers.clone(),
        )?;
        if let Some(saved) = saved {
            function.restore(saved).map_err(|error| MachineError::Restore {
                number,
                kind,
                error,
            })?;
        }
        let function = Arc::new(Mutex::new(function));
        self.functions.push(function.clone());
        let at = self.platform.pci.add(function).map_err(|error| MachineError::Device {
            number,
            kind,
            reason: error.to_string(),
        })?;
        self.backends.extend(self.handover.take().map(|handover| (at, handover)));
        Ok(())
    }

    /// Waits until all devices that were restored serve their queues.
    pub(super) fn settle(&self) -> Result<(), MachineError> {
        self.workers.settle()?;
        for (number, function) in self.functions.iter().enumerate() {
            let function = lock(function);
            let kind = "virtio";
            function.check_queues().map_err(|error| MachineError::Restore {
                number,
                kind,
                error,
            })?;
        }
        Ok(())
    }

    fn device(
        &mut self,
        config: DeviceConfig,
        descriptors: &mut Descriptors,
        guest_connected: &mut Option<GuestConnected>,
    ) -> Result<Box<dyn VirtioDevice>, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let mut take = |which, what| descriptors.take(which, what).map_err(|error| text(&error));
        Ok(match config {
            DeviceConfig::Vsock { guest_cid, host_ports } => {
                if guest_cid < 3 {
                    return Err(format!("context id {guest_cid} is reserved; give 3 or more"));
                }
                let connected = guest_connected.take().ok_or("there can be only one")?;
                let (device, connector) = vsock::Vsock::new(guest_cid, host_ports, connected)
                    .map_err(|error| text(&error))?;
                self.vsock = Some(connector);
                Box::new(device)
            }
            DeviceConfig::Fs { tag, root, proc_fd } => {
                let root = take(root, "the shared directory")?;
                let proc_fd = proc_fd.map(|which| take(which, "/proc/<pid>/fd")).transpose()?;
                Box::new(fs::Fs::new(&tag, root, proc_fd).map_err(|error| text(&error))?)
            }
            DeviceConfig::Net { taps, mac, mtu, vhosts } => {
                let mut all = |which: Vec<_>, what| {
                    which.into_iter().map(|which| take(which, what)).collect::<Result<_, _>>()
                };
                let (taps, vhosts) = (all(taps, "the tap")?, all(vhosts, "/dev/vhost-net")?);
                Box::new(net::Net::new(taps, mac, mtu, vhosts).map_err(|error| text(&error))?)
            }
            DeviceConfig::Block { file, read_only, serial } => {
                let file = take(file, "the disk")?;
                let shape = DiskShape::default();
                let disk = block::Block::new(file, read_only, &serial, &shape, None);
                Box::new(disk.map_err(|error| text(&error))?)
            }
            DeviceConfig::VhostUser { kind, queues, socket } => {
                let socket = take(socket, "the connection to the backend")?;
                let kind = match kind {
                    VhostUserKind::Net { mac, mtu } => vhost_user::Kind::Net { mac, mtu },
                    VhostUserKind::Block { read_only, rings } => {
                        let rings = take(rings, "the rings' memory")?;
                        vhost_user::Kind::Block { read_only, rings }
                    }
                    VhostUserKind::Fs { tag } => vhost_user::Kind::Fs { tag },
                };
                let plan = vhost_user::Plan {
                    kind,
                    queues,
                    socket,
                    ram: self.ram.clone(),
                    // There are fewer than numbers on the bus.
                    number: self.backends.len() as u8,
                    gone: self.backend_gone.clone().ok_or("a restored machine has none")?,
                    patience: vhost_user::PATIENCE,
                };
                let (device, handover, watcher) =
                    VhostUser::new(plan).map_err(|error| text(&error))?;
                let thread = self.workers.of(WorkerThread::VhostUser);
                thread.add(watcher).map_err(|error| text(&error))?;
                self.handover = Some(handover);
                Box::new(device)
            }
            DeviceConfig::Rng => Box::new(rng::Rng::new()),
            DeviceConfig::Memory => {
                let (room, discards) = self.memory.clone();
                let device = mem::Mem::new(room, discards);
                self.demand = Some(device.demand());
                Box::new(device)
            }
            DeviceConfig::Balloon => Box::new(balloon::Balloon::new(self.memory.1.clone())),
            DeviceConfig::Passthrough { .. } => return Err("it is no virtio device".into()),
        })
    }
}

/// What a device is called in errors.
pub(super) fn kind(config: &DeviceConfig) -> &'static str {
    match config {
        DeviceConfig::Vsock { .. } => "vsock",
        DeviceConfig::Fs { .. } => "fs",
        DeviceConfig::Net { .. } => "net",
        DeviceConfig::Block { .. } => "block",
        DeviceConfig::Rng => "rng",
        DeviceConfig::Memory => "memory",
        DeviceConfig::Balloon => "balloon",
        DeviceConfig::Passthrough { .. } => "passthrough",
        DeviceConfig::VhostUser { kind: VhostUserKind::Net { .. }, .. } => "vhost-user net",
        DeviceConfig::VhostUser { kind: VhostUserKind::Block { .. }, .. } => "vhost-user block",
        DeviceConfig::VhostUser { kind: VhostUserKind::Fs { .. }, .. } => "vhost-user fs",
    }
}

//! A machine that runs, and what can be done with it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vial_vmm_api::{AddedFunctions, Descriptor, DiskShape, PassedBy, VmSize};

use super::disks::{self, Disks};
use super::growth::Growing;
use super::interfaces::Interfaces;
use super::passed::{Given, Passed};
use super::save::Saving;
use super::{Descriptors, DiskError, InterfaceError, PassError, ResizeError, SaveError};
use crate::devices::vfio::Placed;
use crate::devices::vhost_user::Handover;
use crate::devices::vsock;
use crate::kvm::Vm;
use crate::vcpu::{EndOfVm, Platform};

/// A machine that runs.
pub struct RunningMachine {
    pub(super) platform: Arc<Platform>,
    pub(super) vsock: Option<vsock::VsockConnector>,
    /// Keeps KVM's side of the machine for as long as the guest's memory is mapped.
    pub(super) vm: Arc<Vm>,
    pub(super) passed: Passed,
    pub(super) disks: Disks,
    pub(super) interfaces: Interfaces,
    pub(super) backends: Vec<Handover>,
    pub(super) hot_plug: bool,
    pub(super) saving: Option<Saving>,
    /// What it grows by, and what its vCPUs tell of their end.
    pub(super) growing: Option<(Growing, EndOfVm)>,
}

impl RunningMachine {
    /// Connects a stream to a port of the guest.
    ///
    /// # Errors
    /// There is no vsock device, or it has too many connections waiting.
    pub fn connect(&self, port: u32, socket: OwnedFd) -> Result<(), String> {
        let vsock = self.vsock.as_ref().ok_or("the VM has no vsock device; configure one")?;
        vsock.connect(port, socket).map_err(|error| error.to_string())
    }

    /// Adds functions of the host.
    ///
    /// # Errors
    /// [`PassError`]; none of them is there then.
    pub fn add_functions(
        &mut self,
        way: PassedBy,
        functions: Vec<Descriptor>,
        mut descriptors: Descriptors,
    ) -> Result<AddedFunctions, PassError> {
        if !self.hot_plug {
            return Err(PassError::NotHotPlug);
        }
        let given = Given { way, functions };
        self.passed.add(given, &mut descriptors, Placed::ByTheGuest)
    }

    /// Takes functions back that came together.
    ///
    /// # Errors
    /// [`PassError::NoSet`] and [`PassError::NotHotPlug`].
    pub fn remove_functions(&mut self, set: u32) -> Result<(), PassError> {
        match self.hot_plug {
            true => self.passed.remove(set),
            false => Err(PassError::NotHotPlug),
        }
    }

    /// Adds a disk, and returns its number on the bus.
    ///
    /// # Errors
    /// [`DiskError`]; it is not there then.
    pub fn add_disk(
        &mut self,
        file: Descriptor,
        read_only: bool,
        serial: &str,
        (shape, ring): (&DiskShape, Option<vial_ring::Layout>),
        mut descriptors: Descriptors,
    ) -> Result<u8, DiskError> {
        let file = descriptors.take(file, "the disk")?;
        let ring = ring.and_then(disks::take_ring);
        self.disks.add(file, read_only, serial, shape, ring)
    }

    /// Takes a disk that was added.
    ///
    /// # Errors
    /// [`DiskError::None`].
    pub fn remove_disk(&mut self, device: u8) -> Result<(), DiskError> {
        self.disks.remove(device)
    }

    /// Adds an interface of the queues of a tap and what carries their packets, if that is not this
    /// process, and returns its number on the bus.
    ///
    /// # Errors
    /// [`InterfaceError`]; it is not there then.
    pub fn add_interface(
        &mut self,
        (taps, vhosts): (Vec<Descriptor>, Vec<Descriptor>),
        mac: [u8; 6],
        mtu: u16,
        mut descriptors: Descriptors,
    ) -> Result<u8, InterfaceError> {
        let mut all = |which: Vec<_>, what| {
            which.into_iter().map(|which| descriptors.take(which, what)).collect::<Result<_, _>>()
        };
        let (taps, vhosts) = (all(taps, "the tap")?, all(vhosts, "/dev/vhost-net")?);
        self.interfaces.add((taps, vhosts), mac, mtu)
    }

    /// Takes an interface that was added.
    ///
    /// # Errors
    /// [`InterfaceError::None`].
    pub fn remove_interface(&mut self, device: u8) -> Result<(), InterfaceError> {
        self.interfaces.remove(device)
    }

    /// How large the machine is, if it can grow.
    ///
    /// # Errors
    /// [`ResizeError::Fixed`].
    pub fn size(&self) -> Result<VmSize, ResizeError> {
        self.growing.as_ref().map(|(growing, _)| growing.size()).ok_or(ResizeError::Fixed)
    }

    /// Gives it vCPUs, and asks the guest to have so much memory.
    ///
    /// # Errors
    /// [`ResizeError`]. It has what was made by then, and the guest is asked for what it was.
    pub fn resize(&mut self, vcpus: u8, memory_mib: u32) -> Result<VmSize, ResizeError> {
        let (growing, end) = self.growing.as_mut().ok_or(ResizeError::Fixed)?;
        growing.resize((vcpus, memory_mib), &self.vm, &self.platform, end)
    }

    /// Gives a device another connection to its backend.
    ///
    /// # Errors
    /// There is no such device.
    pub fn reconnect(&self, backend: u8, socket: OwnedFd) -> Result<(), String> {
        let handover = self.backends.get(usize::from(backend));
        handover.ok_or_else(|| format!("the VM has no vhost-user device {backend}"))?.give(socket);
        Ok(())
    }

    /// Stops the machine and writes it to two files, its memory and all else.
    ///
    /// # Errors
    /// [`SaveError`]. The machine stands still then, unless the error is harmless.
    pub fn save(&self, memory: &File, state: File) -> Result<(), SaveError> {
        let saving = self.saving.as_ref().ok_or(SaveError::NotATemplate)?;
        saving.save(&self.vm, self.vsock.as_ref(), memory, state)
    }

    /// Writes out what the guest's console still holds.
    pub fn flush_console(&self) {
        self.platform.ports.flush();
    }
}

//! Builds the machine that a [`VmConfig`] describes, and lets it run. What can be done before and
//! after are two types: a [`Machine`] that was not started has no threads in the guest, and a
//! [`RunningMachine`] cannot be given another kernel.

mod assembly;
pub(crate) mod check;
mod disks;
mod error;
mod growth;
mod interfaces;
mod late;
mod passed;
mod purpose;
mod restore;
mod running;
mod save;
mod vcpus;

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;
use vial_vmm_api::{BootReport, Descriptor, DeviceConfig, MEMORY_MIB, VmConfig};
use vmm_sys_util::eventfd::EventFd;

use self::assembly::Assembly;
pub use self::check::check;
use self::check::{check_common, is_of_backend, passed_functions};
pub use self::disks::DiskError;
use self::disks::Disks;
pub use self::error::MachineError;
use self::growth::Growing;
pub use self::growth::ResizeError;
pub use self::interfaces::InterfaceError;
use self::interfaces::Interfaces;
use self::late::Late;
pub use self::passed::PassError;
use self::passed::Passed;
pub use self::purpose::Purpose;
pub use self::running::RunningMachine;
pub use self::save::SaveError;
use self::save::Saving;
use crate::arch::{acpi, boot, cpuid, generation, layout, registers};
use crate::clock::monotonic_ns;
use crate::devices::mem::Room;
use crate::devices::vhost_user::{BackendGone, Handover};
use crate::devices::vsock;
use crate::event_loop::EventLoop;
use crate::kvm::{self, Vm};
use crate::memory::{GuestRam, Image, map_placed, map_shared};
use crate::pci::PciBus;
use crate::ports::{Console, Ports};
use crate::privileges;
use crate::seccomp::{self, ThreadKind};
use crate::vcpu::{self, EndOfVm, Parking, Platform};
use crate::virtio::pci::Workers;

/// The descriptors that came with a message, each to be taken once.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those of a message, in order.
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes one out.
    ///
    /// # Errors
    /// It is not there, or was taken.
    pub fn take(&mut self, which: Descriptor, what: &str) -> Result<OwnedFd, MachineError> {
        self.0.get_mut(usize::from(which.0)).and_then(Option::take).ok_or_else(|| {
            MachineError::Config(format!(
                "the descriptor for {what} (number {}) is missing or named twice; attach it",
                which.0
            ))
        })
    }
}

/// What a guest connects by: called on a device thread with the host's port and the stream.
pub type GuestConnected = Box<dyn Fn(u32, OwnedFd) + Send + Sync>;

/// A machine that is ready to run.
pub struct Machine {
    platform: Arc<Platform>,
    vcpus: Vec<VcpuFd>,
    vsock: Option<vsock::VsockConnector>,
    vm: Arc<Vm>,
    passed: Passed,
    disks: Disks,
    interfaces: Interfaces,
    backends: Vec<Handover>,
    hot_plug: bool,
    report: BootReport,
    saving: Option<Saving>,
    growing: Option<Growing>,
}

impl Machine {
    /// Builds a machine.
    ///
    /// # Errors
    /// Something in the configuration or on the host does not allow it; nothing is left behind
    /// but what ends with the process.
    pub fn build(
        config: VmConfig,
        mut descriptors: Descriptors,
        guest_connected: GuestConnected,
        backend_gone: BackendGone,
        purpose: Purpose,
    ) -> Result<Self, MachineError> {
        check(&config)?;
        purpose.check(&config)?;
        let told_vcpus = purpose.told_vcpus(&config);
        let mut marks = Vec::new();
        let mut mark = |name: &str| marks.push((name.to_owned(), monotonic_ns()));
        let kvm = kvm::adopt(descriptors.take(config.kvm, "/dev/kvm")?)?;
        let vm = Vm::new(&kvm)?;
        let ram = map_memory(&config, &mut descriptors)?;
        vm.set_memory(&ram, u64::MAX)?;
        mark("vm created");

        let supported = kvm::supported_cpuid(&kvm)?;
        let high_window = layout::high_window(cpuid::physical_address_bits(&supported));
        let image = map_image(&config, &mut descriptors)?;
        image.as_ref().map_or(Ok(()), |image| vm.set_image(image))?;
        let image_bytes = image.as_ref().map(Image::bytes);
        let told = Told { vcpus: told_vcpus, high_window: high_window.clone(), image_bytes };
        let entry = load_guest(&config, told, &mut descriptors, &ram)?;
        mark("kernel loaded");

        let console = match config.console {
            Some(which) => Some(console(descriptors.take(which, "the console")?, &vm)?),
            None => None,
        };
        let workers = start_workers(&config.devices, console.as_ref())?;
        let pci = PciBus::with_high_window(high_window.clone());
        let platform = Arc::new(Platform { ports: Ports::new(console), pci });
        let passed = Passed::new(&vm, &ram, &platform, high_window);
        let late = Late::new(&vm, &ram, &platform, &workers);
        let (disks, interfaces) = (Disks(late.clone()), Interfaces(late));
        let room = room(config.memory_mib, config.memory_mib);
        let memory = (room, passed.discards());
        let mut assembly = Assembly::new(&vm, &ram, &platform, workers, passed, memory);
        assembly.backend_gone = Some(backend_gone);
        let mut guest_connected = Some(guest_connected);
        for (number, device) in config.devices.into_iter().enumerate() {
            assembly.add(number, device, None, &mut descriptors, &mut guest_connected)?;
        }
        let Assembly { vsock, functions, passed, listed, backends, .. } = assembly;
        mark("devices added");

        let nodes = config.placement.nodes.len();
        let made = vcpus::create(&supported, &vm, 0..config.vcpus, told_vcpus, nodes)?;
        vcpus::set_boot_state(&made.vcpus, entry)?;
        let saving = match purpose {
            Purpose::Run => None,
            Purpose::Template { max_vcpus } => {
                let (arrived, parked) = sync_channel(made.vcpus.len());
                vcpu::prepare_parking().map_err(MachineError::Signal)?;
                Some(Saving {
                    ram,
                    image,
                    memory_mib: config.memory_mib,
                    max_vcpus,
                    devices: functions,
                    cpuid: made.cpuid,
                    registers: kvm::state_registers(&kvm)?,
                    parking: Arc::new(Parking::new(arrived)),
                    parked,
                    threads: Vec::new(),
                })
            }
        };
        mark("vcpus created");
        let (devices, backends) = backends.into_iter().unzip();
        let report = BootReport { marks, functions: listed, backends: devices };
        let (vcpus, hot_plug) = (made.vcpus, config.hot_plug);
        let growing = None;
        Ok(Self {
            platform,
            vcpus,
            vsock,
            vm,
            passed,
            disks,
            interfaces,
            backends,
            hot_plug,
            report,
            saving,
            growing,
        })
    }

    /// Lets the guest run. How it ends is told by `end`.
    ///
    /// # Errors
    /// A thread could not be started; the process has to end then.
    pub fn start(self, end: &EndOfVm) -> Result<(RunningMachine, BootReport), MachineError> {
        // The file server has its own. The vCPUs' threads inherit what is left here: nothing.
        privileges::give_up_capabilities()?;
        let kind = match self.hot_plug || !self.passed.is_empty() {
            true => ThreadKind::VcpuWithFunctions,
            false => ThreadKind::Vcpu,
        };
        let mut saving = self.saving;
        let parking = saving.as_ref().map(|saving| saving.parking.clone());
        let started = vcpus::start((0, self.vcpus), kind, &self.platform, end, parking.as_ref())?;
        // Nobody else starts a thread from here on.
        match &mut saving {
            None if self.growing.is_some() => seccomp::confine(ThreadKind::ControlThatGrows)?,
            None if self.hot_plug => seccomp::confine(ThreadKind::ControlWithFunctions)?,
            None => seccomp::confine(ThreadKind::Control)?,
            Some(saving) => {
                saving.threads = started.threads;
                seccomp::confine(ThreadKind::Saver)?;
            }
        }
        for gate in started.gates {
            // A thread that has ended has told why.
            let _ = gate.send(());
        }
        let mut report = self.report;
        report.marks.push(("vcpus started".to_owned(), monotonic_ns()));
        let running = RunningMachine {
            platform: self.platform,
            vsock: self.vsock,
            vm: self.vm,
            passed: self.passed,
            disks: self.disks,
            interfaces: self.interfaces,
            backends: self.backends,
            hot_plug: self.hot_plug,
            saving,
            growing: self.growing.map(|growing| (growing, end.clone())),
        };
        Ok((running, report))
    }
}

/// Where memory comes to a machine that began with `base_mib`, and has `memory_mib` now.
fn room(base_mib: u32, memory_mib: u32) -> Room {
    let bytes = |mib: u32| u64::from(mib) << 20;
    let range = layout::growth_room(bytes(base_mib), bytes(*MEMORY_MIB.end()));
    Room {
        start: range.start,
        bytes: range.end - range.start,
        present: bytes(memory_mib.saturating_sub(base_mib)),
    }
}

/// The guest's memory: its own, or what backends map as well.
fn map_memory(config: &VmConfig, descriptors: &mut Descriptors) -> Result<GuestRam, MachineError> {
    let bytes = u64::from(config.memory_mib) << 20;
    Ok(match config.shared_memory {
        Some(which) => {
            let file = File::from(descriptors.take(which, "the shared memory")?);
            map_shared(bytes, &config.placement, file)?
        }
        None => map_placed(bytes, &config.placement)?,
    })
}

fn map_image(
    config: &VmConfig,
    descriptors: &mut Descriptors,
) -> Result<Option<Image>, MachineError> {
    let Some(which) = config.image else { return Ok(None) };
    Ok(Some(Image::of_file(File::from(descriptors.take(which, "the guest image")?))?))
}

/// What a guest is told of its machine that its configuration does not say.
struct Told {
    vcpus: u8,
    high_window: Range<u64>,
    image_bytes: Option<u64>,
}

/// Loads the kernel and all that it finds in memory, and returns its entry point.
fn load_guest(
    config: &VmConfig,
    told: Told,
    descriptors: &mut Descriptors,
    ram: &GuestRam,
) -> Result<vm_memory::GuestAddress, MachineError> {
    let mut kernel = File::from(descriptors.take(config.kernel, "the kernel")?);
    let loaded = boot::load_kernel(ram, &mut kernel)?;
    registers::write_boot_tables(ram)?;
    generation::renew(ram)?;
    let platform = acpi::Platform {
        vcpus: told.vcpus,
        serial: config.console.is_some(),
        high_window: (told.high_window.start, told.high_window.end),
        placement: &config.placement,
    };
    let acpi_root = acpi::write_tables(ram, platform)?;
    let root = if told.image_bytes.is_some() { boot::IMAGE_ROOT } else { "" };
    let command_line = format!("{} {root}", config.command_line);
    boot::write_parameters(ram, command_line.trim_end(), told.image_bytes, acpi_root)?;
    Ok(loaded.kernel_load)
}

fn console(file: OwnedFd, vm: &Vm) -> Result<Arc<Mutex<Console>>, MachineError> {
    let pin = EventFd::new(libc::EFD_NONBLOCK).map_err(MachineError::Event)?;
    vm.attach_pin(layout::SERIAL_GSI, &pin)?;
    Ok(Arc::new(Mutex::new(Console::new(File::from(file), pin))))
}

fn start_workers(
    devices: &[DeviceConfig],
    console: Option<&Arc<Mutex<Console>>>,
) -> Result<Workers, MachineError> {
    let files = |device: &DeviceConfig| {
        matches!(device, DeviceConfig::Fs { .. } | DeviceConfig::Block { .. })
    };
    let blocks = devices.iter().any(files);
    let io = EventLoop::start("io", || {
        privileges::give_up_capabilities().map_err(|error| error.to_string())?;
        seccomp::confine(ThreadKind::Io).map_err(|error| error.to_string())
    })?;
    if let Some(console) = console {
        crate::console_input::watch(&io, console)?;
    }
    let file_server = match blocks {
        true => Some(EventLoop::start("file-server", || {
            privileges::become_file_server().map_err(|error| error.to_string())?;
            seccomp::confine(ThreadKind::FileServer).map_err(|error| error.to_string())
        })?),
        false => None,
    };
    let vhost_user = match devices.iter().any(is_of_backend) {
        true => Some(EventLoop::start("vhost-user", || {
            privileges::give_up_capabilities().map_err(|error| error.to_string())?;
            seccomp::confine(ThreadKind::VhostUser).map_err(|error| error.to_string())
        })?),
        false => None,
    };
    Ok(Workers { io, file_server, vhost_user })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_is_taken_once() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let mut descriptors = Descriptors::new(vec![file]);
        descriptors.take(Descriptor(0), "it").unwrap();
        assert!(descriptors.take(Descriptor(0), "it").is_err());
        assert!(descriptors.take(Descriptor(1), "it").is_err());
    }
}

//! Builds the machine that a [`VmConfig`] describes, and lets it run. What can be done before and
//! after are two types: a [`Machine`] that was not started has no threads in the guest, and a
//! [`RunningMachine`] cannot be given another kernel.

mod assembly;
mod disks;
mod growth;
mod interfaces;
mod late;
mod passed;
mod purpose;
mod restore;
mod save;
mod vcpus;

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;
use vial_vmm_api::{
    API_VERSION, AddedFunctions, BootReport, Descriptor, DeviceConfig, DiskShape,
    MAX_COMMAND_LINE_BYTES, MAX_DEVICES, MAX_PASSED_FUNCTIONS, MEMORY_MIB, VCPUS, VmConfig, VmSize,
};
use vmm_sys_util::eventfd::EventFd;

use self::assembly::Assembly;
pub use self::disks::DiskError;
use self::disks::Disks;
use self::growth::Growing;
pub use self::growth::ResizeError;
pub use self::interfaces::InterfaceError;
use self::interfaces::Interfaces;
use self::late::Late;
pub use self::passed::PassError;
use self::passed::{Given, Passed};
pub use self::purpose::Purpose;
pub use self::save::SaveError;
use self::save::Saving;
use crate::arch::{acpi, boot, cpuid, generation, layout, registers, vcpu_state};
use crate::clock::monotonic_ns;
use crate::devices::mem::Room;
use crate::devices::vfio::Placed;
use crate::devices::vhost_user::{BackendGone, Handover};
use crate::devices::vsock;
use crate::event_loop::{EventLoop, EventLoopError};
use crate::kvm::{self, Vm};
use crate::memory::{GuestRam, map_placed, map_shared};
use crate::numa;
use crate::pci::PciBus;
use crate::ports::{Console, Ports};
use crate::privileges::{self, PrivilegeError};
use crate::seccomp::{self, SeccompError, ThreadKind};
use crate::snapshot::SnapshotError;
use crate::vcpu::{self, EndOfVm, Parking, Platform};
use crate::virtio::pci::{RestoreError, TransportError, Workers};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// A device's descriptor is not what the device needs, or its settings are wrong.
    #[error("device {number} ({kind}): {reason}")]
    Device {
        /// Its place in the configuration, from 0.
        number: usize,
        /// What it is.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The kernel or its parameters.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// The guest's memory.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::KvmError),
    /// A vCPU's registers.
    #[error(transparent)]
    Registers(#[from] registers::RegisterError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// A vCPU's CPUID.
    #[error("set CPUID of vCPU {0}: {1}")]
    Cpuid(u8, String),
    /// The VM generation identifier.
    #[error(transparent)]
    Generation(#[from] generation::GenerationError),
    /// The saved machine.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A vCPU of the saved machine.
    #[error(transparent)]
    VcpuState(#[from] vcpu_state::VcpuStateError),
    /// The saved machine had another processor.
    #[error(
        "the saved machine saw another processor, KVM or VMM (CPUID leaf {leaf:#x}, {subleaf}); \
         make it again on this host"
    )]
    Processor {
        /// The first leaf that differs.
        leaf: u32,
        /// Its sub-leaf.
        subleaf: u32,
    },
    /// A device of the saved machine.
    #[error("device {number} ({kind}) of the saved machine: {error}; make it again")]
    Restore {
        /// Its place in the configuration, from 0.
        number: usize,
        /// What it is.
        kind: &'static str,
        /// What is wrong.
        error: RestoreError,
    },
    /// What takes vCPUs out of the guest.
    #[error("prepare the machine to be saved: {0}")]
    Signal(String),
    /// A device's place on the bus.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A thread.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// A vCPU's thread.
    #[error("start the thread of vCPU {0}: {1}; check the pids limit of the pod's cgroup")]
    Thread(u8, std::io::Error),
    /// A thread's privileges.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// A thread's system calls.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// An event descriptor.
    #[error("make an event descriptor: {0}; raise the limit of open files")]
    Event(std::io::Error),
}

impl MachineError {
    /// Whether the request is at fault, rather than the host.
    pub fn is_invalid_request(&self) -> bool {
        matches!(
            self,
            Self::Config(_)
                | Self::Device { .. }
                | Self::Boot(_)
                | Self::Snapshot(_)
                | Self::Processor { .. }
                | Self::Memory(crate::memory::MemoryError::Short { .. })
                | Self::Restore { .. }
        )
    }
}

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

/// Checks all that can be checked before anything is made.
///
/// # Errors
/// [`MachineError::Config`].
pub fn check(config: &VmConfig) -> Result<(), MachineError> {
    check_common(config.version, config.vcpus, config.memory_mib, &config.devices)?;
    numa::check(config).map_err(MachineError::Config)?;
    let wrong = |text: String| Err(MachineError::Config(text));
    if config.command_line.len() > MAX_COMMAND_LINE_BYTES {
        return wrong(format!(
            "the kernel command line has {} bytes: give at most {MAX_COMMAND_LINE_BYTES}",
            config.command_line.len()
        ));
    }
    let backends = config.devices.iter().any(is_of_backend);
    if backends != config.shared_memory.is_some() {
        return wrong(
            "vhost-user backends and shared memory come together; give both, or none".into(),
        );
    }
    if backends && config.devices.contains(&DeviceConfig::Memory) {
        return wrong(
            "vhost-user backends see no memory that comes later; leave the memory device out"
                .into(),
        );
    }
    let keeps = backends || config.placement.huge_pages.is_some();
    if keeps && config.devices.contains(&DeviceConfig::Balloon) {
        return wrong(
            "memory that vhost-user backends share, or that is in huge pages, does not go back to \
             the host by parts; leave the balloon device out"
                .into(),
        );
    }
    if config.command_line.contains(|c: char| c.is_control()) {
        return wrong("the kernel command line holds control characters; take them out".into());
    }
    Ok(())
}

/// Checks what booted and restored machines have in common.
fn check_common(
    version: u32,
    vcpus: u8,
    memory_mib: u32,
    devices: &[DeviceConfig],
) -> Result<(), MachineError> {
    let wrong = |text: String| Err(MachineError::Config(text));
    if version != API_VERSION {
        return wrong(format!(
            "the request speaks version {version}, this VMM version {API_VERSION}; install shim \
             and VMM of one release"
        ));
    }
    if !VCPUS.contains(&vcpus) {
        let (least, most) = (VCPUS.start(), VCPUS.end());
        return wrong(format!("{vcpus} vCPUs: give {least} to {most}"));
    }
    if !MEMORY_MIB.contains(&memory_mib) {
        let (least, most) = (MEMORY_MIB.start(), MEMORY_MIB.end());
        return wrong(format!("{memory_mib} MiB of memory: give {least} to {most}"));
    }
    if devices.len() > MAX_DEVICES {
        return wrong(format!("{} devices: give at most {MAX_DEVICES}", devices.len()));
    }
    let sockets = devices.iter().filter(|d| matches!(d, DeviceConfig::Vsock { .. }));
    if sockets.count() > 1 {
        return wrong("two vsock devices: give one".into());
    }
    for (device, name) in [(DeviceConfig::Memory, "memory"), (DeviceConfig::Balloon, "balloon")] {
        if devices.iter().filter(|other| **other == device).count() > 1 {
            return wrong(format!("two {name} devices: give one"));
        }
    }
    let passed: Vec<usize> = devices.iter().filter_map(passed_functions).collect();
    if passed.len() > 1 {
        return wrong("two lists of passed functions: give one with all of them".into());
    }
    if passed.iter().any(|count| *count > MAX_PASSED_FUNCTIONS) {
        return wrong(format!("more than {MAX_PASSED_FUNCTIONS} passed functions: give fewer"));
    }
    Ok(())
}

/// Whether a process of the host serves the device.
fn is_of_backend(device: &DeviceConfig) -> bool {
    matches!(device, DeviceConfig::VhostUser { .. })
}

/// How many functions of the host the entry passes, if it is one of those.
fn passed_functions(device: &DeviceConfig) -> Option<usize> {
    match device {
        DeviceConfig::Passthrough { functions, .. } => Some(functions.len()),
        _ => None,
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

/// A machine that runs.
pub struct RunningMachine {
    platform: Arc<Platform>,
    vsock: Option<vsock::VsockConnector>,
    /// Keeps KVM's side of the machine for as long as the guest's memory is mapped.
    vm: Arc<Vm>,
    passed: Passed,
    disks: Disks,
    interfaces: Interfaces,
    backends: Vec<Handover>,
    hot_plug: bool,
    saving: Option<Saving>,
    /// What it grows by, and what its vCPUs tell of their end.
    growing: Option<(Growing, EndOfVm)>,
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
        let entry = load_guest(&config, told_vcpus, &mut descriptors, &ram, high_window.clone())?;
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
        container: Descriptor,
        groups: Vec<Descriptor>,
        functions: Vec<Descriptor>,
        mut descriptors: Descriptors,
    ) -> Result<AddedFunctions, PassError> {
        if !self.hot_plug {
            return Err(PassError::NotHotPlug);
        }
        let given = Given { container, groups, functions };
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

    /// Adds an interface of a tap and what carries its packets, if that is not this process, and
    /// returns its number on the bus.
    ///
    /// # Errors
    /// [`InterfaceError`]; it is not there then.
    pub fn add_interface(
        &mut self,
        (tap, vhost): (Descriptor, Option<Descriptor>),
        mac: [u8; 6],
        mtu: u16,
        mut descriptors: Descriptors,
    ) -> Result<u8, InterfaceError> {
        let tap = descriptors.take(tap, "the tap")?;
        let vhost = vhost.map(|which| descriptors.take(which, "/dev/vhost-net")).transpose()?;
        self.interfaces.add((tap, vhost), mac, mtu)
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

/// Loads the kernel and all that it finds in memory, for a guest that is told of so many vCPUs, and
/// returns its entry point.
fn load_guest(
    config: &VmConfig,
    vcpus: u8,
    descriptors: &mut Descriptors,
    ram: &GuestRam,
    high_window: Range<u64>,
) -> Result<vm_memory::GuestAddress, MachineError> {
    let mut kernel = File::from(descriptors.take(config.kernel, "the kernel")?);
    let loaded = boot::load_kernel(ram, &mut kernel)?;
    let initrd = match config.initrd {
        Some(which) => {
            let mut image = File::from(descriptors.take(which, "the initial RAM disk")?);
            Some(boot::load_initrd(ram, &mut image, loaded.kernel_end)?)
        }
        None => None,
    };
    registers::write_boot_tables(ram)?;
    generation::renew(ram)?;
    let platform = acpi::Platform {
        vcpus,
        serial: config.console.is_some(),
        high_window: (high_window.start, high_window.end),
        placement: &config.placement,
    };
    let acpi_root = acpi::write_tables(ram, platform)?;
    boot::write_parameters(ram, &config.command_line, initrd, acpi_root)?;
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
pub(crate) mod tests {
    use vial_vmm_api::{HugePages, Placement};

    use super::*;

    /// A machine that can be.
    pub(crate) fn config() -> VmConfig {
        VmConfig {
            version: API_VERSION,
            kvm: Descriptor(0),
            vcpus: 1,
            memory_mib: 128,
            kernel: Descriptor(1),
            initrd: None,
            command_line: String::new(),
            console: None,
            devices: Vec::new(),
            hot_plug: false,
            placement: Placement::default(),
            shared_memory: None,
        }
    }

    fn passed(functions: usize) -> DeviceConfig {
        DeviceConfig::Passthrough {
            container: Descriptor(2),
            groups: Vec::new(),
            functions: vec![Descriptor(3); functions],
        }
    }

    #[test]
    fn machine_beyond_a_bound_is_refused_by_name() {
        type Change = fn(&mut VmConfig);
        let cases: [(Change, &str); 14] = [
            (|c| c.version += 1, "version"),
            (|c| c.vcpus = 0, "vCPUs"),
            (|c| c.vcpus = 65, "vCPUs"),
            (|c| c.memory_mib = 31, "MiB"),
            (|c| c.memory_mib = 65537, "MiB"),
            (|c| c.command_line = "x".repeat(MAX_COMMAND_LINE_BYTES + 1), "command line"),
            (|c| c.command_line = "a\nb".into(), "control characters"),
            (|c| c.devices = vec![DeviceConfig::Rng; MAX_DEVICES + 1], "devices"),
            (
                |c| {
                    c.devices = vec![DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![] }; 2];
                },
                "vsock",
            ),
            (|c| c.shared_memory = Some(Descriptor(2)), "shared memory"),
            (|c| c.devices = vec![DeviceConfig::Balloon; 2], "two balloon devices"),
            (
                |c| {
                    c.devices = vec![DeviceConfig::Balloon];
                    c.placement.huge_pages = Some(HugePages::Mib2);
                },
                "leave the balloon device out",
            ),
            (|c| c.devices = vec![passed(1), passed(1)], "two lists"),
            (|c| c.devices = vec![passed(MAX_PASSED_FUNCTIONS + 1)], "passed functions"),
        ];
        check(&config()).unwrap();
        for (change, word) in cases {
            let mut config = config();
            change(&mut config);
            let text = check(&config).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn descriptor_is_taken_once() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let mut descriptors = Descriptors::new(vec![file]);
        descriptors.take(Descriptor(0), "it").unwrap();
        assert!(descriptors.take(Descriptor(0), "it").is_err());
        assert!(descriptors.take(Descriptor(1), "it").is_err());
    }
}

//! Builds the machine that a [`VmConfig`] describes, and lets it run. What can be done before and
//! after are two types: a [`Machine`] that was not started has no threads in the guest, and a
//! [`RunningMachine`] cannot be given another kernel.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;
use vial_vmm_api::{
    API_VERSION, BootReport, Descriptor, DeviceConfig, MAX_COMMAND_LINE_BYTES, MAX_DEVICES,
    MAX_PASSED_FUNCTIONS, MEMORY_MIB, VCPUS, VmConfig,
};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{acpi, boot, cpuid, layout, registers};
use crate::clock::monotonic_ns;
use crate::devices::{block, fs, net, rng, vfio, vsock};
use crate::event_loop::{EventLoop, EventLoopError};
use crate::kvm::{self, Vm};
use crate::memory::{GuestRam, map_ram};
use crate::pci::PciBus;
use crate::ports::{Console, Ports};
use crate::privileges::{self, PrivilegeError};
use crate::seccomp::{self, SeccompError, ThreadKind};
use crate::vcpu::{self, EndOfVm, Platform};
use crate::virtio::VirtioDevice;
use crate::virtio::pci::{TransportError, VirtioPci, Workers};

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
        matches!(self, Self::Config(_) | Self::Device { .. } | Self::Boot(_))
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
    let wrong = |text: String| Err(MachineError::Config(text));
    if config.version != API_VERSION {
        return wrong(format!(
            "the request speaks version {}, this VMM version {API_VERSION}; install shim and VMM \
             of one release",
            config.version
        ));
    }
    if !VCPUS.contains(&config.vcpus) {
        let (least, most) = (VCPUS.start(), VCPUS.end());
        return wrong(format!("{} vCPUs: give {least} to {most}", config.vcpus));
    }
    if !MEMORY_MIB.contains(&config.memory_mib) {
        let (least, most) = (MEMORY_MIB.start(), MEMORY_MIB.end());
        return wrong(format!("{} MiB of memory: give {least} to {most}", config.memory_mib));
    }
    if config.command_line.len() > MAX_COMMAND_LINE_BYTES {
        return wrong(format!(
            "the kernel command line has {} bytes: give at most {MAX_COMMAND_LINE_BYTES}",
            config.command_line.len()
        ));
    }
    if config.command_line.contains(|c: char| c.is_control()) {
        return wrong("the kernel command line holds control characters; take them out".into());
    }
    if config.devices.len() > MAX_DEVICES {
        return wrong(format!("{} devices: give at most {MAX_DEVICES}", config.devices.len()));
    }
    let sockets = config.devices.iter().filter(|d| matches!(d, DeviceConfig::Vsock { .. }));
    if sockets.count() > 1 {
        return wrong("two vsock devices: give one".into());
    }
    let passed: Vec<usize> = config.devices.iter().filter_map(passed_functions).collect();
    if passed.len() > 1 {
        return wrong("two lists of passed functions: give one with all of them".into());
    }
    if passed.iter().any(|count| *count > MAX_PASSED_FUNCTIONS) {
        return wrong(format!("more than {MAX_PASSED_FUNCTIONS} passed functions: give fewer"));
    }
    Ok(())
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
    passed: Option<vfio::Joined>,
    marks: Vec<(String, u64)>,
}

/// A machine that runs.
pub struct RunningMachine {
    platform: Arc<Platform>,
    vsock: Option<vsock::VsockConnector>,
    /// Keeps KVM's side of the machine for as long as the guest's memory is mapped.
    _vm: Arc<Vm>,
    /// Keeps passed functions joined.
    _passed: Option<vfio::Joined>,
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
    ) -> Result<Self, MachineError> {
        check(&config)?;
        let mut marks = Vec::new();
        let mut mark = |name: &str| marks.push((name.to_owned(), monotonic_ns()));
        let kvm = kvm::adopt(descriptors.take(config.kvm, "/dev/kvm")?)?;
        let vm = Vm::new(&kvm)?;
        let ram = map_ram(u64::from(config.memory_mib) << 20)?;
        vm.set_memory(&ram)?;
        mark("vm created");

        let supported = kvm::supported_cpuid(&kvm)?;
        let passes = config.devices.iter().any(|device| passed_functions(device).is_some());
        let high_window =
            passes.then(|| layout::high_window(cpuid::physical_address_bits(&supported)));
        let entry = load_guest(&config, &mut descriptors, &ram, high_window.clone())?;
        mark("kernel loaded");

        let console = match config.console {
            Some(which) => Some(console(descriptors.take(which, "the console")?, &vm)?),
            None => None,
        };
        let workers = start_workers(&config, console.as_ref())?;
        let high_window = high_window.unwrap_or_default();
        let pci = PciBus::with_high_window(high_window.clone());
        let platform = Arc::new(Platform { ports: Ports::new(console), pci });
        let mut assembly = Assembly {
            vm: &vm,
            ram: &ram,
            platform: &platform,
            workers,
            vsock: None,
            high_window,
            passed: None,
        };
        let mut guest_connected = Some(guest_connected);
        for (number, device) in config.devices.into_iter().enumerate() {
            assembly.add(number, device, &mut descriptors, &mut guest_connected)?;
        }
        let Assembly { vsock, passed, .. } = assembly;
        mark("devices added");

        let vcpus = create_vcpus(&supported, &vm, config.vcpus, entry)?;
        mark("vcpus created");
        Ok(Self { platform, vcpus, vsock, vm, passed, marks })
    }

    /// Lets the guest run. How it ends is told by `end`.
    ///
    /// # Errors
    /// A thread could not be started; the process has to end then.
    pub fn start(self, end: &EndOfVm) -> Result<(RunningMachine, BootReport), MachineError> {
        // The file server has its own. The vCPUs' threads inherit what is left here: nothing.
        privileges::give_up_capabilities()?;
        let kind = match self.passed {
            Some(_) => ThreadKind::VcpuWithFunctions,
            None => ThreadKind::Vcpu,
        };
        let gates = spawn_vcpus(self.vcpus, kind, &self.platform, end)?;
        // Nobody starts a thread from here on.
        seccomp::confine(ThreadKind::Control)?;
        for gate in gates {
            // A thread that has ended has told why.
            let _ = gate.send(());
        }
        let mut marks = self.marks;
        marks.push(("vcpus started".to_owned(), monotonic_ns()));
        let running = RunningMachine {
            platform: self.platform,
            vsock: self.vsock,
            _vm: self.vm,
            _passed: self.passed,
        };
        Ok((running, BootReport { marks }))
    }
}

/// Starts a thread for each vCPU, which enters the guest when its gate is opened. All have their
/// filters when this returns.
fn spawn_vcpus(
    vcpus: Vec<VcpuFd>,
    kind: ThreadKind,
    platform: &Arc<Platform>,
    end: &EndOfVm,
) -> Result<Vec<SyncSender<()>>, MachineError> {
    let (confined, answers) = sync_channel(vcpus.len());
    let mut gates = Vec::new();
    for (index, vcpu) in (0u8..).zip(vcpus) {
        let (platform, end, confined) = (platform.clone(), end.clone(), confined.clone());
        let (gate, opened) = sync_channel(1);
        gates.push(gate);
        std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(VCPU_STACK_BYTES)
            .spawn(move || {
                let result = seccomp::confine(kind);
                let goes_on = result.is_ok();
                // There is room for an answer of each.
                let _ = confined.send(result);
                if goes_on && opened.recv().is_ok() {
                    vcpu::run(vcpu, index, &platform, &end);
                }
            })
            .map_err(|error| MachineError::Thread(index, error))?;
    }
    // Each answers once; the one here keeps the channel from ending before.
    for answer in answers.iter().take(gates.len()) {
        answer?;
    }
    Ok(gates)
}

/// A vCPU's thread calls devices' register functions and nothing deep.
const VCPU_STACK_BYTES: usize = 256 << 10;

impl RunningMachine {
    /// Connects a stream to a port of the guest.
    ///
    /// # Errors
    /// There is no vsock device, or it has too many connections waiting.
    pub fn connect(&self, port: u32, socket: OwnedFd) -> Result<(), String> {
        let vsock = self.vsock.as_ref().ok_or("the VM has no vsock device; configure one")?;
        vsock.connect(port, socket).map_err(|error| error.to_string())
    }

    /// Writes out what the guest's console still holds.
    pub fn flush_console(&self) {
        self.platform.ports.flush();
    }
}

/// Loads the kernel and all that it finds in memory, and returns its entry point.
fn load_guest(
    config: &VmConfig,
    descriptors: &mut Descriptors,
    ram: &GuestRam,
    high_window: Option<Range<u64>>,
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
    let platform = acpi::Platform {
        vcpus: config.vcpus,
        serial: config.console.is_some(),
        high_window: high_window.map(|window| (window.start, window.end)),
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
    config: &VmConfig,
    console: Option<&Arc<Mutex<Console>>>,
) -> Result<Workers, MachineError> {
    let files = |device: &DeviceConfig| {
        matches!(device, DeviceConfig::Fs { .. } | DeviceConfig::Block { .. })
    };
    let blocks = config.devices.iter().any(files);
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
    Ok(Workers { io, file_server })
}

fn create_vcpus(
    supported: &kvm_bindings::CpuId,
    vm: &Vm,
    count: u8,
    entry: vm_memory::GuestAddress,
) -> Result<Vec<VcpuFd>, MachineError> {
    (0..count)
        .map(|index| {
            let vcpu = vm.create_vcpu(index)?;
            let tsc_khz = vcpu.get_tsc_khz().ok();
            let entries = cpuid::for_vcpu(supported, index, count, tsc_khz);
            kvm_bindings::CpuId::from_entries(&entries)
                .map_err(|error| MachineError::Cpuid(index, format!("{error:?}")))
                .and_then(|cpuid| {
                    vcpu.set_cpuid2(&cpuid)
                        .map_err(|error| MachineError::Cpuid(index, error.to_string()))
                })?;
            registers::set_model_specific_registers(&vcpu)?;
            registers::set_local_apic(&vcpu)?;
            if index == 0 {
                registers::set_boot_state(&vcpu, entry)?;
            }
            Ok(vcpu)
        })
        .collect()
}

/// What devices are put together with.
struct Assembly<'a> {
    vm: &'a Arc<Vm>,
    ram: &'a GuestRam,
    platform: &'a Platform,
    workers: Workers,
    vsock: Option<vsock::VsockConnector>,
    high_window: Range<u64>,
    passed: Option<vfio::Joined>,
}

impl Assembly<'_> {
    /// Puts functions of the host on the bus, and lets them reach guest memory.
    fn pass(
        &mut self,
        container: Descriptor,
        groups: Vec<Descriptor>,
        functions: Vec<Descriptor>,
        descriptors: &mut Descriptors,
    ) -> Result<(), String> {
        let text = |error: vfio::VfioError| error.to_string();
        let mut take =
            |which, what| descriptors.take(which, what).map_err(|error| error.to_string());
        let container = take(container, "the VFIO container")?;
        let groups = groups
            .into_iter()
            .map(|group| take(group, "a VFIO group"))
            .collect::<Result<Vec<_>, _>>()?;
        for function in functions {
            let function = take(function, "a passed function")?;
            let window = self.high_window.clone();
            let function =
                vfio::function(function, self.vm, &self.platform.pci, window).map_err(text)?;
            let added = self.platform.pci.add(Arc::new(Mutex::new(function)));
            added.map_err(|error| error.to_string())?;
        }
        self.passed = Some(vfio::join(container, groups, self.vm, self.ram).map_err(text)?);
        Ok(())
    }

    fn add(
        &mut self,
        number: usize,
        config: DeviceConfig,
        descriptors: &mut Descriptors,
        guest_connected: &mut Option<GuestConnected>,
    ) -> Result<(), MachineError> {
        let kind = kind(&config);
        if let DeviceConfig::Passthrough { container, groups, functions } = config {
            return self
                .pass(container, groups, functions, descriptors)
                .map_err(|reason| MachineError::Device { number, kind, reason });
        }
        let device = self
            .device(config, descriptors, guest_connected)
            .map_err(|reason| MachineError::Device { number, kind, reason })?;
        let function = VirtioPci::new(
            device,
            &self.platform.pci,
            self.ram.clone(),
            self.vm.clone(),
            self.vm.clone(),
            self.workers.clone(),
        )?;
        self.platform
            .pci
            .add(Arc::new(Mutex::new(function)))
            .map_err(|error| MachineError::Device { number, kind, reason: error.to_string() })?;
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
            DeviceConfig::Net { tap, mac, mtu } => {
                let tap = take(tap, "the tap")?;
                Box::new(net::Net::new(tap, mac, mtu).map_err(|error| text(&error))?)
            }
            DeviceConfig::Block { file, read_only, serial } => {
                let file = take(file, "the disk")?;
                Box::new(block::Block::new(file, read_only, &serial).map_err(|e| text(&e))?)
            }
            DeviceConfig::Rng => Box::new(rng::Rng::new()),
            DeviceConfig::Passthrough { .. } => return Err("it is no virtio device".into()),
        })
    }
}

fn kind(config: &DeviceConfig) -> &'static str {
    match config {
        DeviceConfig::Vsock { .. } => "vsock",
        DeviceConfig::Fs { .. } => "fs",
        DeviceConfig::Net { .. } => "net",
        DeviceConfig::Block { .. } => "block",
        DeviceConfig::Rng => "rng",
        DeviceConfig::Passthrough { .. } => "passthrough",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
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
        let cases: [(Change, &str); 11] = [
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

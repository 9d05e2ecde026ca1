//! A vCPU's thread: it enters the guest, and serves what the guest cannot do by itself.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vial_vmm_api::ExitReason;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::layout::{ECAM_SIZE, ECAM_START};
use crate::kvm;
use crate::news::News;
use crate::pci::PciBus;
use crate::ports::Ports;

/// All that the guest reaches by exits.
pub struct Platform {
    /// I/O ports.
    pub ports: Ports,
    /// The PCI bus.
    pub pci: PciBus,
}

impl Platform {
    fn read_memory(&self, address: u64, data: &mut [u8]) {
        match ecam_offset(address) {
            Some(offset) => self.pci.read_config(offset, data),
            None => self.pci.read_memory(address, data),
        }
    }

    fn write_memory(&self, address: u64, data: &[u8]) {
        match ecam_offset(address) {
            Some(offset) => self.pci.write_config(offset, data),
            None => self.pci.write_memory(address, data),
        }
    }
}

fn ecam_offset(address: u64) -> Option<u64> {
    address.checked_sub(ECAM_START).filter(|offset| *offset < ECAM_SIZE)
}

/// How a vCPU's thread tells the others that the VM ended.
#[derive(Clone)]
pub struct EndOfVm(Arc<News>);

impl EndOfVm {
    /// Tells it by `news`.
    pub fn new(news: Arc<News>) -> Self {
        Self(news)
    }

    /// Ends the VM, unless it has ended.
    pub fn signal(&self, reason: ExitReason) {
        self.0.end(reason);
    }
}

/// Where vCPUs go that leave the guest for good, to be saved.
#[derive(Debug)]
pub struct Parking {
    /// A vCPU that is in the guest notices with the next signal to its thread (SIGRTMIN, see
    /// [`prepare_parking`]).
    pub request: vial_sync::Parking,
    arrived: SyncSender<(u8, VcpuFd)>,
}

impl Parking {
    /// Each vCPU is sent to `arrived`, with its number, when it is asked to come.
    pub fn new(arrived: SyncSender<(u8, VcpuFd)>) -> Self {
        Self { request: vial_sync::Parking::default(), arrived }
    }
}

/// Lets SIGRTMIN take a vCPU out of the guest, and do nothing else.
///
/// # Errors
/// The host refuses.
pub fn prepare_parking() -> Result<(), String> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(|error| error.to_string())
}

/// Runs the guest on this vCPU until something ends the VM, or it is asked to park.
pub fn run(
    mut vcpu: VcpuFd,
    index: u8,
    platform: &Platform,
    end: &EndOfVm,
    parking: Option<&Parking>,
) {
    loop {
        let asked = parking.filter(|parking| parking.request.is_asked());
        if asked.is_some() {
            // KVM then ends the access that was served last, and does not enter the guest.
            vcpu.set_kvm_immediate_exit(1);
        }
        let served = match vcpu.run() {
            Err(error) if let (Some(parking), libc::EINTR) = (asked, error.errno()) => {
                // Nobody waits for it when saving was given up.
                let _ = parking.arrived.send((index, vcpu));
                return;
            }
            Ok(exit) => serve(exit, platform),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Served::GoOn,
            Err(error) => Served::Stuck(format!("KVM could not run it: {error}")),
        };
        let what = match served {
            Served::GoOn => continue,
            Served::End(reason) => return end.signal(reason),
            Served::InternalError => kvm::internal_error(&mut vcpu),
            Served::Stuck(what) => what,
        };
        let rip = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
        tracing::error!(
            vcpu = index,
            %what,
            rip = format_args!("{rip:#x}"),
            "a vCPU is stuck; if this happens to every pod, check with `vial check` that this \
             host's KVM is usable"
        );
        return end.signal(ExitReason::Failed);
    }
}

/// What an exit leads to.
enum Served {
    GoOn,
    End(ExitReason),
    /// KVM met an error of its own, and tells more of it.
    InternalError,
    /// Neither KVM nor the VMM can go on with it.
    Stuck(String),
}

fn serve(exit: VcpuExit<'_>, platform: &Platform) -> Served {
    match exit {
        VcpuExit::MmioRead(address, data) => platform.read_memory(address, data),
        VcpuExit::MmioWrite(address, data) => platform.write_memory(address, data),
        VcpuExit::IoIn(port, data) => platform.ports.read(port, data),
        VcpuExit::IoOut(port, data) => {
            return platform.ports.write(port, data).map_or(Served::GoOn, Served::End);
        }
        VcpuExit::Intr => {}
        VcpuExit::Shutdown => return Served::End(ExitReason::TripleFault),
        VcpuExit::InternalError => return Served::InternalError,
        other => return Served::Stuck(format!("KVM left the guest by {other:?}")),
    }
    Served::GoOn
}

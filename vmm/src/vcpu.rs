//! A vCPU's thread: it enters the guest, and serves what the guest cannot do by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vial_vmm_api::ExitReason;

use crate::arch::layout::{ECAM_SIZE, ECAM_START};
use crate::pci::PciBus;
use crate::ports::Ports;
use crate::wake::Wake;

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
pub struct EndOfVm {
    reasons: Sender<ExitReason>,
    wake: Wake,
    ended: Arc<AtomicBool>,
}

impl EndOfVm {
    /// Sends the first reason to `reasons` and then wakes `wake`.
    pub fn new(reasons: Sender<ExitReason>, wake: Wake) -> Self {
        Self { reasons, wake, ended: Arc::new(AtomicBool::new(false)) }
    }

    /// Ends the VM, unless it has ended.
    pub fn signal(&self, reason: ExitReason) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            // The receiver only goes when the process does.
            let _ = self.reasons.send(reason);
            self.wake.ring();
        }
    }
}

/// Runs the guest on this vCPU until something ends the VM.
pub fn run(mut vcpu: VcpuFd, index: u8, platform: &Platform, end: &EndOfVm) {
    loop {
        let reason = match vcpu.run() {
            Ok(exit) => serve(exit, index, platform),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(error) => {
                tracing::error!(vcpu = index, %error, "KVM could not run the vCPU");
                Some(ExitReason::Failed)
            }
        };
        if let Some(reason) = reason {
            end.signal(reason);
            return;
        }
    }
}

fn serve(exit: VcpuExit<'_>, index: u8, platform: &Platform) -> Option<ExitReason> {
    match exit {
        VcpuExit::MmioRead(address, data) => platform.read_memory(address, data),
        VcpuExit::MmioWrite(address, data) => platform.write_memory(address, data),
        VcpuExit::IoIn(port, data) => platform.ports.read(port, data),
        VcpuExit::IoOut(port, data) => return platform.ports.write(port, data),
        VcpuExit::Intr => {}
        VcpuExit::Shutdown => return Some(ExitReason::TripleFault),
        other => {
            tracing::error!(
                vcpu = index,
                exit = ?other,
                "the guest did what KVM cannot serve; if this happens to every pod, check that \
                 this host's KVM is usable with `vial check`"
            );
            return Some(ExitReason::Failed);
        }
    }
    None
}

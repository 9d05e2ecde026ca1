//! The vCPUs of a machine: made, started, and stopped to be saved.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;

use super::MachineError;
use crate::arch::vcpu_state::VcpuState;
use crate::arch::{cpuid, registers};
use crate::kvm::Vm;
use crate::seccomp::{self, ThreadKind};
use crate::vcpu::{self, EndOfVm, Parking, Platform};

/// A vCPU's thread calls devices' register functions and nothing deep.
const VCPU_STACK_BYTES: usize = 256 << 10;

/// vCPUs that are not started, and what each answers to CPUID.
pub(super) struct Vcpus {
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
}

/// Makes these vCPUs of a `package` of so many, for a guest of so many NUMA nodes. They have
/// nothing but their CPUID.
pub(super) fn create(
    supported: &kvm_bindings::CpuId,
    vm: &Vm,
    which: impl IntoIterator<Item = u8>,
    package: u8,
    nodes: usize,
) -> Result<Vcpus, MachineError> {
    let mut made = Vcpus { vcpus: Vec::new(), cpuid: Vec::new() };
    for index in which {
        let vcpu = vm.create_vcpu(index)?;
        let tsc_khz = vcpu.get_tsc_khz().ok();
        let entries = cpuid::for_vcpu(supported, index, package, nodes, tsc_khz);
        kvm_bindings::CpuId::from_entries(&entries)
            .map_err(|error| MachineError::Cpuid(index, format!("{error:?}")))
            .and_then(|cpuid| {
                vcpu.set_cpuid2(&cpuid)
                    .map_err(|error| MachineError::Cpuid(index, error.to_string()))
            })?;
        made.vcpus.push(vcpu);
        made.cpuid.push(entries);
    }
    Ok(made)
}

/// Puts vCPUs where a kernel expects them.
pub(super) fn set_boot_state(
    vcpus: &[VcpuFd],
    entry: vm_memory::GuestAddress,
) -> Result<(), MachineError> {
    for (index, vcpu) in vcpus.iter().enumerate() {
        registers::set_model_specific_registers(vcpu)?;
        registers::set_local_apic(vcpu)?;
        if index == 0 {
            registers::set_boot_state(vcpu, entry)?;
        }
    }
    Ok(())
}

/// Gives the first vCPUs what was saved, and the others what one has that nobody has started yet,
/// and the time of the first.
pub(super) fn restore(vcpus: &[VcpuFd], saved: &[VcpuState]) -> Result<(), MachineError> {
    let mut states = saved.iter();
    for (index, vcpu) in (0..).zip(vcpus) {
        match (states.next(), saved.first()) {
            (Some(state), _) => state.apply(vcpu, index)?,
            (None, first) => {
                registers::set_model_specific_registers(vcpu)?;
                registers::set_local_apic(vcpu)?;
                first.map_or(Ok(()), |first| first.share_time(vcpu, index))?;
            }
        }
    }
    Ok(())
}

/// Threads that wait to enter the guest.
pub(super) struct Started {
    /// Each opens one.
    pub(super) gates: Vec<SyncSender<()>>,
    pub(super) threads: Vec<JoinHandle<()>>,
}

/// Starts a thread for each vCPU, of which the first has that number, which enters the guest when its gate is opened. All have their
/// filters when this returns.
pub(super) fn start(
    (first, vcpus): (u8, Vec<VcpuFd>),
    kind: ThreadKind,
    platform: &Arc<Platform>,
    end: &EndOfVm,
    parking: Option<&Arc<Parking>>,
) -> Result<Started, MachineError> {
    let (confined, answers) = sync_channel(vcpus.len());
    let (mut gates, mut threads) = (Vec::new(), Vec::new());
    for (index, vcpu) in (first..).zip(vcpus) {
        let (platform, end, confined) = (platform.clone(), end.clone(), confined.clone());
        let parking = parking.cloned();
        let (gate, opened) = sync_channel(1);
        gates.push(gate);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(VCPU_STACK_BYTES)
            .spawn(move || {
                let result = seccomp::confine(kind);
                let goes_on = result.is_ok();
                // There is room for an answer of each.
                let _ = confined.send(result);
                if goes_on && opened.recv().is_ok() {
                    vcpu::run(vcpu, index, &platform, &end, parking.as_deref());
                }
            })
            .map_err(|error| MachineError::Thread(index, error))?;
        threads.push(thread);
    }
    // Each answers once; the one here keeps the channel from ending before.
    for answer in answers.iter().take(gates.len()) {
        answer?;
    }
    Ok(Started { gates, threads })
}

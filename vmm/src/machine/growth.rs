//! A restored machine that becomes larger, or is asked to become smaller, while it runs.
//!
//! vCPUs are made and stay: the guest's kernel starts and stops them. Memory gets a slot of KVM's
//! when it comes and keeps it; how much of it the guest has is between it and the memory device.

use std::ops::RangeInclusive;
use std::sync::Arc;

use kvm_bindings::CpuId;
use vial_vmm_api::{GROWTH_STEP_MIB, MEMORY_MIB, VmSize};

use super::{MachineError, vcpus};
use crate::arch::registers;
use crate::devices::mem::{Demand, Room};
use crate::kvm::{KvmError, Vm};
use crate::seccomp::ThreadKind;
use crate::vcpu::{EndOfVm, Platform};

/// Why a machine does not change its size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It cannot.
    #[error("the VM keeps its size; restore one with `max_memory_mib`")]
    Fixed,
    /// The vCPUs are out of their bounds.
    #[error("{wanted} vCPUs are wanted, and the VM can have {least} to {most}")]
    Vcpus {
        /// What was asked for.
        wanted: u8,
        /// What it has.
        least: u8,
        /// What its guest knows of.
        most: u8,
    },
    /// The memory is out of its bounds, or no multiple.
    #[error(
        "{wanted} MiB of memory are wanted, and the VM can have {least} to {most}, in steps of \
         {GROWTH_STEP_MIB}"
    )]
    Memory {
        /// What was asked for.
        wanted: u32,
        /// What was saved.
        least: u32,
        /// What there is room for.
        most: u32,
    },
    /// KVM does not take the memory.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU cannot be made or started.
    #[error(transparent)]
    Vcpu(Box<MachineError>),
}

impl ResizeError {
    /// Whether the request is at fault, rather than the host.
    pub fn is_invalid_request(&self) -> bool {
        !matches!(self, Self::Kvm(_) | Self::Vcpu(_))
    }
}

impl From<MachineError> for ResizeError {
    fn from(error: MachineError) -> Self {
        Self::Vcpu(error.into())
    }
}

/// How far a machine can grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// What was saved, and the most memory.
    pub(super) memory_mib: (u32, u32),
    /// The vCPUs that the guest knows of.
    pub(super) max_vcpus: u8,
}

impl Bounds {
    /// Checks a size for a machine that has so many vCPUs.
    fn check(&self, has: u8, vcpus: u8, memory_mib: u32) -> Result<(), ResizeError> {
        if !(has..=self.max_vcpus).contains(&vcpus) {
            return Err(ResizeError::Vcpus { wanted: vcpus, least: has, most: self.max_vcpus });
        }
        let (least, most) = self.memory_mib;
        match memory_mib.checked_sub(least) {
            Some(more) if memory_mib <= most && more.is_multiple_of(GROWTH_STEP_MIB) => Ok(()),
            _ => Err(ResizeError::Memory { wanted: memory_mib, least, most }),
        }
    }
}

/// What a machine grows by.
pub(super) struct Growing {
    pub(super) bounds: Bounds,
    pub(super) room: Room,
    pub(super) demand: Demand,
    pub(super) supported: CpuId,
    /// vCPUs that are there.
    pub(super) vcpus: u8,
}

impl Growing {
    /// The most memory in MiB for a machine that was saved with `base`, is restored with `now`, and
    /// may have as much as is asked for.
    pub(super) fn most_mib(now: u32, asked: Option<u32>) -> u32 {
        asked.unwrap_or(now).min(*MEMORY_MIB.end()).max(now)
    }

    /// How large it is.
    pub(super) fn size(&self) -> VmSize {
        let base = self.bounds.memory_mib.0;
        // No more than MEMORY_MIB.
        let mib = |bytes: u64| base + (bytes >> 20) as u32;
        VmSize {
            vcpus: self.vcpus,
            memory_mib: mib(self.demand.requested_bytes()),
            plugged_mib: mib(self.demand.plugged_bytes()),
        }
    }

    /// Changes it.
    ///
    /// # Errors
    /// [`ResizeError`]. What was made by then stays, and the guest is asked for what it was.
    pub(super) fn resize(
        &mut self,
        (vcpus, memory_mib): (u8, u32),
        vm: &Vm,
        platform: &Arc<Platform>,
        end: &EndOfVm,
    ) -> Result<VmSize, ResizeError> {
        self.bounds.check(self.vcpus, vcpus, memory_mib)?;
        let wanted = u64::from(memory_mib - self.bounds.memory_mib.0) << 20;
        let present = self.demand.present_bytes();
        if wanted > present {
            vm.add_memory(self.room.start + present..self.room.start + wanted)?;
            self.demand.extend(wanted);
        }
        for index in self.vcpus..vcpus {
            self.add_vcpu(index..=index, vm, platform, end)?;
            self.vcpus = index + 1;
        }
        self.demand.request(wanted);
        Ok(self.size())
    }

    /// Makes vCPUs that wait for the guest's kernel to start them.
    fn add_vcpu(
        &self,
        which: RangeInclusive<u8>,
        vm: &Vm,
        platform: &Arc<Platform>,
        end: &EndOfVm,
    ) -> Result<(), MachineError> {
        let first = *which.start();
        let made = vcpus::create(&self.supported, vm, which, self.bounds.max_vcpus, 0)?;
        for vcpu in &made.vcpus {
            // KVM gives one that comes later the time of the others.
            registers::set_model_specific_registers(vcpu)?;
            registers::set_local_apic(vcpu)?;
        }
        let started = vcpus::start((first, made.vcpus), ThreadKind::Vcpu, platform, end, None)?;
        for gate in started.gates {
            // A thread that has ended has told why.
            let _ = gate.send(());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn size_beyond_a_bound_is_refused_with_the_bounds() {
        let bounds = Bounds { memory_mib: (128, 1024), max_vcpus: 8 };
        for (vcpus, memory_mib, words) in [
            (1, 128, "can have 2 to 8"),
            (9, 128, "can have 2 to 8"),
            (0, 128, "can have 2 to 8"),
            (2, 126, "128 to 1024"),
            (2, 1026, "128 to 1024"),
            (2, 129, "steps of 2"),
            (2, u32::MAX, "128 to 1024"),
        ] {
            let error = bounds.check(2, vcpus, memory_mib).unwrap_err();
            assert!(error.is_invalid_request() && error.to_string().contains(words), "{error}");
        }
        bounds.check(2, 8, 1024).unwrap();
        bounds.check(2, 2, 128).unwrap();
    }

    proptest! {
        #[test]
        fn room_is_never_less_than_what_is_there(now in MEMORY_MIB, asked: Option<u32>) {
            let most = Growing::most_mib(now, asked);
            prop_assert!(most >= now && MEMORY_MIB.contains(&most));
            prop_assert!(asked.is_some() || most == now);
        }
    }
}

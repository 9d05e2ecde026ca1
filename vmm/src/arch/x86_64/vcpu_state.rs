//! All that a vCPU holds, to be taken out of one machine and put into another.
//!
//! What KVM lists as a machine's model-specific registers is taken, whatever it is. Not all of
//! them can be read or written on every host; a register that cannot be set and holds another value
//! than it should is an error, one that does is none.

use kvm_bindings::{
    Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::kvm;

/// The most model-specific registers of a vCPU; KVM knows a few hundred.
pub const MAX_REGISTERS: usize = 1024;

// Model-specific registers (Intel SDM volume 4) whose place in the order matters.
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// What a vCPU holds.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    /// Model-specific registers, number and value, in the order in which they are to be set.
    registers: Vec<(u32, u64)>,
}

/// Why a vCPU's state could not be taken, or given.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error("{action} of vCPU {vcpu}: {source}; this host's KVM may be of another version")]
    Kvm {
        /// What was asked for.
        action: &'static str,
        /// The vCPU.
        vcpu: u8,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// A register cannot hold what it should.
    #[error(
        "set model-specific register {register:#x} of vCPU {vcpu} to {value:#x}: this host's KVM \
         refuses"
    )]
    Register {
        /// The vCPU.
        vcpu: u8,
        /// The register.
        register: u32,
        /// What it should hold.
        value: u64,
    },
}

fn refused(action: &'static str, vcpu: u8) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { action, vcpu, source }
}

impl VcpuState {
    /// Takes it from a vCPU that is not in the guest and has no access of the guest's half done.
    /// `registers` are the numbers of the model-specific registers.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn of(vcpu: &VcpuFd, index: u8, registers: &[u32]) -> Result<Self, VcpuStateError> {
        let read = |action| refused(action, index);
        // First of all: KVM folds what is pending into it.
        let mp_state = vcpu.get_mp_state().map_err(read("read the run state"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(read("read the general registers"))?,
            sregs: vcpu.get_sregs().map_err(read("read the system registers"))?,
            xsave: vcpu.get_xsave().map_err(read("read the extended state"))?,
            xcrs: vcpu.get_xcrs().map_err(read("read the extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(read("read the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(read("read the local APIC"))?,
            registers: read_registers(vcpu, index, registers)?,
            events: vcpu.get_vcpu_events().map_err(read("read the pending events"))?,
        })
    }

    /// Puts it into a vCPU that was never run and has its CPUID.
    ///
    /// # Errors
    /// KVM refuses, or does not know a register.
    pub fn apply(&self, vcpu: &VcpuFd, index: u8) -> Result<(), VcpuStateError> {
        let set = |action| refused(action, index);
        vcpu.set_mp_state(self.mp_state).map_err(set("set the run state"))?;
        vcpu.set_regs(&self.regs).map_err(set("set the general registers"))?;
        // Before the local APIC: its mode is in here.
        vcpu.set_sregs(&self.sregs).map_err(set("set the system registers"))?;
        kvm::set_extended_state(vcpu, &self.xsave).map_err(set("set the extended state"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(set("set the extended control registers"))?;
        vcpu.set_debug_regs(&self.debug).map_err(set("set the debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(set("set the local APIC"))?;
        write_registers(vcpu, index, &self.registers)?;
        vcpu.set_vcpu_events(&self.events).map_err(set("set the pending events"))
    }

    /// Lets a vCPU that was never run count time with the one whose state this is, which has it
    /// already. KVM takes two that are set alike within a second as set at one moment.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn share_time(&self, vcpu: &VcpuFd, index: u8) -> Result<(), VcpuStateError> {
        let time = self.registers.iter().filter(|(register, _)| *register == MSR_TSC);
        // It goes on meanwhile, so what it holds then is not compared.
        write_registers(vcpu, index, &time.copied().collect::<Vec<_>>())
    }

    /// Whether there are no more model-specific registers than there can be.
    pub fn is_bounded(&self) -> bool {
        self.registers.len() <= MAX_REGISTERS
    }
}

/// The time stamp counter comes first, for others count from it; the deadline on it last, when
/// the local APIC's timer is in its mode and the counter runs.
fn order(registers: &mut [(u32, u64)]) {
    registers.sort_by_key(|(register, _)| match *register {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
}

fn entries(registers: &[(u32, u64)]) -> Option<Msrs> {
    let entries: Vec<_> = registers
        .iter()
        .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).ok()
}

/// Reads those that can be read: KVM stops at one that cannot, which is left out.
fn read_registers(
    vcpu: &VcpuFd,
    index: u8,
    numbers: &[u32],
) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut found = Vec::new();
    let mut rest = &numbers[..numbers.len().min(MAX_REGISTERS)];
    while !rest.is_empty() {
        let wanted: Vec<_> = rest.iter().map(|number| (*number, 0)).collect();
        // There are no more than an array can have.
        let Some(mut msrs) = entries(&wanted) else { break };
        let action = "read the model-specific registers";
        let count = vcpu.get_msrs(&mut msrs).map_err(refused(action, index))?;
        found.extend(msrs.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    order(&mut found);
    Ok(found)
}

fn write_registers(
    vcpu: &VcpuFd,
    index: u8,
    registers: &[(u32, u64)],
) -> Result<(), VcpuStateError> {
    let mut rest = registers;
    while let Some(msrs) = entries(rest).filter(|_| !rest.is_empty()) {
        let action = "set the model-specific registers";
        let count = vcpu.set_msrs(&msrs).map_err(refused(action, index))?;
        let Some(&(register, value)) = rest.get(count) else { break };
        let holds = read_registers(vcpu, index, &[register])?;
        if holds.first().is_none_or(|(_, now)| *now != value) {
            return Err(VcpuStateError::Register { vcpu: index, register, value });
        }
        rest = &rest[count + 1..];
    }
    Ok(())
}

/// The first leaf of CPUID, as leaf and sub-leaf, that two vCPUs do not answer alike.
pub fn differing_leaf(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> Option<(u32, u32)> {
    let place = |entry: &kvm_cpuid_entry2| (entry.function, entry.index);
    let answers = |entry: &kvm_cpuid_entry2| (entry.eax, entry.ebx, entry.ecx, entry.edx);
    let mut pairs = one.iter().zip(other);
    let differs = |(a, b): &(&kvm_cpuid_entry2, &kvm_cpuid_entry2)| {
        place(a) != place(b) || answers(a) != answers(b)
    };
    let longer = if one.len() > other.len() { one } else { other };
    let left = longer.get(one.len().min(other.len()));
    pairs.find(differs).map(|(a, _)| a).or(left).map(place)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn time_comes_first_and_its_deadline_last() {
        let mut registers = vec![(MSR_TSC_DEADLINE, 1), (0x174, 2), (MSR_TSC, 3), (0x175, 4)];
        order(&mut registers);
        assert_eq!(registers, [(MSR_TSC, 3), (0x174, 2), (0x175, 4), (MSR_TSC_DEADLINE, 1)]);
    }

    fn leaves(answers: &[u32]) -> Vec<kvm_cpuid_entry2> {
        (0..)
            .zip(answers)
            .map(|(function, eax)| kvm_cpuid_entry2 { function, eax: *eax, ..Default::default() })
            .collect()
    }

    proptest! {
        #[test]
        fn leaf_that_differs_is_named(
            answers in proptest::collection::vec(any::<u32>(), 1..20), pick: prop::sample::Index,
        ) {
            let one = leaves(&answers);
            prop_assert_eq!(differing_leaf(&one, &one), None);
            let at = pick.index(answers.len());
            let mut other = one.clone();
            other[at].edx ^= 1;
            prop_assert_eq!(differing_leaf(&one, &other), Some((at as u32, 0)));
            prop_assert_eq!(differing_leaf(&one, &one[..at]), Some((at as u32, 0)));
            prop_assert_eq!(differing_leaf(&one[..at], &one), Some((at as u32, 0)));
        }
    }
}

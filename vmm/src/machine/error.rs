//! Why a machine could not be built.

use crate::arch::{acpi, boot, generation, registers, vcpu_state};
use crate::event_loop::EventLoopError;
use crate::kvm;
use crate::privileges::PrivilegeError;
use crate::seccomp::SeccompError;
use crate::snapshot::SnapshotError;
use crate::virtio::pci::{RestoreError, TransportError};

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
    /// The guest's image.
    #[error(transparent)]
    Image(#[from] crate::memory::ImageError),
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

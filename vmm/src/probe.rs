//! Whether this host's KVM can really run a guest. That `/dev/kvm` opens does not tell: there are
//! hosts whose KVM emulates a guest's supervisor mode instruction by instruction, thousands of
//! times too slow and not completely. So a guest of two dozen bytes counts down in 64-bit
//! supervisor mode and then does one 16-byte atomic exchange.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::registers;
use crate::kvm::{self, Vm};
use crate::memory::map_ram;

/// Where the probe's code lies: below everything but clear of the boot tables.
const CODE_START: u64 = 0x10_0000;
/// Iterations of the loop, two instructions each.
const ITERATIONS: u32 = 300_000;
/// The longest that a usable KVM takes, with room for a nested one on a loaded host. An emulating
/// one takes ten times as long.
const LIMIT: Duration = Duration::from_millis(100);
/// What the guest writes to, and what it writes, when it got to its end.
const DONE_PORT: u16 = 0x80;
const DONE_VALUE: u8 = 0x42;

/// Why KVM is not usable, each with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// There is no such device.
    #[error(
        "there is no {0}: turn on virtualisation in the firmware (in a VM: nested virtualisation) \
         and load kvm_amd or kvm_intel"
    )]
    Absent(String),
    /// It may not be opened.
    #[error("{0} may not be opened: run as root, or as a member of the group kvm")]
    Denied(String),
    /// It cannot be opened.
    #[error("{0} cannot be opened: {1}; check that it is KVM's device node")]
    Open(String, std::io::Error),
    /// Something on the way to the guest failed.
    #[error("KVM does not run a guest: {0}; check the kernel log for messages of kvm")]
    Setup(String),
    /// The guest did not get to its end.
    #[error(
        "KVM cannot run this guest's instructions ({0}): it is not hardware virtualisation that \
         answers here; use a host with real or nested KVM"
    )]
    Stopped(String),
    /// The guest got to its end much too slowly.
    #[error(
        "KVM takes {took_ms} ms for a loop that takes well under 1 ms on hardware: it emulates the \
         guest's instructions; use a host with real or nested KVM"
    )]
    Slow {
        /// How long it took.
        took_ms: u128,
    },
}

/// The guest: `ecx` iterations, `lock cmpxchg16b [rdi]`, then a byte to a port.
fn code() -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, ITERATIONS
    code.extend(ITERATIONS.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]); // 1: dec ecx; jnz 1b
    code.extend([0xbf, 0x00, 0x00, 0x11, 0x00]); // mov edi, 0x110000
    code.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0f]); // lock cmpxchg16b [rdi]
    code.extend([0xb0, DONE_VALUE, 0xe6, DONE_PORT as u8]); // mov al, DONE; out PORT, al
    code.push(0xf4); // hlt
    code
}

/// Runs the probe, and returns how long the guest took.
///
/// # Errors
/// KVM is not usable, and why.
pub fn probe(path: &Path) -> Result<Duration, Unusable> {
    let name = || path.display().to_string();
    let device =
        OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
            match error.kind() {
                ErrorKind::NotFound => Unusable::Absent(name()),
                ErrorKind::PermissionDenied => Unusable::Denied(name()),
                _ => Unusable::Open(name(), error),
            }
        })?;
    let setup = |error: &dyn std::fmt::Display| Unusable::Setup(error.to_string());
    let kvm = kvm::adopt(device.into()).map_err(|error| setup(&error))?;
    let vm = Vm::new(&kvm).map_err(|error| setup(&error))?;
    let ram = map_ram(2 << 20).map_err(|error| setup(&error))?;
    vm.set_memory(&ram, u64::MAX).map_err(|error| setup(&error))?;
    registers::write_boot_tables(&ram).map_err(|error| setup(&error))?;
    ram.write_slice(&code(), GuestAddress(CODE_START)).map_err(|error| setup(&error))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|error| setup(&error))?;
    let cpuid = kvm::supported_cpuid(&kvm).map_err(|error| setup(&error))?;
    vcpu.set_cpuid2(&cpuid).map_err(|error| setup(&error))?;
    registers::set_boot_state(&vcpu, GuestAddress(CODE_START)).map_err(|error| setup(&error))?;

    let start = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::IoOut(DONE_PORT, [DONE_VALUE])) => {}
        Ok(exit) => return Err(Unusable::Stopped(format!("{exit:?}"))),
        Err(error) => return Err(Unusable::Stopped(error.to_string())),
    }
    match start.elapsed() {
        took if took <= LIMIT => Ok(took),
        took => Err(Unusable::Slow { took_ms: took.as_millis() }),
    }
}

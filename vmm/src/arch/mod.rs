//! What depends on the processor's architecture: a folder each.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("vial-vmm runs on x86-64; another architecture is a folder beside arch/x86_64");

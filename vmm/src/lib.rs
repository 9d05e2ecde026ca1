//! The microVM monitor of Vial.
//!
//! One process runs one virtual machine. It is driven over one socket ([`control`]) by the
//! requests of `vial-vmm-api`, and opens nothing by itself: every file comes as a descriptor with
//! a request. It never hears the word container.
//!
//! ```text
//! control ──> machine ──> kvm, memory, arch     what is built once, saved, and built again
//!                └──────> pci ──> virtio::pci ──> devices
//! vcpu ──exit──> ports, pci                     what the guest reaches
//! event_loop ──> devices' workers               what serves the guest's queues
//! ```
//!
//! Whatever the guest writes, queue contents, registers, headers, is hostile: each has a bound.

pub mod arch;
pub mod clock;
pub mod console_input;
pub mod control;
pub mod devices;
pub mod event_loop;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod kvm;
pub mod landlock;
pub mod machine;
pub mod memory;
pub mod news;
pub mod numa;
pub mod pci;
pub mod ports;
pub mod privileges;
pub mod probe;
pub mod seccomp;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
pub mod vm_state;
pub mod wake;

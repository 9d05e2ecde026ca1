//! x86-64: the address map, and what the kernel finds in registers, CPUID and memory when it is
//! entered.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod generation;
pub mod layout;
pub mod registers;
mod segments;
pub mod vcpu_state;

//! What the programs of this crate share.

pub mod disk_load;
pub mod loop_device;
pub mod node;
pub mod vmm;

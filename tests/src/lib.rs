//! What the programs of this crate share.

pub mod node;
pub mod vmm;

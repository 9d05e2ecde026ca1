//! The memory device, driven by a hostile driver.

use vial_vmm::{
    devices::mem::{Mem, Room},
    fuzzing::drive,
    memory::Discards,
};

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    // The upper half of what a script's guest has.
    let room = Room { start: 32 << 20, bytes: 1 << 30, present: 32 << 20 };
    drive(&mut Mem::new(room, Discards::default()), script);
}

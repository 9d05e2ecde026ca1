//! The balloon device, driven by a hostile driver.

use vial_vmm::{devices::balloon::Balloon, fuzzing::drive, memory::Discards};

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    drive(&mut Balloon::new(Discards::default()), script);
}

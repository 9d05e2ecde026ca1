//! The entropy device, driven by a hostile driver.

use vial_vmm::{devices::rng::Rng, fuzzing::drive};

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    drive(&mut Rng::new(), script)
}

//! The entropy device, driven by a hostile driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vial_vmm::{devices::rng::Rng, fuzzing::drive};

fuzz_target!(|script: &[u8]| drive(&mut Rng::new(), script));

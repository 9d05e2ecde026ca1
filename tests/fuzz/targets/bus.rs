//! The bus: configuration space, BARs, MSI-X tables and the registers of virtio, written to by a hostile guest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vial_vmm::{
    devices::{rng::Rng, vsock::Vsock},
    fuzzing::drive_bus,
};

fuzz_target!(|script: &[u8]| {
    let (vsock, _connector) = Vsock::new(3, vec![1024], Box::new(|_, _| ())).expect("a device");
    drive_bus(vec![Box::new(Rng::new()), Box::new(vsock)], script);
});

//! The bus: configuration space, BARs, MSI-X tables and the registers of virtio, written to by a hostile guest.

use vial_vmm::{
    devices::{rng::Rng, vsock::Vsock},
    fuzzing::drive_bus,
};

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    let (vsock, _connector) = Vsock::new(3, vec![1024], Box::new(|_, _| ())).expect("a device");
    drive_bus(vec![Box::new(Rng::new()), Box::new(vsock)], script);
}

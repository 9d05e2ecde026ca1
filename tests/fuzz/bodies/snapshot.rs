//! The saved state of a machine. Its checksum keeps accidents out, not an author, so what lies behind it is fuzzed
//! as if it had none.

use vial_vmm::{fuzzing::read_state, snapshot::Snapshot};

/// Panics where the rules above are broken.
pub(crate) fn run(bytes: &[u8]) {
    let _ = Snapshot::read(&mut &bytes[..]);
    read_state(bytes);
}

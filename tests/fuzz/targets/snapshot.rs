//! The saved state of a machine. Its checksum keeps accidents out, not an author, so what lies behind it is fuzzed
//! as if it had none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vial_vmm::{fuzzing::read_state, snapshot::Snapshot};

fuzz_target!(|bytes: &[u8]| {
    let _ = Snapshot::read(&mut &bytes[..]);
    read_state(bytes);
});

//! The disk, driven by a hostile driver: one that can be written and one that cannot, whose bytes stay.

use std::io::{Read, Seek, Write};

use rustix::fs::{MemfdFlags, memfd_create};
use vial_vmm::{devices::block::Block, fuzzing::drive};

const BYTES: usize = 16 << 10;

/// Panics where the rules above are broken.
pub(crate) fn run(script: &[u8]) {
    let Some((&kind, script)) = script.split_first() else { return };
    let read_only = kind & 1 == 1;
    let disk = memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory");
    let mut file = std::fs::File::from(disk.try_clone().expect("a descriptor"));
    file.write_all(&[7; BYTES]).expect("room");
    drive(&mut Block::new(disk, read_only, "fuzzed").expect("a disk"), script);
    let mut after = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut after)).expect("its bytes");
    assert_eq!(after.len(), BYTES, "a disk has the size that it had");
    assert!(!read_only || after == [7; BYTES], "a read-only disk was written to");
}

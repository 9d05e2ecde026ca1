//! The VM generation identifier: by another one a guest learns that it goes on as one of several,
//! and that its random numbers have to be its own from here on.

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::layout::GENERATION_START;
use crate::memory::GuestRam;

const IDENTIFIER_BYTES: usize = 16;

/// Why there is no new generation.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// No random numbers.
    #[error("draw a VM generation identifier: {0}")]
    Random(rustix::io::Errno),
    /// Its place is not in guest memory.
    #[error("write the VM generation identifier to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes an identifier that no other machine has. Telling a guest that runs is the caller's.
///
/// # Errors
/// [`GenerationError`].
pub fn renew(ram: &GuestRam) -> Result<(), GenerationError> {
    let mut identifier = [0; IDENTIFIER_BYTES];
    let mut filled = 0;
    while filled < identifier.len() {
        match getrandom(&mut identifier[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(GenerationError::Random(error)),
        }
    }
    Ok(ram.write_slice(&identifier, GuestAddress(GENERATION_START))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map_ram;

    #[test]
    fn each_generation_is_another() {
        let ram = map_ram(32 << 20).unwrap();
        let mut seen = std::collections::HashSet::new();
        for _ in 0..4 {
            renew(&ram).unwrap();
            let identifier: u128 = ram.read_obj(GuestAddress(GENERATION_START)).unwrap();
            assert!(seen.insert(identifier));
        }
    }
}

//! A machine at rest, and the file that it is kept in.
//!
//! The guest's memory is a file of its own, mapped as it is. All else is small: a header of
//! fixed size, then the state, encoded by postcard.
//!
//! ```text
//!  0  magic           8 bytes
//!  8  version         4 bytes, little endian, as all numbers of the header
//! 12  length          8 bytes: of what follows the header
//! 20  checksum        8 bytes: of what follows the header (`checksum` below)
//! 28  state
//! ```
//!
//! The checksum finds damage, any changed byte among it, and no forgery: whoever can write the
//! file can write the memory beside it, which is the guest.

use std::io::{Read, Write};

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};
use vial_vmm_api::{MAX_DEVICES, VCPUS, is_image_size};

use crate::arch::vcpu_state::VcpuState;
use crate::kvm::VmState;
use crate::virtio::pci::DeviceState;

const MAGIC: [u8; 8] = *b"VIALVMST";
/// Of the header, and of the shape of [`Snapshot`]. Whatever changes how a machine is built
/// changes it too: what the guest has seen once stays.
const VERSION: u32 = 6;
const HEADER_BYTES: usize = 28;
/// The largest state: 64 vCPUs have less than a MiB.
pub const MAX_STATE_BYTES: usize = 4 << 20;
/// As much as that of a machine with one vCPU, with room: it is read at once.
const USUAL_BYTES: usize = 24 << 10;

/// A machine at rest, less its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The version of the VMM that made it.
    pub vmm: String,
    /// The guest's memory, in MiB.
    pub memory_mib: u32,
    /// The most vCPUs that a machine can have that goes on from it, as its guest was told.
    pub max_vcpus: u8,
    /// What each vCPU answers to CPUID.
    pub cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// What each vCPU holds.
    pub vcpus: Vec<VcpuState>,
    /// What else KVM holds of it.
    pub vm: VmState,
    /// Its devices, in their order on the bus.
    pub devices: Vec<DeviceState>,
    /// Of the file of its memory, the huge pages of [`HUGE_PAGE_BYTES`] that hold nothing but zeros, by their numbers.
    pub empty: Vec<u32>,
    /// How long the guest's image is, if it has one. It lies behind the memory, in the same file, from the next huge page on.
    pub image_bytes: Option<u64>,
}

/// Why a state cannot be written, or is not used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file.
    #[error("{action} the saved state: {error}")]
    File {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        error: std::io::Error,
    },
    /// It is something else.
    #[error("the saved state is none: it does not begin as one; make it again")]
    Magic,
    /// Another version wrote it.
    #[error("the saved state has version {0}, this VMM reads {VERSION}; make it again")]
    Version(u32),
    /// Its end is missing, or something follows.
    #[error("the saved state has {found} bytes behind its header, not {told}; make it again")]
    Length {
        /// What the header says.
        told: u64,
        /// What there is.
        found: usize,
    },
    /// It is larger than any can be.
    #[error("the saved state is larger than {MAX_STATE_BYTES} bytes; make it again")]
    TooLarge,
    /// Its bytes have changed.
    #[error("the saved state is damaged: its checksum is wrong; make it again")]
    Checksum,
    /// Its bytes are no state.
    #[error("the saved state cannot be read: {0}; make it again")]
    Encoding(postcard::Error),
    /// It has another machine's parts.
    #[error("the saved state has {0}, which no machine has; make it again")]
    Bounds(&'static str),
    /// Another release wrote it.
    #[error("the saved state is of vial-vmm {0}, this is {own}; make it again", own = RELEASE)]
    Release(String),
}

/// The release of this VMM.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");

/// FNV-1a of 64 bits, but of words, the last of which is filled up with zeros: a start waits for it. A product's upper bits
/// say nothing to its lower ones, so the sum is turned before each step. Each step can be undone, so two inputs of one length
/// that differ in one word differ in it.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum: u64, bytes| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        (sum.rotate_left(29) ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The file of a state: its header, and `body`.
fn seal(body: &[u8]) -> Result<Vec<u8>, SnapshotError> {
    if body.len() > MAX_STATE_BYTES {
        return Err(SnapshotError::TooLarge);
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(checksum(body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// What [`seal`] was given.
fn open(bytes: &[u8]) -> Result<&[u8], SnapshotError> {
    let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(SnapshotError::Magic)?;
    let number = |at: usize| {
        let mut eight = [0; 8];
        eight.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(eight)
    };
    if header[..8] != MAGIC {
        return Err(SnapshotError::Magic);
    }
    // Four of the eight bytes are the length's.
    match number(8) as u32 {
        VERSION => {}
        other => return Err(SnapshotError::Version(other)),
    }
    let told = number(12);
    if told != body.len() as u64 {
        return Err(SnapshotError::Length { told, found: body.len() });
    }
    if number(20) != checksum(body) {
        return Err(SnapshotError::Checksum);
    }
    Ok(body)
}

impl Snapshot {
    /// Writes it.
    ///
    /// # Errors
    /// [`SnapshotError::File`] and [`SnapshotError::TooLarge`].
    pub fn write(&self, file: &mut impl Write) -> Result<(), SnapshotError> {
        let body = postcard::to_stdvec(self).map_err(SnapshotError::Encoding)?;
        file.write_all(&seal(&body)?)
            .map_err(|error| SnapshotError::File { action: "write", error })
    }

    /// Reads one that this release has written.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn read(file: &mut impl Read) -> Result<Self, SnapshotError> {
        let mut bytes = Vec::with_capacity(USUAL_BYTES);
        let most = HEADER_BYTES + MAX_STATE_BYTES;
        file.take(most as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| SnapshotError::File { action: "read", error })?;
        if bytes.len() > most {
            return Err(SnapshotError::TooLarge);
        }
        Self::of_body(open(&bytes)?)
    }

    /// Of what lies behind the header.
    pub(crate) fn of_body(body: &[u8]) -> Result<Self, SnapshotError> {
        let snapshot = match postcard::take_from_bytes::<Self>(body) {
            Ok((snapshot, [])) => snapshot,
            Ok(_) => {
                return Err(SnapshotError::Encoding(postcard::Error::DeserializeBadEncoding));
            }
            Err(error) => return Err(SnapshotError::Encoding(error)),
        };
        snapshot.check()?;
        Ok(snapshot)
    }

    fn check(&self) -> Result<(), SnapshotError> {
        if self.vmm != RELEASE {
            return Err(SnapshotError::Release(self.vmm.chars().take(32).collect()));
        }
        let vcpus = u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX);
        let bounds = *VCPUS.start()..=self.max_vcpus;
        if !VCPUS.contains(&self.max_vcpus)
            || !bounds.contains(&vcpus)
            || self.cpuid.len() != self.vcpus.len()
        {
            return Err(SnapshotError::Bounds("a number of vCPUs"));
        }
        if !self.vcpus.iter().all(VcpuState::is_bounded) {
            return Err(SnapshotError::Bounds("a number of registers"));
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(SnapshotError::Bounds("a number of devices"));
        }
        if self.image_bytes.is_some_and(|bytes| !is_image_size(bytes)) {
            return Err(SnapshotError::Bounds("a size of the guest image"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_that_are_no_state_are_told_apart() {
        let sealed = seal(b"state").unwrap();
        assert_eq!(open(&sealed).unwrap(), b"state");
        assert!(matches!(open(&sealed[..HEADER_BYTES - 1]), Err(SnapshotError::Magic)));
        assert!(matches!(
            open(&sealed[..sealed.len() - 1]),
            Err(SnapshotError::Length { told: 5, found: 4 })
        ));
        let mut other = sealed.clone();
        other[8] += 1;
        assert!(matches!(open(&other), Err(SnapshotError::Version(found)) if found == VERSION + 1));
        let nothing = Snapshot::read(&mut &seal(b"").unwrap()[..]);
        assert!(matches!(nothing, Err(SnapshotError::Encoding(_))));
        let large = vec![0; HEADER_BYTES + MAX_STATE_BYTES + 1];
        assert!(matches!(Snapshot::read(&mut &large[..]), Err(SnapshotError::TooLarge)));
        assert!(matches!(seal(&large), Err(SnapshotError::TooLarge)));
    }

    proptest! {
        #[test]
        fn any_changed_or_missing_byte_is_found(
            body in proptest::collection::vec(any::<u8>(), 0..2000),
            at in any::<prop::sample::Index>(),
            change in 1..=255u8,
        ) {
            let sealed = seal(&body).unwrap();
            prop_assert_eq!(open(&sealed).unwrap(), &body[..]);
            let at = at.index(sealed.len());
            prop_assert!(open(&sealed[..at]).is_err());
            let mut spoilt = sealed;
            spoilt[at] ^= change;
            prop_assert!(open(&spoilt).is_err());
        }

        #[test]
        fn upper_bits_that_change_in_two_words_are_found(
            body in proptest::collection::vec(any::<u8>(), 16..2000),
            at in any::<[prop::sample::Index; 2]>(),
        ) {
            let at = at.map(|at| at.index(body.len() / 8) * 8 + 7);
            prop_assume!(at[0] != at[1]);
            let mut spoilt = body.clone();
            at.into_iter().for_each(|at| spoilt[at] ^= 0x80);
            prop_assert_ne!(checksum(&spoilt), checksum(&body));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(
            body in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let _ = Snapshot::read(&mut &seal(&body).unwrap()[..]);
        }
    }
}

//! MSI (PCI local bus specification 3.0, 6.8.1): one message for up to 32 vectors, which differ in
//! the low bits of its data. With 64-bit addresses and masks, whatever the function has by itself.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::config::{ConfigError, ConfigSpace};
use super::line::{Line, MsiError, MsiMessage, MsiRouter};

const CAPABILITY_ID: u8 = 0x05;
/// The most vectors that a function can have.
pub const MAX_VECTORS: u8 = 32;

// In the capability, from its beginning.
const CONTROL: usize = 2;
const ADDRESS: usize = 4;
const DATA: usize = 12;
const MASK: usize = 16;
const BYTES: usize = 24;

const CONTROL_ENABLE: u16 = 1;
/// Bits 6:4: the exponent of how many vectors the guest uses.
const CONTROL_USED: u16 = 0x70;
const CONTROL_64_BITS: u16 = 1 << 7;
const CONTROL_MASKS: u16 = 1 << 8;

/// Why MSI could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MsiSetupError {
    /// No line or event was left.
    #[error(transparent)]
    Line(#[from] MsiError),
    /// The capability does not fit.
    #[error("add the MSI capability: {0}")]
    Config(#[from] ConfigError),
}

/// The vectors of a function.
pub struct MsiVectors {
    vectors: Vec<Line>,
    capability: usize,
    enabled: bool,
    /// How many the guest uses, of those that there are.
    used: usize,
}

impl MsiVectors {
    /// Vectors, a power of two up to [`MAX_VECTORS`].
    ///
    /// # Errors
    /// No lines or descriptors are left.
    pub fn new(count: u8, router: Arc<dyn MsiRouter>) -> Result<Self, MsiSetupError> {
        let vectors = (0..count.clamp(1, MAX_VECTORS))
            .map(|_| Line::new(router.clone()))
            .collect::<Result<Vec<_>, MsiError>>()?;
        Ok(Self { vectors, capability: 0, enabled: false, used: 1 })
    }

    /// Adds the capability.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn add_to(&mut self, config: &mut ConfigSpace) -> Result<(), MsiSetupError> {
        // Bits 3:1: the exponent of how many vectors there are, at most 5.
        let available = (self.vectors.len().ilog2() as u16) << 1;
        let control = CONTROL_64_BITS | CONTROL_MASKS | available;
        let mut body = [0; BYTES - 2];
        body[..2].copy_from_slice(&control.to_le_bytes());
        self.capability = config.add_capability(CAPABILITY_ID, &body)?.into();
        let mut allow = |at: usize, mask: &[u8]| config.allow(self.capability + at, mask);
        allow(CONTROL, &(CONTROL_ENABLE | CONTROL_USED).to_le_bytes());
        allow(ADDRESS, &(!3u64).to_le_bytes());
        allow(DATA, &u16::MAX.to_le_bytes());
        allow(MASK, &u32::MAX.to_le_bytes());
        Ok(())
    }

    /// Whether the guest enabled MSI.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The events that trigger the vectors that the guest uses.
    pub fn events(&self) -> impl Iterator<Item = Arc<EventFd>> + '_ {
        self.vectors.iter().take(self.used).map(|line| line.event.clone())
    }

    /// Takes what the guest wrote.
    pub fn follow(&mut self, config: &ConfigSpace) {
        let u16_at = |at: usize| config.u16_at(self.capability + at);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let control = u16_at(CONTROL);
        self.enabled = control & CONTROL_ENABLE != 0;
        let used = 1u32 << ((control & CONTROL_USED) >> 4).min(5);
        self.used = used as usize;
        let address = u64::from(u32_at(ADDRESS)) | u64::from(u32_at(ADDRESS + 4)) << 32;
        let (data, masks) = (u32::from(u16_at(DATA)), u32_at(MASK));
        for (index, line) in (0u32..).zip(&mut self.vectors) {
            let live = self.enabled && index < used && masks >> index & 1 == 0;
            let message = MsiMessage { address, data: data & !(used - 1) | index };
            line.send(live.then_some(message));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::pci::config::Identity;

    /// A line, and what was attached to it, if anything.
    type Wired = (u32, Option<MsiMessage>);

    #[derive(Default)]
    struct Recorder(Mutex<(u32, Vec<Wired>)>);

    impl MsiRouter for Recorder {
        fn allocate(&self) -> Result<u32, MsiError> {
            let mut state = self.0.lock().unwrap();
            state.0 += 1;
            Ok(23 + state.0)
        }
        fn attach(&self, gsi: u32, _: &Arc<EventFd>, message: MsiMessage) -> Result<(), MsiError> {
            self.0.lock().unwrap().1.push((gsi, Some(message)));
            Ok(())
        }
        fn detach(&self, gsi: u32, _: &EventFd) -> Result<(), MsiError> {
            self.0.lock().unwrap().1.push((gsi, None));
            Ok(())
        }
        fn release(&self, _: u32) {
            self.0.lock().unwrap().0 -= 1;
        }
    }

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: [0; 3],
            subsystem_vendor: 0,
            subsystem: 0,
        })
    }

    #[test]
    fn vectors_follow_address_data_count_and_masks() {
        let recorder = Arc::new(Recorder::default());
        let mut msi = MsiVectors::new(4, recorder.clone()).unwrap();
        let mut config = space();
        msi.add_to(&mut config).unwrap();
        let at = msi.capability as u16;
        assert_eq!(config.u16_at(msi.capability + CONTROL), 0x184);
        config.write(at + ADDRESS as u16, &0xfee0_1000u32.to_le_bytes());
        config.write(at + DATA as u16, &0x41u16.to_le_bytes());
        msi.follow(&config);
        assert!(!msi.is_enabled() && recorder.0.lock().unwrap().1.is_empty());
        // Enabled, with two vectors, of which the second is masked.
        config.write(at + MASK as u16, &2u32.to_le_bytes());
        config.write(at + CONTROL as u16, &0x11u16.to_le_bytes());
        msi.follow(&config);
        let message = |data| MsiMessage { address: 0xfee0_1000, data };
        assert_eq!(recorder.0.lock().unwrap().1, [(24, Some(message(0x40)))]);
        config.write(at + MASK as u16, &1u32.to_le_bytes());
        msi.follow(&config);
        config.write(at + CONTROL as u16, &0u16.to_le_bytes());
        msi.follow(&config);
        let log = recorder.0.lock().unwrap();
        assert_eq!(log.1[1..], [(24, None), (25, Some(message(0x41))), (25, None)]);
    }

    #[test]
    fn more_vectors_than_there_can_be_are_not_made() {
        let recorder = Arc::new(Recorder::default());
        let msi = MsiVectors::new(255, recorder.clone()).unwrap();
        assert_eq!(msi.vectors.len(), usize::from(MAX_VECTORS));
        assert_eq!(recorder.0.lock().unwrap().0, u32::from(MAX_VECTORS));
        drop(msi);
        assert_eq!(recorder.0.lock().unwrap().0, 0, "lines are kept");
    }
}

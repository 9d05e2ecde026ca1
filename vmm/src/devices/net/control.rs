//! The queue by which a driver of several pairs says how many it uses (virtio 1.2, 5.1.6.5).

use crate::devices::buffers::Buffers;
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, QueueError};

/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`, and the number of pairs (virtio 1.2,
/// 5.1.6.5.5): all that a command has.
const CLASS: u8 = 4;
const PAIRS_SET: u8 = 0;
const COMMAND_BYTES: usize = 4;
/// `VIRTIO_NET_OK` and `VIRTIO_NET_ERR` (virtio 1.2, 5.1.6.5).
const OK: u8 = 0;
const ERR: u8 = 1;
/// The most commands in one wake-up. A driver waits for the answer to each.
const COMMANDS_PER_WAKE: usize = 4;

/// How many pairs a command asks for, if it is such a one and there are so many.
fn wanted(command: &[u8], most: usize) -> Option<usize> {
    match *command {
        [CLASS, PAIRS_SET, low, high] => {
            let pairs = usize::from(u16::from_le_bytes([low, high]));
            (1..=most).contains(&pairs).then_some(pairs)
        }
        _ => None,
    }
}

/// The control queue of a driver.
pub(crate) struct Control {
    pub(crate) queue: ActiveQueue,
    ram: GuestRam,
    /// How many pairs the driver may ask for.
    most: usize,
}

impl Control {
    /// The queue of a driver that may ask for up to `most` pairs; 0 for one that may not ask.
    pub(crate) fn new(queue: ActiveQueue, ram: &GuestRam, most: usize) -> Self {
        Self { queue, ram: ram.clone(), most }
    }

    /// Answers what the driver has asked. `set` has so many pairs used, and says whether they are.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub(crate) fn serve(&mut self, mut set: impl FnMut(usize) -> bool) -> Result<(), QueueError> {
        self.queue.disable_kicks()?;
        for _ in 0..COMMANDS_PER_WAKE {
            match self.queue.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let (command, answer) = Buffers::of_chain(chain)?;
                    if answer.is_empty() {
                        return Err(QueueError::Chain("it has no room for an answer".into()));
                    }
                    let done = match self.read(&command)? {
                        Some(pairs) => set(pairs),
                        None => false,
                    };
                    answer.copy_from(&self.ram, 0, &[if done { OK } else { ERR }])?;
                    self.queue.complete(head, 1)?;
                }
                None if self.queue.enable_kicks()? => {}
                None => return self.queue.notify(),
            }
        }
        let _ = self.queue.kick_event().write(1); // Full means pending.
        self.queue.notify()
    }

    fn read(&self, command: &Buffers) -> Result<Option<usize>, QueueError> {
        let mut bytes = [0; COMMAND_BYTES];
        if command.len() != bytes.len() {
            return Ok(None);
        }
        command.copy_to(&self.ram, 0, &mut bytes)?;
        Ok(wanted(&bytes, self.most))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_a_number_of_pairs_that_there_are_is_understood(
            command in prop::collection::vec(any::<u8>(), 0..8),
            most in 0_usize..10,
        ) {
            let pairs = wanted(&command, most);
            let right = command.len() == 4 && command[..2] == [4, 0];
            let number = |c: &[u8]| usize::from(c[2]) | usize::from(c[3]) << 8;
            let right = right && (1..=most).contains(&number(&command));
            prop_assert_eq!(pairs, right.then(|| number(&command)));
        }

        #[test]
        fn number_of_pairs_has_its_bounds(pairs in any::<u16>(), most in 0_usize..10) {
            let [low, high] = pairs.to_le_bytes();
            let expected = (1..=most).contains(&usize::from(pairs)).then_some(pairs.into());
            prop_assert_eq!(wanted(&[4, 0, low, high], most), expected);
        }
    }
}

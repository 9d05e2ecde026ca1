//! A ring of the VMM's own between the driver's and a backend that does not keep what is in flight.
//!
//! Such a backend may answer in any order, and when it ends, the driver's rings do not tell which
//! of its requests it has answered. So it gets rings of ours, beside the driver's own descriptors:
//! the VMM carries heads over, one way and the other, and knows what is in flight. Descriptors and
//! data never pass here. When the backend has ended, all that is in flight is offered to the next,
//! in the order in which the driver offered it.
//!
//! The rings' memory is written by the backend, and by whatever a guest makes it write: what is
//! read there is checked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::messages::RingAddresses;
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, QueueError};

/// What a ring of ours takes of the memory, and where its used ring begins in it: behind an
/// available ring of the largest size.
pub(super) const RING_BYTES: u64 = 16 << 10;
const USED_AT: u64 = 4 << 10;
// In both rings, behind their flags: how far they are filled, then the entries.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// Why a ring is not served any further.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    /// The guest's driver broke it.
    #[error(transparent)]
    Driver(#[from] QueueError),
    /// The backend did.
    #[error("the backend answers what it was not asked: {0}")]
    Backend(String),
    /// The memory of the rings is not there, which is a mistake of the VMM's.
    #[error("the VMM's own rings: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// The driver's ring and ours.
pub(super) struct Relay {
    pub(super) driver: ActiveQueue,
    memory: GuestRam,
    /// Where ours is, in addresses of `memory`.
    at: u64,
    /// What has been offered to the backend, and what of its answers was read.
    offered: u16,
    answered: u16,
    /// In the order in which the driver offered it.
    in_flight: VecDeque<u16>,
    /// Tells the backend of what is offered.
    pub(super) kick: Arc<EventFd>,
    /// Tells of the backend's answers.
    pub(super) call: Arc<EventFd>,
    /// The driver broke the ring.
    broken: bool,
}

impl Relay {
    /// Ours is at `at` of `memory`, [`RING_BYTES`] of it.
    pub(super) fn new(
        driver: ActiveQueue,
        memory: GuestRam,
        at: u64,
        (kick, call): (Arc<EventFd>, Arc<EventFd>),
    ) -> Self {
        let in_flight = VecDeque::new();
        Self { driver, memory, at, offered: 0, answered: 0, in_flight, kick, call, broken: false }
    }

    /// What the backend is told.
    pub(super) fn addresses(&self) -> RingAddresses {
        let [descriptors, _, _] = self.driver.addresses();
        RingAddresses { descriptors, available: self.at, used: self.at + USED_AT }
    }

    /// Empties our ring, for a backend that begins with it, and offers it what is in flight.
    pub(super) fn begin(&mut self) -> Result<(), RelayError> {
        let zeros = [0; RING_BYTES as usize];
        self.memory.write_slice(&zeros, GuestAddress(self.at))?;
        (self.offered, self.answered) = (0, 0);
        let _ = self.call.read(); // Non-blocking: empty is fine.
        for head in std::mem::take(&mut self.in_flight) {
            self.offer(head)?;
        }
        self.publish()
    }

    /// Carries over what the driver has made available.
    pub(super) fn take_requests(&mut self) -> Result<(), RelayError> {
        self.driver.acknowledge_kick();
        if self.broken {
            return Ok(());
        }
        let taken = self.take_all();
        // What was right is carried over in any case.
        self.publish()?;
        self.broken |= matches!(taken, Err(RelayError::Driver(_)));
        taken
    }

    fn take_all(&mut self) -> Result<(), RelayError> {
        self.driver.disable_kicks()?;
        loop {
            match self.driver.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    // So no more than the ring holds are ever in flight.
                    if head >= self.driver.size() || self.in_flight.contains(&head) {
                        let text = format!("the head {head} is in flight already, or is none");
                        return Err(QueueError::Chain(text).into());
                    }
                    self.offer(head)?;
                }
                None if self.driver.enable_kicks()? => {}
                None => return Ok(()),
            }
        }
    }

    /// Carries the backend's answers over.
    pub(super) fn give_answers(&mut self) -> Result<(), RelayError> {
        let _ = self.call.read(); // Non-blocking: empty is fine.
        if self.broken {
            return Ok(());
        }
        let index = GuestAddress(self.at + USED_AT + INDEX);
        let index: u16 = self.memory.load(index, Ordering::Acquire)?;
        let count = u16::from_le(index).wrapping_sub(self.answered);
        if usize::from(count) > self.in_flight.len() {
            let flight = self.in_flight.len();
            let text = format!("{count} answers to the {flight} requests in flight");
            return Err(RelayError::Backend(text));
        }
        for _ in 0..count {
            let slot = u64::from(self.answered % self.driver.size());
            let entry = GuestAddress(self.at + USED_AT + ENTRIES + USED_ENTRY * slot);
            let [head, bytes]: [u32; 2] = self.memory.read_obj(entry)?;
            let (head, bytes) = (u32::from_le(head), u32::from_le(bytes));
            let Some(place) = self.in_flight.iter().position(|known| u32::from(*known) == head)
            else {
                return Err(RelayError::Backend(format!("{head} is not in flight")));
            };
            self.in_flight.remove(place);
            self.answered = self.answered.wrapping_add(1);
            // It is one of the ring's heads, which are 16 bits.
            self.driver.complete(head as u16, bytes)?;
        }
        if count > 0 {
            self.driver.notify()?;
        }
        Ok(())
    }

    fn offer(&mut self, head: u16) -> Result<(), RelayError> {
        let slot = u64::from(self.offered % self.driver.size());
        let entry = GuestAddress(self.at + ENTRIES + AVAILABLE_ENTRY * slot);
        self.memory.write_obj(head.to_le(), entry)?;
        self.offered = self.offered.wrapping_add(1);
        self.in_flight.push_back(head);
        Ok(())
    }

    /// Lets the backend see what was offered.
    fn publish(&self) -> Result<(), RelayError> {
        let index = GuestAddress(self.at + INDEX);
        self.memory.store(self.offered.to_le(), index, Ordering::Release)?;
        let _ = self.kick.write(1); // Full means pending.
        Ok(())
    }
}

//! A virtqueue in the hands of its device: nobody else can touch it any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use vial_sync::Position;
use vial_sync::Ring;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::memory::GuestRam;

/// Why a queue cannot be served any further.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// What the driver wrote makes no sense.
    #[error("the driver broke the queue's rings: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A descriptor chain does not fit what the device expects.
    #[error("a descriptor chain is wrong: {0}")]
    Chain(String),
}

/// A descriptor chain out of an [`ActiveQueue`].
pub type Chain = DescriptorChain<Arc<GuestRam>>;

/// A virtqueue after activation (virtio 1.2, 2.7).
#[derive(Debug)]
pub struct ActiveQueue {
    queue: Queue,
    ram: Arc<GuestRam>,
    kick: Arc<EventFd>,
    interrupt: Interrupt,
    /// The next [`ActiveQueue::notify`] interrupts whatever the driver asked for.
    must_notify: bool,
    position: Arc<Position>,
}

impl Drop for ActiveQueue {
    fn drop(&mut self) {
        self.position.set(self.queue.next_avail(), self.queue.next_used());
    }
}

impl ActiveQueue {
    /// A queue whose registers the driver has written, `ready` and valid.
    pub fn new(queue: Queue, ram: GuestRam, kick: Arc<EventFd>, interrupt: Interrupt) -> Self {
        let position = Arc::default();
        Self { queue, ram: Arc::new(ram), kick, interrupt, must_notify: false, position }
    }

    /// Goes on from `position`, and leaves there how far it came when it is dropped.
    pub fn starting_at(mut self, position: Arc<Position>) -> Self {
        let (available, used) = position.get();
        self.queue.set_next_avail(available);
        self.queue.set_next_used(used);
        self.position = position;
        self
    }

    /// What becomes readable when the driver has something: the worker waits for it.
    pub fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    /// The guest's memory, as the queue sees it.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Empties the kick event.
    pub fn acknowledge_kick(&self) {
        // It is non-blocking: nothing to read is fine too.
        let _ = self.kick.read();
    }

    /// The next chain that the driver made available, if any.
    ///
    /// # Errors
    /// The driver's index claims more chains than the queue has.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let available = self.queue.avail_idx(&*self.ram, Ordering::Acquire)?;
        let pending = available.0.wrapping_sub(self.queue.next_avail());
        if pending > self.queue.size() {
            return Err(QueueError::Ring(virtio_queue::Error::InvalidAvailRingIndex));
        }
        if pending == 0 {
            return Ok(None);
        }
        self.queue
            .pop_descriptor_chain(self.ram.clone())
            .map(Some)
            .ok_or(QueueError::Ring(virtio_queue::Error::InvalidAvailRingIndex))
    }

    /// Puts the last chain back that [`ActiveQueue::pop`] gave, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back to the driver, `written` bytes of it filled.
    ///
    /// # Errors
    /// The used ring is not in guest memory.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(&*self.ram, head, written).map_err(QueueError::from)
    }

    /// Gives chains back that belong together, as head and bytes written: the driver sees all of
    /// them or none, as it has to with the buffers of one packet (virtio 1.2, 5.1.6.4).
    ///
    /// # Errors
    /// The used ring is not in guest memory, or a head is beyond the queue.
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(last, last_written), others)) = chains.split_last() else { return Ok(()) };
        let first = self.queue.next_used();
        for (position, &(head, written)) in others.iter().enumerate() {
            if head >= self.size() {
                return Err(QueueError::Ring(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let slot = first.wrapping_add(position as u16) % self.size();
            // An element is the head and the length, 32 bits each, after 4 bytes of flags and
            // index (virtio 1.2, 2.7.8).
            let address = self
                .queue
                .used_ring()
                .checked_add(4 + 8 * u64::from(slot))
                .ok_or(QueueError::Ring(virtio_queue::Error::AddressOverflow))?;
            let element = u64::from(head) | u64::from(written) << 32;
            self.ram
                .write_slice(&element.to_le_bytes(), GuestAddress(address))
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        }
        if !others.is_empty() {
            self.queue.set_next_used(first.wrapping_add(others.len() as u16));
            // The queue counts one chain only when it decides on an interrupt.
            self.must_notify = true;
        }
        // This publishes the index, and with it the elements before.
        self.complete(last, last_written)
    }

    /// Interrupts the driver when it asked to be told of what was completed.
    ///
    /// # Errors
    /// The rings are not in guest memory.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let asked = self.queue.needs_notification(&*self.ram)?;
        if asked || std::mem::take(&mut self.must_notify) {
            self.interrupt.trigger();
        }
        Ok(())
    }

    /// Tells the driver not to kick while the worker looks by itself.
    ///
    /// # Errors
    /// The rings are not in guest memory.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&*self.ram).map_err(QueueError::from)
    }

    /// Asks for kicks again. True when more has become available meanwhile, for which no kick
    /// will come.
    ///
    /// # Errors
    /// The rings are not in guest memory.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&*self.ram).map_err(QueueError::from)
    }

    /// Where its descriptors, its available and its used ring are in the guest's memory.
    pub fn addresses(&self) -> [u64; 3] {
        [self.queue.desc_table(), self.queue.avail_ring(), self.queue.used_ring()]
    }

    /// The addresses in this process of the same, for the host's kernel to serve them. Nothing
    /// where one of them is not in one piece of the guest's memory.
    pub fn host_addresses(&self) -> Option<[u64; 3]> {
        let size = usize::from(self.size());
        // Descriptors; flags, index, entries and event of either ring (virtio 1.2, 2.7).
        let bytes = [16 * size, 6 + 2 * size, 6 + 8 * size];
        let mut found = [0; 3];
        for ((found, at), bytes) in found.iter_mut().zip(self.addresses()).zip(bytes) {
            let piece = self.ram.get_slice(GuestAddress(at), bytes).ok()?;
            *found = piece.ptr_guard_mut().as_ptr() as u64;
        }
        Some(found)
    }

    /// The next entry of the available ring, counted from the beginning.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// How many chains were given back, by the ring's own count: whoever serves it has written that.
    ///
    /// # Errors
    /// The used ring is not in guest memory.
    pub fn used_index(&self) -> Result<u16, QueueError> {
        let index = self.queue.used_idx(&*self.ram, Ordering::Acquire)?;
        Ok(index.0)
    }

    /// What interrupts the driver.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// How many chains the queue can hold.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
}

impl Ring for ActiveQueue {
    type Chain = Chain;
    type Error = QueueError;

    fn acknowledge_kick(&self) {
        self.acknowledge_kick();
    }

    fn kick(&self) {
        let _ = self.kick.write(1); // Full means pending.
    }

    fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.disable_kicks()
    }

    fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.enable_kicks()
    }

    fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        self.pop()
    }

    fn notify(&mut self) -> Result<(), QueueError> {
        self.notify()
    }
}

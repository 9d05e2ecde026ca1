//! The memory device (virtio 1.2, 5.15): how a guest that goes on from a saved machine comes to
//! more memory than that one had.
//!
//! The region is there from the guest's boot on, and empty. In a restored machine its first part is
//! memory, of which the device asks the guest to take all; later there may be more, or less is asked
//! for ([`Demand`]). What the guest gives back, the host has again at once.

mod blocks;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::blocks::{Answer, Blocks, Plugged};
pub use self::blocks::{BLOCK_BYTES, Room};
use super::buffers::Buffers;
use super::one_queue::{QueueWorker, Serve};
use crate::memory::{Discards, GuestRam};
use crate::virtio::queue::Chain;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, Interrupt,
    QueueError, VirtioDevice, Worker,
};

const DEVICE: &str = "mem";

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (virtio 1.2, 5.15.3): there is nothing where the guest has
/// nothing, not even to be read.
const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// A request (virtio 1.2, 5.15.6): type, padding, address, number of blocks, padding.
const REQUEST_BYTES: usize = 24;
/// A response: type, padding, state.
const RESPONSE_BYTES: usize = 10;
/// The most requests in one wake-up, so that the thread's other devices have their turn.
const MAX_WAKE_REQUESTS: usize = 64;

const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

/// The configuration space (virtio 1.2, 5.15.4), and where in it the sizes lie that change: what is
/// usable, what is plugged, what is requested.
const CONFIG_BYTES: usize = 56;
const SIZES: usize = 32;

/// The device.
#[derive(Debug)]
pub struct Mem {
    /// Without the sizes that change.
    config: [u8; CONFIG_BYTES],
    demand: Demand,
    asks: bool,
    discards: Discards,
}

/// How much memory the guest is asked to have, from the owner's side.
#[derive(Debug, Clone)]
pub struct Demand {
    blocks: Arc<Mutex<Blocks>>,
    /// Tells the driver that it changed, when there is a driver.
    changed: Arc<Mutex<Interrupt>>,
}

impl Demand {
    /// How much of the region, from its start, is memory.
    pub fn present_bytes(&self) -> u64 {
        lock(&self.blocks).present_bytes()
    }

    /// How much the guest has.
    pub fn plugged_bytes(&self) -> u64 {
        lock(&self.blocks).plugged_bytes()
    }

    /// How much it is asked to have.
    pub fn requested_bytes(&self) -> u64 {
        lock(&self.blocks).requested_bytes()
    }

    /// There is memory now up to so much of the region from its start, a multiple of
    /// [`BLOCK_BYTES`].
    pub fn extend(&self, present: u64) {
        lock(&self.blocks).extend(present);
    }

    /// Asks the guest to have so much of what is memory, a multiple of [`BLOCK_BYTES`].
    pub fn request(&self, bytes: u64) {
        lock(&self.blocks).request(bytes);
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).trigger();
    }
}

fn lock(blocks: &Mutex<Blocks>) -> MutexGuard<'_, Blocks> {
    blocks.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mem {
    /// A device for that room. What the guest gives back goes to the host as `discards` lets it.
    pub fn new(room: Room, discards: Discards) -> Self {
        let mut config = [0; CONFIG_BYTES];
        // Block size, node, address, region.
        let fields = [BLOCK_BYTES, 0, room.start, room.bytes].map(u64::to_le_bytes);
        config[..SIZES].copy_from_slice(fields.as_flattened());
        let blocks = Arc::new(Mutex::new(Blocks::new(room)));
        let demand = Demand { blocks, changed: Arc::new(Mutex::new(Interrupt::none())) };
        Self { config, demand, asks: room.present > 0, discards }
    }

    /// By which the owner changes what the guest is asked for.
    pub fn demand(&self) -> Demand {
        self.demand.clone()
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX | FEATURE_UNPLUGGED_INACCESSIBLE
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = self.config;
        let blocks = lock(&self.demand.blocks);
        let sizes = [blocks.usable_bytes(), blocks.plugged_bytes(), blocks.requested_bytes()];
        drop(blocks);
        config[SIZES..].copy_from_slice(sizes.map(u64::to_le_bytes).as_flattened());
        crate::virtio::read_at(&config, offset, data);
    }

    fn config_is_as_saved(&self) -> bool {
        // A machine is saved before it is asked to grow.
        !self.asks
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let queue = activation.take_queue(DEVICE, 0)?;
        if self.asks {
            // A driver that was there before the memory looks again.
            activation.config_interrupt.trigger();
        }
        let changed = activation.config_interrupt.clone();
        *self.demand.changed.lock().unwrap_or_else(PoisonError::into_inner) = changed;
        let (blocks, discards) = (self.demand.blocks.clone(), self.discards.clone());
        let keeper = Keeper { ram: activation.ram, blocks, discards };
        Ok(Box::new(QueueWorker::new(queue, keeper, activation.fault)))
    }
}

struct Keeper {
    ram: GuestRam,
    blocks: Arc<Mutex<Blocks>>,
    discards: Discards,
}

impl Serve for Keeper {
    const DEVICE: &'static str = DEVICE;

    const MOST: usize = MAX_WAKE_REQUESTS;

    fn serve(&mut self, queue: &mut ActiveQueue, chain: Chain) -> Result<usize, QueueError> {
        let head = chain.head_index();
        let (request, response) = Buffers::of_chain(chain)?;
        let mut bytes = [0; REQUEST_BYTES];
        request.copy_to(&self.ram, 0, &mut bytes)?;
        response.copy_from(&self.ram, 0, &self.answer(&bytes))?;
        queue.complete(head, RESPONSE_BYTES as u32)?;
        Ok(1)
    }
}

impl Keeper {
    fn answer(&self, request: &[u8; REQUEST_BYTES]) -> [u8; RESPONSE_BYTES] {
        let number = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let mut eight = [0; 8];
        eight.copy_from_slice(&request[8..16]);
        let (address, count) = (u64::from_le_bytes(eight), number(16));
        let mut blocks = lock(&self.blocks);
        let discard = |range| self.discard(range);
        let mut state = Plugged::All;
        let answer = match number(0) {
            REQUEST_PLUG => blocks.plug(address, count),
            REQUEST_UNPLUG => blocks.unplug(address, count, discard),
            REQUEST_UNPLUG_ALL => blocks.unplug_all(discard),
            REQUEST_STATE => match blocks.state(address, count) {
                Some(found) => {
                    state = found;
                    Answer::Ack
                }
                None => Answer::Error,
            },
            _ => Answer::Error,
        };
        let answer: u16 = match answer {
            Answer::Ack => 0,
            Answer::Nack => 1,
            Answer::Busy => 2,
            Answer::Error => 3,
        };
        let state: u16 = match state {
            Plugged::All => 0,
            Plugged::None => 1,
            Plugged::Mixed => 2,
        };
        let mut response = [0; RESPONSE_BYTES];
        response[..2].copy_from_slice(&answer.to_le_bytes());
        response[8..].copy_from_slice(&state.to_le_bytes());
        response
    }

    /// Gives memory back to the host.
    fn discard(&self, range: Range<u64>) -> bool {
        match self.discards.discard(&self.ram, range) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the host does not take memory back from the guest");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;

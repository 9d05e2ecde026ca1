//! The entropy device (virtio 1.2, 5.4): random numbers of the host's kernel, straight into guest
//! memory.

use super::buffers::{Buffers, Span};
use super::one_queue::{QueueWorker, Serve};
use crate::memory::GuestRam;
use crate::virtio::queue::Chain;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, QueueError,
    VirtioDevice, Worker,
};

const DEVICE: &str = "rng";

/// The most that one chain gets. A driver asks again for more (virtio 1.2, 5.4.6).
const MAX_CHAIN_BYTES: usize = 64 << 10;
/// The most in one wake-up, so that a guest that asks without end leaves the thread to the other
/// devices in between. Each chain gets something.
const MAX_WAKE_BYTES: usize = 64 << 10;

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// A device.
    pub fn new() -> Self {
        Self
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn config_is_as_saved(&self) -> bool {
        true
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let queue = activation.take_queue(DEVICE, 0)?;
        let source = Source { ram: activation.ram };
        Ok(Box::new(QueueWorker::new(queue, source, activation.fault)))
    }
}

struct Source {
    ram: GuestRam,
}

impl Serve for Source {
    const DEVICE: &'static str = DEVICE;

    const MOST: usize = MAX_WAKE_BYTES;
    const LEAST: usize = 1024;

    fn serve(&mut self, queue: &mut ActiveQueue, chain: Chain) -> Result<usize, QueueError> {
        let head = chain.head_index();
        let buffers = Buffers::writable(chain)?;
        let bytes = buffers.len().min(MAX_CHAIN_BYTES);
        let filled = buffers
            .fill_random(&self.ram, Span { offset: 0, bytes })
            .map_err(|error| QueueError::Chain(format!("getrandom: {error}")))?;
        queue.complete(head, filled as u32)?;
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{BUFFERS, Bench, RAM_BYTES, WRITE, ram};

    #[test]
    fn guest_gets_numbers_into_all_its_buffers() {
        let mut bench = Bench::activate(&mut Rng::new(), &ram());
        let chain = [(BUFFERS, 16, WRITE), (BUFFERS + 100, 32, WRITE)];
        assert_eq!(bench.request(0, &chain), Some(48));
        assert!(bench.queues[0].interrupted());
        assert_ne!(bench.read(BUFFERS, 16), [0; 16]);
        assert_ne!(bench.read(BUFFERS + 100, 32), [0; 32]);
        assert_eq!(bench.read(BUFFERS + 16, 84), [0; 84]);
    }

    #[test]
    fn chain_beyond_the_limit_gets_part() {
        let mut bench = Bench::activate(&mut Rng::new(), &ram());
        let bytes = MAX_CHAIN_BYTES as u32;
        assert_eq!(bench.request(0, &[(BUFFERS, bytes + 1, WRITE)]), Some(bytes));
        assert_eq!(bench.request(0, &[(BUFFERS, 0, WRITE)]), Some(0));
    }

    #[test]
    fn full_queue_is_served_over_several_turns() {
        let mut bench = Bench::activate(&mut Rng::new(), &ram());
        for _ in 0..64 {
            bench.queues[0].offer(&[(BUFFERS, 1 << 20, WRITE)]);
        }
        bench.kick(0);
        for _ in 0..64 {
            assert!(bench.queues[0].take_used().is_some());
        }
        assert!(!bench.fault.is_reported());
    }

    #[test]
    fn chain_that_is_wrong_breaks_the_device() {
        for chain in [[(BUFFERS, 16, 0)], [(RAM_BYTES as u64, 16, WRITE)]] {
            let mut bench = Bench::activate(&mut Rng::new(), &ram());
            assert_eq!(bench.request(0, &chain), None);
            assert!(bench.fault.is_reported());
            bench.kick(0);
        }
    }
}

//! The entropy device (virtio 1.2, 5.4): random numbers of the host's kernel, straight into guest
//! memory.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::buffers::{Buffers, Span};
use crate::memory::GuestRam;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, Fault,
    QueueError, VirtioDevice, Worker,
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

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        Ok(Box::new(RngWorker {
            queue: activation.take_queue(DEVICE, 0)?,
            ram: activation.ram,
            fault: activation.fault,
            broken: false,
        }))
    }
}

struct RngWorker {
    queue: ActiveQueue,
    ram: GuestRam,
    fault: Fault,
    broken: bool,
}

impl RngWorker {
    fn serve(&mut self) -> Result<(), QueueError> {
        self.queue.disable_kicks()?;
        let mut given = 0;
        while given < MAX_WAKE_BYTES {
            match self.queue.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let buffers = Buffers::writable(chain)?;
                    let bytes = buffers.len().min(MAX_CHAIN_BYTES);
                    let filled = buffers
                        .fill_random(&self.ram, Span { offset: 0, bytes })
                        .map_err(|error| QueueError::Chain(format!("getrandom: {error}")))?;
                    self.queue.complete(head, filled as u32)?;
                    given += filled.max(1024);
                }
                None if self.queue.enable_kicks()? => given += 1024,
                None => return self.queue.notify(),
            }
        }
        // Come back for the rest when the other devices have had their turn.
        let _ = self.queue.kick_event().write(1);
        self.queue.notify()
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.queue.kick_event(), EventSet::IN)) {
            tracing::error!(%error, "the rng device cannot listen to its queue");
            self.fault.report(DEVICE, &error);
            self.broken = true;
        }
        // The driver may have kicked before the worker listened.
        let _ = self.queue.kick_event().write(1);
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.queue.acknowledge_kick();
        if self.broken {
            return;
        }
        if let Err(error) = self.serve() {
            self.fault.report(DEVICE, &error);
            self.broken = true;
        }
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

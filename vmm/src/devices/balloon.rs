//! The balloon device (virtio 1.3, 5.5), of which only free page reporting (5.5.6.7) is offered: the
//! driver tells of pages that the guest has free, and the host has them back.
//!
//! It asks for no memory, so no driver has a reason to use the queues of the balloon itself. What one
//! puts there is given back unread.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::buffers::{Buffers, Span};
use crate::memory::{Discards, GuestRam};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, Fault,
    QueueError, VirtioDevice, Worker,
};

const DEVICE: &str = "balloon";

/// `VIRTIO_BALLOON_F_REPORTING` (virtio 1.3, 5.5.3).
///
/// `VIRTIO_BALLOON_F_PAGE_POISON` is not offered, so a driver that reports pages counts on nothing
/// in them: whether they are zeros afterwards or, in memory of a saved machine, what was saved there,
/// is the same to it. One whose kernel does count on what it left there does not negotiate reporting.
const FEATURE_REPORTING: u64 = 1 << 5;

/// `num_pages` and `actual` (virtio 1.3, 5.5.4): no page is asked for, and none is there. What a
/// driver writes to it, nobody reads.
const CONFIG: [u8; 8] = [0; 8];

/// The queues for pages that go into the balloon and come out of it, and that for reports. Queues
/// that there could be in between do not exist without their features, and have no numbers then:
/// Linux counts that way, and so do other devices.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
/// Linux reports 32 ranges at once, a descriptor each, and takes no smaller queue for that
/// (`PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZES: [u16; 3] = [32; 3];

/// The most that is given back in one wake-up, but for what a last range brings, which is no more:
/// the thread's other devices have their turn then. Linux reports no range over 4 MiB.
const MAX_WAKE_BYTES: usize = 32 << 20;
/// The most chains in one wake-up.
const MAX_WAKE_CHAINS: usize = 64;

/// The device.
#[derive(Debug)]
pub struct Balloon {
    discards: Discards,
}

impl Balloon {
    /// A device that gives back what `discards` lets it.
    pub fn new(discards: Discards) -> Self {
        Self { discards }
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX | FEATURE_REPORTING
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn config_is_as_saved(&self) -> bool {
        true
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let unread = [INFLATE, DEFLATE].map(|index| activation.take_queue(DEVICE, index));
        let [inflate, deflate] = unread;
        let reports = match activation.features & FEATURE_REPORTING {
            0 => None,
            _ => Some(activation.take_queue(DEVICE, REPORTING)?),
        };
        Ok(Box::new(BalloonWorker {
            unread: [inflate?, deflate?],
            reports: reports.map(|queue| Reports {
                queue,
                ram: activation.ram,
                discards: self.discards.clone(),
                done: 0,
                warned: false,
            }),
            fault: activation.fault,
            broken: false,
        }))
    }
}

/// Serves the queues until the driver breaks one.
struct BalloonWorker {
    /// Those of the balloon itself.
    unread: [ActiveQueue; 2],
    reports: Option<Reports>,
    fault: Fault,
    broken: bool,
}

impl BalloonWorker {
    fn queue(&self, index: usize) -> Option<&ActiveQueue> {
        match index {
            REPORTING => self.reports.as_ref().map(|reports| &reports.queue),
            index => self.unread.get(index),
        }
    }

    fn serve(&mut self, index: usize) -> Result<bool, QueueError> {
        match (index, &mut self.reports) {
            (REPORTING, Some(reports)) => reports.serve(),
            (index, _) => self.unread.get_mut(index).map_or(Ok(false), give_back_unread),
        }
    }

    fn fail(&mut self, what: &dyn std::fmt::Display) {
        self.fault.report(DEVICE, what);
        self.broken = true;
    }
}

impl MutEventSubscriber for BalloonWorker {
    fn init(&mut self, ops: &mut EventOps) {
        for index in [INFLATE, DEFLATE, REPORTING] {
            let Some(queue) = self.queue(index) else { continue };
            // A handful: the cast loses nothing.
            let events = Events::with_data(queue.kick_event(), index as u32, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(device = DEVICE, %error, "a device cannot listen to its queue");
                return self.fail(&error);
            }
            // The driver may have kicked before the worker listened.
            let _ = queue.kick_event().write(1);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let index = events.data() as usize;
        let Some(queue) = self.queue(index) else { return };
        queue.acknowledge_kick();
        if self.broken {
            return;
        }
        match (self.serve(index), self.queue(index)) {
            (Ok(true), Some(queue)) => drop(queue.kick_event().write(1)),
            (Ok(_), _) => {}
            (Err(error), _) => self.fail(&error),
        }
    }
}

/// Returns chains as they are. Returns whether there may be more.
fn give_back_unread(queue: &mut ActiveQueue) -> Result<bool, QueueError> {
    queue.disable_kicks()?;
    for _ in 0..MAX_WAKE_CHAINS {
        match queue.pop()? {
            Some(chain) => queue.complete(chain.head_index(), 0)?,
            None if queue.enable_kicks()? => {}
            None => {
                queue.notify()?;
                return Ok(false);
            }
        }
    }
    queue.notify()?;
    Ok(true)
}

/// Reports of free pages.
struct Reports {
    queue: ActiveQueue,
    ram: GuestRam,
    discards: Discards,
    /// How much of the next chain was given back in the last turn. The chain stays in the queue until
    /// all of it is: a worker that goes with its queue in between leaves it to the next one.
    done: usize,
    warned: bool,
}

impl Reports {
    fn serve(&mut self) -> Result<bool, QueueError> {
        self.queue.disable_kicks()?;
        let mut given = 0;
        for _ in 0..MAX_WAKE_CHAINS {
            match self.queue.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let pages = Buffers::writable(chain)?;
                    given += self.give_back(&pages, MAX_WAKE_BYTES - given);
                    if self.done < pages.len() {
                        self.queue.undo_pop();
                        break;
                    }
                    self.done = 0;
                    self.queue.complete(head, 0)?;
                    if given >= MAX_WAKE_BYTES {
                        break;
                    }
                }
                None if self.queue.enable_kicks()? => {}
                None => {
                    self.queue.notify()?;
                    return Ok(false);
                }
            }
        }
        self.queue.notify()?;
        Ok(true)
    }

    /// Gives ranges back that were not yet, whole ones unless they are larger than a wake-up's, until
    /// there are `most` bytes of them. Returns how many there are.
    fn give_back(&mut self, pages: &Buffers, most: usize) -> usize {
        let mut given = 0;
        let rest = Span { offset: self.done, bytes: pages.len().saturating_sub(self.done) };
        for (start, bytes) in pages.pieces(rest) {
            if given >= most {
                break;
            }
            let bytes = bytes.min(MAX_WAKE_BYTES);
            let discarded = self.discards.discard(&self.ram, start.0..start.0 + bytes as u64);
            if let Err(error) = discarded
                && !std::mem::replace(&mut self.warned, true)
            {
                tracing::warn!(%error, "the host does not take back what the guest has free");
            }
            given += bytes;
            // The next range does not follow on a part of this one.
            if bytes == MAX_WAKE_BYTES {
                break;
            }
        }
        self.done += given;
        given
    }
}

#[cfg(test)]
mod tests;

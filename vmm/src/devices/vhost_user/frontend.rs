//! A device's connection to its backend, and its rings while a driver has them: what has to be
//! there for the backend to serve, in whatever order driver and backend come and go.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vm_memory::{GuestMemory, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{BackendError, Connection, RingSetup};
use super::kind::{Kind, RING_SIZE, Shape};
use super::messages::{InflightArea, MemoryPart, PROTOCOL_INFLIGHT, RingAddresses};
use super::relay::{Relay, RelayError};
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, FEATURE_EVENT_IDX, Fault};

const DEVICE: &str = "vhost-user";

/// Called on the backends' thread when a connection has broken.
pub type BackendGone = Arc<dyn Fn(u8) + Send + Sync>;

/// A ring that the driver has given to the device.
pub(super) enum Ring {
    /// The backend has the driver's own.
    Direct(u32, ActiveQueue),
    /// It has one of ours.
    Relayed(u32, Box<Relay>),
}

/// What the driver has given to the device.
pub(super) struct Running {
    pub(super) features: u64,
    pub(super) rings: Vec<Ring>,
    pub(super) fault: Fault,
    /// How many rings the driver uses of those that it has given, the first ones.
    pub(super) used: u32,
    /// What the backend keeps of requests in flight, for it or the next.
    pub(super) inflight: Option<(InflightArea, OwnedFd)>,
}

/// See the module.
pub(super) struct Frontend {
    /// The device's number among those of backends.
    pub(super) number: u8,
    pub(super) kind: Kind,
    pub(super) queues: u8,
    pub(super) patience: Duration,
    pub(super) ram: GuestRam,
    /// Of rings of ours; nothing without such.
    pub(super) own_rings: Option<GuestRam>,
    /// As it was offered to the driver.
    pub(super) shape: Shape,
    pub(super) connection: Option<Connection>,
    pub(super) running: Option<Running>,
    pub(super) gone: BackendGone,
}

/// A frontend that the threads of its device share: that of the vCPU that resets it, and that of
/// the backends.
pub(super) fn lock(frontend: &Mutex<Frontend>) -> MutexGuard<'_, Frontend> {
    frontend.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Frontend {
    /// Goes on with another backend, which has to serve the same as the one before.
    pub(super) fn connect(&mut self, socket: OwnedFd) -> Result<(), BackendError> {
        let mut connection = Connection::new(socket, self.patience);
        let found = self.kind.negotiate(&mut connection, self.queues)?;
        // The VMM relies on what it chose when the device was made.
        let same = found.config == self.shape.config
            && found.rings == self.shape.rings
            && self.shape.features & !found.features == 0
            && self.shape.protocol & PROTOCOL_INFLIGHT == found.protocol & PROTOCOL_INFLIGHT;
        if !same {
            return Err(BackendError::Unfit(
                "the backend serves another device than before: its size, queues or features \
                 differ; start it as it was"
                    .into(),
            ));
        }
        self.connection = Some(connection);
        self.start()
    }

    /// Takes what a driver gives, and lets the backend serve it.
    pub(super) fn run(&mut self, running: Running) {
        self.running = Some(running);
        if let Err(error) = self.start() {
            self.fail(&error);
        }
    }

    /// Lets the backend serve the rings, if there are both.
    fn start(&mut self) -> Result<(), BackendError> {
        let (Some(connection), Some(running)) = (&self.connection, &mut self.running) else {
            return Ok(());
        };
        let memories = [Some(&self.ram), self.own_rings.as_ref()];
        let parts: Vec<(MemoryPart, &Arc<File>)> =
            memories.into_iter().flatten().flat_map(parts_of).collect();
        let parts: Vec<_> = parts.iter().map(|(part, file)| (*part, file.as_fd())).collect();
        // What is ours does not know of thresholds: each side tells the other of everything.
        let relayed = running.rings.iter().any(|ring| matches!(ring, Ring::Relayed(..)));
        let hidden = if relayed { FEATURE_EVENT_IDX } else { 0 };
        connection.begin(running.features & !hidden & !self.kind.own_features(), &parts)?;
        if self.shape.protocol & PROTOCOL_INFLIGHT != 0 {
            if running.inflight.is_none() {
                let rings = self.shape.rings as u16;
                running.inflight = Some(connection.make_inflight(rings, RING_SIZE)?);
            }
            if let Some((area, file)) = &running.inflight {
                connection.give_inflight(*area, file.as_fd())?;
            }
        }
        let used = running.used;
        running.rings.iter_mut().try_for_each(|ring| {
            let enabled = ring.number() < used;
            ring.start(connection, enabled)
        })
    }

    /// The driver uses so many of its rings from here on, the first ones. Returns whether it has
    /// them. A backend that is not there is told when it comes.
    pub(super) fn set_used(&mut self, used: u32) -> bool {
        let Some(running) = &mut self.running else { return false };
        let before = std::mem::replace(&mut running.used, used);
        let Some(connection) = &self.connection else { return true };
        let changed = running.rings.iter().map(Ring::number).filter(|number| {
            let is_used = |count: u32| *number < count;
            is_used(used) != is_used(before)
        });
        let told = changed.map(|number| connection.enable_ring(number, number < used));
        if let Err(error) = told.collect::<Result<Vec<()>, _>>() {
            self.fail(&error);
        }
        true
    }

    /// Takes the rings back from the backend, which touches them no more when this returns.
    pub(super) fn stop(&mut self) {
        let Some(running) = self.running.take() else { return };
        let Some(connection) = &self.connection else { return };
        for ring in &running.rings {
            if let Err(error) = connection.stop_ring(ring.number()) {
                return self.fail(&error);
            }
        }
    }

    /// The connection is of no use; whoever watches it finds it at its end.
    pub(super) fn fail(&self, error: &dyn std::fmt::Display) {
        tracing::warn!(backend = self.number, "{error}");
        if let Some(connection) = &self.connection {
            connection.break_off();
        }
    }

    /// Carries over what driver and backend have put into ring number `which`.
    pub(super) fn relay(&mut self, which: usize) {
        let connected = self.connection.is_some();
        let Some(running) = &mut self.running else { return };
        let ring = running.rings.iter_mut().find_map(|ring| match ring {
            Ring::Relayed(number, relay) if *number as usize == which => Some(relay),
            _ => None,
        });
        let Some(relay) = ring else { return };
        // Without a backend, requests stay where the driver put them.
        let answers = relay.give_answers();
        let carried = match connected {
            true => answers.and_then(|()| relay.take_requests()),
            false => {
                relay.driver.acknowledge_kick();
                answers
            }
        };
        match carried {
            Ok(()) => {}
            Err(RelayError::Driver(error)) => running.fault.report(DEVICE, &error),
            Err(error @ (RelayError::Backend(_) | RelayError::Memory(_))) => self.fail(&error),
        }
    }

    /// Lets go of a connection that is at its end, and tells of it.
    pub(super) fn disconnect(&mut self) {
        if self.connection.take().is_none() {
            return;
        }
        tracing::warn!(backend = self.number, "the vhost-user backend is gone; the guest waits");
        for ring in self.running.iter_mut().flat_map(|running| &mut running.rings) {
            ring.end();
        }
        (self.gone)(self.number);
    }
}

impl Ring {
    fn number(&self) -> u32 {
        let (Self::Direct(number, _) | Self::Relayed(number, _)) = self;
        *number
    }

    fn start(&mut self, connection: &Connection, enabled: bool) -> Result<(), BackendError> {
        let wrong = |error: &dyn std::fmt::Display| BackendError::Unfit(error.to_string());
        match self {
            Self::Direct(number, queue) => {
                let [descriptors, available, used] = queue.addresses();
                let addresses = RingAddresses { descriptors, available, used };
                let base = queue.used_index().map_err(|error| wrong(&error))?;
                let call = queue.interrupt().event().map(|event| borrow(event));
                let (size, kick) = (queue.size(), borrow(queue.kick_event()));
                let number = *number;
                let setup = RingSetup { number, size, base, addresses, kick, call, enabled };
                connection.start_ring(&setup)?;
                // What came before is looked at as if it came now.
                let _ = queue.kick_event().write(1); // Full means pending.
            }
            Self::Relayed(number, relay) => {
                relay.begin().map_err(|error| wrong(&error))?;
                let (kick, call) = (borrow(&relay.kick), Some(borrow(&relay.call)));
                let (number, size, addresses) = (*number, relay.driver.size(), relay.addresses());
                let base = 0;
                let setup = RingSetup { number, size, base, addresses, kick, call, enabled };
                connection.start_ring(&setup)?;
                let _ = relay.driver.kick_event().write(1); // Full means pending.
            }
        }
        Ok(())
    }

    /// The backend is gone, and may have answered without a word.
    fn end(&mut self) {
        match self {
            Self::Direct(_, queue) => queue.interrupt().trigger(),
            Self::Relayed(_, relay) => {
                if let Err(error) = relay.give_answers() {
                    tracing::warn!("the last answers of a backend are lost: {error}");
                }
            }
        }
    }
}

/// The parts of a memory that is mapped from a file; others have none.
fn parts_of(ram: &GuestRam) -> Vec<(MemoryPart, &Arc<File>)> {
    ram.iter().filter_map(part_of).collect()
}

fn part_of(region: &GuestRegionMmap<()>) -> Option<(MemoryPart, &Arc<File>)> {
    let file = region.file_offset()?;
    let (guest, bytes, offset) = (region.start_addr().0, region.len(), file.start());
    Some((MemoryPart { guest, bytes, offset }, file.arc()))
}

/// An event's descriptor, to be sent.
#[allow(unsafe_code)]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event keeps its descriptor open for as long as it lives, which is longer than
    // what is returned.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

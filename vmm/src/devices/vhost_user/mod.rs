//! Devices that a process of the host serves (vhost-user): networks, disks, file systems.
//!
//! The backend maps the guest's memory and has the driver's rings, whose kicks come to it from KVM
//! and whose calls go to KVM. The VMM tells it where all of that is, at three moments: when the
//! driver is done setting the device up, when it resets it, and when the backend has gone and
//! another is there. In between nothing passes here, except the heads of a disk's requests whose
//! backend does not keep what is in flight ([`relay`]).
//!
//! All talk with backends is on a thread of its own, since they can take their time: up to
//! [`PATIENCE`] an answer. What a backend says has bounds, and one that breaks the rules loses its
//! connection. It sees all of the guest's memory, and is trusted with that by the operator.

mod connection;
mod frontend;
mod kind;
mod messages;
mod relay;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vial_vmm_api::VHOST_USER_RING_BYTES;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::connection::BackendError;
use self::connection::Connection;
pub use self::frontend::BackendGone;
use self::frontend::{Frontend, Ring, Running, lock};
pub use self::kind::Kind;
use self::kind::{RING_SIZE, Shape};
use self::messages::PROTOCOL_INFLIGHT;
use self::relay::{RING_BYTES, Relay};
use crate::devices::net::{self, control::Control};
use crate::memory::GuestRam;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, Fault, VirtioDevice, Worker, WorkerThread,
};

/// How long a backend may take for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Where rings of the VMM's own are for a backend: above all that a guest can have as memory.
const OWN_RINGS: u64 = 1 << 40;

/// The device, as its driver sees it.
pub struct VhostUser {
    id: u32,
    sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
    frontend: Arc<Mutex<Frontend>>,
    /// Where the backend does not keep what is in flight: kick and call of each ring of ours.
    relayed: Option<Vec<OwnEvents>>,
    begin: Arc<EventFd>,
}

/// Where another connection is given to a device.
#[derive(Clone)]
pub struct Handover {
    waiting: Arc<Mutex<Option<OwnedFd>>>,
    arrived: Arc<EventFd>,
}

impl Handover {
    /// Gives it. One that was given before and not taken yet is closed.
    pub fn give(&self, socket: OwnedFd) {
        let mut waiting = self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *waiting = Some(socket);
        let _ = self.arrived.write(1); // Full means pending.
    }

    fn take(&self) -> Option<OwnedFd> {
        let _ = self.arrived.read(); // Non-blocking: empty is fine.
        self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }
}

/// What a device is made from.
pub struct Plan {
    /// What it is.
    pub kind: Kind,
    /// At most so many queues.
    pub queues: u8,
    /// Connected to the backend.
    pub socket: OwnedFd,
    /// The guest's memory, mapped from a file.
    pub ram: GuestRam,
    /// Its number among the devices of backends.
    pub number: u8,
    /// Told when the connection has broken.
    pub gone: BackendGone,
    /// See [`PATIENCE`].
    pub patience: Duration,
}

impl VhostUser {
    /// Agrees with the backend on a device. The watcher has to run on the event loop of
    /// [`WorkerThread::VhostUser`] for as long as the machine lives.
    ///
    /// # Errors
    /// [`BackendError`].
    pub fn new(plan: Plan) -> Result<(Self, Handover, Box<dyn Worker>), BackendError> {
        let Plan { kind, queues, socket, ram, number, gone, patience } = plan;
        kind.check(queues)?;
        let mut connection = Connection::new(socket, patience);
        let shape = kind.negotiate(&mut connection, queues)?;
        let own_rings = match &kind {
            Kind::Block { rings, .. } if shape.protocol & PROTOCOL_INFLIGHT == 0 => {
                Some(map_own_rings(rings)?)
            }
            _ => None,
        };
        let event = || EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(host("make an event for"));
        let pair = |_| Ok((event()?, event()?));
        let relayed = match &own_rings {
            Some(_) => Some((0..shape.rings).map(pair).collect::<Result<Vec<_>, BackendError>>()?),
            None => None,
        };
        let device = Self {
            id: kind.id(),
            sizes: sizes(&shape),
            features: shape.features,
            config: shape.config.clone(),
            frontend: Arc::new(Mutex::new(Frontend {
                number,
                kind,
                queues,
                patience,
                ram,
                own_rings,
                shape,
                connection: Some(connection),
                running: None,
                gone,
            })),
            relayed,
            begin: event()?,
        };
        let handover = Handover { waiting: Arc::default(), arrived: event()? };
        let watcher =
            Watcher { frontend: device.frontend.clone(), handover: handover.clone(), socket: None };
        Ok((device, handover, Box::new(watcher)))
    }
}

/// Those of the backend's rings, and of the queue by which a network of several pairs is told how
/// many are used.
fn sizes(shape: &Shape) -> Vec<u16> {
    let mut sizes = vec![RING_SIZE; shape.rings];
    sizes.extend((shape.features & net::CTRL_VQ != 0).then_some(net::CONTROL_SIZE));
    sizes
}

fn host(action: &'static str) -> impl Fn(std::io::Error) -> BackendError {
    move |error| BackendError::Unfit(format!("{action} the backend's device: {error}"))
}

/// Maps memory for rings of the VMM's own, that backends map too.
fn map_own_rings(file: &OwnedFd) -> Result<GuestRam, BackendError> {
    let map = || -> Result<GuestRam, String> {
        let file = File::from(file.try_clone().map_err(|error| error.to_string())?);
        let bytes = file.metadata().map_err(|error| error.to_string())?.len();
        if bytes < VHOST_USER_RING_BYTES {
            return Err(format!("it has {bytes} bytes, not {VHOST_USER_RING_BYTES}"));
        }
        let mapping =
            MmapRegion::from_file(FileOffset::new(file, 0), VHOST_USER_RING_BYTES as usize)
                .map_err(|error| error.to_string())?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(OWN_RINGS))
            .ok_or("it is beyond all addresses")?;
        GuestMemoryMmap::from_regions(vec![region]).map_err(|error| error.to_string())
    };
    map().map_err(|reason| BackendError::Unfit(format!("map the rings' memory: {reason}")))
}

impl VirtioDevice for VhostUser {
    fn id(&self) -> u32 {
        self.id
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn worker_thread(&self) -> WorkerThread {
        WorkerThread::VhostUser
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let Activation { ram, features, mut queues, fault, .. } = activation;
        let control = self.take_control(features, &ram, &mut queues);
        let own_rings = match &self.relayed {
            Some(_) => lock(&self.frontend).own_rings.clone(),
            None => None,
        };
        let mut rings = Vec::new();
        for (number, queue) in queues.into_iter().enumerate() {
            let Some(queue) = queue else { continue };
            let events = self.relayed.as_ref().and_then(|events| events.get(number)).cloned();
            rings.push(ring(number as u32, queue, own_rings.clone().zip(events)));
        }
        // A network's driver begins with one pair.
        let used = if self.features & net::MQ == 0 { u32::MAX } else { 2 };
        let running = Running { features, rings, fault: fault.clone(), used, inflight: None };
        let (frontend, begin) = (self.frontend.clone(), self.begin.clone());
        Ok(Box::new(Driven {
            frontend,
            begin,
            given: Some(running),
            control,
            fault,
            broken: false,
        }))
    }
}

impl VhostUser {
    /// The control queue of a network's driver, where it has one, and no queues that it does not
    /// know of.
    fn take_control(
        &self,
        features: u64,
        ram: &GuestRam,
        queues: &mut Vec<Option<ActiveQueue>>,
    ) -> Option<Control> {
        if self.features & net::CTRL_VQ == 0 {
            return None;
        }
        let has = |bit: u64| features & bit != 0;
        let knows = has(net::MQ) && has(net::CTRL_VQ);
        // As in [`net`]: behind all pairs that the driver knows of.
        let rings = if knows { self.sizes.len() - 1 } else { 2 };
        let queue = queues.get_mut(rings).and_then(Option::take);
        queues.truncate(rings);
        let given = queues.iter().take_while(|queue| queue.is_some()).count();
        let most = if knows { given / 2 } else { 0 };
        queue.filter(|_| has(net::CTRL_VQ)).map(|queue| Control::new(queue, ram, most))
    }
}

/// Kick and call of a ring of ours.
type OwnEvents = (Arc<EventFd>, Arc<EventFd>);

fn ring(number: u32, queue: ActiveQueue, own: Option<(GuestRam, OwnEvents)>) -> Ring {
    match own {
        None => Ring::Direct(number, queue),
        Some((memory, events)) => {
            let at = OWN_RINGS + u64::from(number) * RING_BYTES;
            Ring::Relayed(number, Box::new(Relay::new(queue, memory, at, events)))
        }
    }
}

/// A device whose driver is there: from activation to reset.
struct Driven {
    frontend: Arc<Mutex<Frontend>>,
    begin: Arc<EventFd>,
    /// Until the backend's thread has begun with it.
    given: Option<Running>,
    /// By which a network's driver says how many pairs it uses.
    control: Option<Control>,
    fault: Fault,
    /// The driver broke that.
    broken: bool,
}

impl Driven {
    fn begin(&mut self, frontend: &mut Frontend) {
        let _ = self.begin.read(); // Non-blocking: empty is fine.
        if let Some(running) = self.given.take() {
            frontend.run(running);
        }
    }

    fn serve_control(&mut self) {
        let frontend = self.frontend.clone();
        let mut frontend = lock(&frontend);
        // Whichever event is told of first.
        self.begin(&mut frontend);
        let Some(control) = &mut self.control else { return };
        control.queue.acknowledge_kick();
        if self.broken {
            return;
        }
        if let Err(error) = control.serve(|pairs| frontend.set_used(2 * pairs as u32)) {
            self.fault.report("vhost-user", &error);
            self.broken = true;
        }
    }
}

impl MutEventSubscriber for Driven {
    fn init(&mut self, ops: &mut EventOps) {
        // A ring's number is what its events are told apart by; one more begins.
        let rings = self.given.iter().flat_map(|running| &running.rings);
        let mut events = vec![(self.begin.as_raw_fd(), BEGIN)];
        for ring in rings {
            if let Ring::Relayed(number, relay) = ring {
                events.push((relay.driver.kick_event().as_raw_fd(), *number));
                events.push((relay.call.as_raw_fd(), *number));
            }
        }
        let control = self.control.iter().map(|control| control.queue.kick_event().as_raw_fd());
        events.extend(control.map(|event| (event, CONTROL)));
        for (event, data) in events {
            if let Err(error) = ops.add(Events::with_data_raw(event, data, EventSet::IN)) {
                tracing::error!(%error, "a vhost-user device cannot listen to its events");
            }
        }
        // Not here: the driver waits for this to return, and backends can take their time.
        let _ = self.begin.write(1); // Full means pending.
        if let Some(control) = &self.control {
            let _ = control.queue.kick_event().write(1); // The driver may have kicked before.
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let frontend = self.frontend.clone();
        match events.data() {
            BEGIN => self.begin(&mut lock(&frontend)),
            CONTROL => self.serve_control(),
            // Not before it has begun.
            ring => lock(&frontend).relay(ring as usize),
        }
    }
}

/// What no ring's number is.
const BEGIN: u32 = u32::MAX;
const CONTROL: u32 = u32::MAX - 1;

impl Drop for Driven {
    fn drop(&mut self) {
        lock(&self.frontend).stop();
    }
}

/// Sees a connection's end, and takes others.
struct Watcher {
    frontend: Arc<Mutex<Frontend>>,
    handover: Handover,
    /// What is watched.
    socket: Option<RawFd>,
}

/// What the events of a watcher are told apart by.
const ARRIVED: u32 = 0;
const BACKEND: u32 = 1;

impl Watcher {
    fn watch(&mut self, ops: &mut EventOps) {
        let frontend = lock(&self.frontend);
        let Some(connection) = &frontend.connection else { return };
        let socket = connection.as_fd().as_raw_fd();
        // A backend says nothing unasked.
        match ops.add(Events::with_data_raw(socket, BACKEND, EventSet::IN)) {
            Ok(()) => self.socket = Some(socket),
            Err(error) => tracing::error!(%error, "the end of a backend will not be seen"),
        }
    }

    fn forget(&mut self, ops: &mut EventOps) {
        let Some(socket) = self.socket.take() else { return };
        if let Err(error) = ops.remove(Events::with_data_raw(socket, BACKEND, EventSet::IN)) {
            tracing::error!(%error, "a backend that is gone is still watched");
        }
        // Its descriptor is closed by this, and its number free for the next.
        lock(&self.frontend).disconnect();
    }
}

impl MutEventSubscriber for Watcher {
    fn init(&mut self, ops: &mut EventOps) {
        let arrived = Events::with_data(&*self.handover.arrived, ARRIVED, EventSet::IN);
        if let Err(error) = ops.add(arrived) {
            tracing::error!(%error, "a vhost-user device cannot be given another backend");
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == BACKEND {
            return self.forget(ops);
        }
        let Some(socket) = self.handover.take() else { return };
        self.forget(ops);
        let mut frontend = lock(&self.frontend);
        let connected = frontend.connect(socket);
        match &connected {
            Ok(()) => tracing::info!(backend = frontend.number, "another backend serves the guest"),
            Err(error) => frontend.fail(error),
        }
        let refused = frontend.connection.is_none();
        let (number, gone) = (frontend.number, frontend.gone.clone());
        drop(frontend);
        match refused {
            true => gone(number),
            false => self.watch(ops),
        }
    }
}

#[cfg(test)]
mod tests;

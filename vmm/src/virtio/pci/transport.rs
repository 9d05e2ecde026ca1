//! A virtio device as a PCI function: its BAR, its interrupts, and the moment when its queues go
//! over to the device.

mod saved;

use std::sync::Arc;

use vial_sync::FaultFlag;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::saved::{DeviceState, RestoreError, SaveError};
use super::registers::{Action, QueueRegisters, Registers};
use crate::event_loop::{EventLoop, EventLoopError, WorkerId};
use crate::memory::GuestRam;
use crate::pci::PciFunction;
use crate::pci::bus::{BusError, PciBus};
use crate::pci::config::{BarChange, ConfigError, ConfigSpace, Identity};
use crate::pci::line::{MsiError, MsiRouter};
use crate::pci::msix::{self, MsixTable};
use crate::virtio::queue::Position;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, Fault, Interrupt, VirtioDevice, WorkerThread,
};

const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const INTERRUPT_STATUS: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION_SIZE: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;

// Virtio's PCI ids and capability types (virtio 1.2, 4.1.2, 4.1.4).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_INTERRUPT_STATUS: u8 = 3;
const TYPE_DEVICE_CONFIG: u8 = 4;

/// Why a device could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// An interrupt could not be had.
    #[error(transparent)]
    Interrupt(#[from] MsiError),
    /// The bus is full.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The function's registers do not fit.
    #[error("put a device's registers together: {0}")]
    Config(#[from] ConfigError),
    /// No descriptor was left for a queue's event.
    #[error("make a queue's event: {0}; raise the limit of open files")]
    Event(std::io::Error),
    /// KVM refused to watch a doorbell.
    #[error("watch the doorbell at {address:#x}: {reason}")]
    Doorbell {
        /// Its address.
        address: u64,
        /// What KVM said.
        reason: String,
    },
}

/// What lets a guest's write to an address add 1 to an event, without an exit to the VMM.
pub trait Doorbells: Send + Sync {
    /// Begins.
    ///
    /// # Errors
    /// KVM refuses.
    fn watch(&self, address: u64, event: &EventFd) -> Result<(), TransportError>;

    /// Ends.
    ///
    /// # Errors
    /// KVM refuses.
    fn unwatch(&self, address: u64, event: &EventFd) -> Result<(), TransportError>;
}

/// The event loops that devices' workers run on.
#[derive(Clone)]
pub struct Workers {
    /// See [`WorkerThread::Io`].
    pub io: EventLoop,
    /// See [`WorkerThread::FileServer`].
    pub file_server: Option<EventLoop>,
    /// See [`WorkerThread::VhostUser`].
    pub vhost_user: Option<EventLoop>,
}

impl Workers {
    /// The one for a kind of device.
    pub fn of(&self, thread: WorkerThread) -> &EventLoop {
        let own = match thread {
            WorkerThread::Io => &None,
            WorkerThread::FileServer => &self.file_server,
            WorkerThread::VhostUser => &self.vhost_user,
        };
        own.as_ref().unwrap_or(&self.io)
    }

    /// Waits until all of them have what they were given.
    ///
    /// # Errors
    /// A thread has ended.
    pub fn settle(&self) -> Result<(), EventLoopError> {
        let others = [&self.file_server, &self.vhost_user].into_iter().flatten();
        others.chain([&self.io]).try_for_each(EventLoop::settle)
    }
}

/// How the driver's writes to a queue's doorbell arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bell {
    /// By exits: it has not been rung where it is.
    Silent,
    /// By its event, without an exit.
    Watched,
    /// By exits for good: the host does not watch it.
    Refused,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    config: ConfigSpace,
    msix: MsixTable,
    msix_control: u16,
    needs_reset: Arc<FaultFlag>,
    kicks: Vec<Arc<EventFd>>,
    /// How the driver rings each queue.
    bells: Vec<Bell>,
    /// Where each queue is to begin, and where it was when its worker was dropped.
    positions: Vec<Arc<Position>>,
    doorbells: Arc<dyn Doorbells>,
    workers: Workers,
    worker: Option<(WorkerThread, WorkerId)>,
    ram: GuestRam,
    /// It was taken off its bus.
    gone: bool,
}

impl VirtioPci {
    /// Wraps a device. Its BAR takes a place on `bus`, or has none until the guest gives it one; adding it to the bus is
    /// the caller's.
    ///
    /// # Errors
    /// No interrupt, descriptor or address is left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        bus: Option<&PciBus>,
        ram: GuestRam,
        router: Arc<dyn MsiRouter>,
        doorbells: Arc<dyn Doorbells>,
        workers: Workers,
    ) -> Result<Self, TransportError> {
        let queues = device.queue_sizes().len();
        // One vector a queue, and one for configuration changes.
        let vectors = queues as u16 + 1;
        let msix = MsixTable::new(vectors, router)?;
        let mut config = ConfigSpace::new(identity(device.id()));
        let place = bus.map(|bus| bus.allocate_bar(BAR_SIZE)).transpose()?;
        config.add_bar(0, BAR_SIZE, place.unwrap_or(0))?;
        if place.is_none() {
            config.undecode();
        }
        add_virtio_capabilities(&mut config)?;
        let body = msix.capability(0, MSIX_TABLE as u32, MSIX_PENDING as u32);
        let msix_capability = config.add_capability(msix::CAPABILITY_ID, &body)?;
        let msix_control = msix_capability + 2;
        config.allow(usize::from(msix_control), &MsixTable::WRITABLE_CONTROL.to_le_bytes());
        let kicks = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(TransportError::Event))
            .collect::<Result<Vec<_>, _>>()?;
        let registers = Registers::new(device.features(), device.queue_sizes(), vectors);
        Ok(Self {
            device,
            registers,
            config,
            msix,
            msix_control,
            needs_reset: Arc::default(),
            kicks,
            bells: vec![Bell::Silent; queues],
            positions: (0..queues).map(|_| Arc::default()).collect(),
            doorbells,
            workers,
            worker: None,
            ram,
            gone: false,
        })
    }

    fn doorbell(bar: u64, queue: usize) -> u64 {
        bar + NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER)
    }

    /// The driver rings a queue by an exit. The next time it is to be without one: many queues are never rung, and for each
    /// doorbell that is watched the kernel waits until nobody looks at the list of those before.
    fn ring(&mut self, queue: usize) {
        let (Some(kick), Some(bell)) = (self.kicks.get(queue), self.bells.get_mut(queue)) else {
            return;
        };
        let _ = kick.write(1); // Full means pending.
        let Some((_, bar, _)) = self.config.decoded_bars().next() else { return };
        if *bell == Bell::Silent {
            *bell = match self.doorbells.watch(Self::doorbell(bar, queue), kick) {
                Ok(()) => Bell::Watched,
                Err(error) => {
                    // The guest chose an address that another device has, for one.
                    tracing::warn!(%error, "a device's queue is rung by exits");
                    Bell::Refused
                }
            };
        }
    }

    fn move_doorbells(&mut self, change: BarChange) {
        for (queue, (bell, kick)) in self.bells.iter_mut().zip(&self.kicks).enumerate() {
            if let (Some(old), Bell::Watched) = (change.old, *bell)
                && let Err(error) = self.doorbells.unwatch(Self::doorbell(old, queue), kick)
            {
                tracing::warn!(%error, "a doorbell stays where its device was");
            }
            *bell = Bell::Silent;
        }
    }

    fn interrupt(&self, vector: u16) -> Interrupt {
        self.msix.event(vector).map_or_else(Interrupt::none, Interrupt::new)
    }

    /// Lets the device serve its queues, from a moment on that comes soon.
    fn activate(&mut self) {
        let config_interrupt = self.interrupt(self.registers.config_vector());
        let fault = Fault::new(self.needs_reset.clone(), config_interrupt.clone());
        if let Err(error) = self.try_activate(config_interrupt, fault.clone()) {
            fault.report("virtio-pci", &error);
        }
    }

    fn try_activate(
        &mut self,
        config_interrupt: Interrupt,
        fault: Fault,
    ) -> Result<(), ActivateError> {
        let mut queues = Vec::with_capacity(self.kicks.len());
        let events = self.kicks.iter().zip(&self.positions);
        for (registers, (kick, position)) in self.registers.queues().iter().zip(events) {
            let queue = match registers.enabled {
                true => {
                    let queue = self.build_queue(registers)?;
                    let interrupt = self.interrupt(registers.vector);
                    let queue = ActiveQueue::new(queue, self.ram.clone(), kick.clone(), interrupt);
                    Some(queue.starting_at(position.clone()))
                }
                false => None,
            };
            queues.push(queue);
        }
        let activation = Activation {
            ram: self.ram.clone(),
            features: self.registers.features(),
            queues,
            config_interrupt,
            fault,
        };
        let worker = self.device.activate(activation)?;
        let thread = self.device.worker_thread();
        let gone = |error: EventLoopError| ActivateError {
            device: "virtio-pci",
            reason: error.to_string(),
        };
        let id = self.workers.of(thread).add(worker).map_err(gone)?;
        self.worker = Some((thread, id));
        Ok(())
    }

    fn build_queue(&self, registers: &QueueRegisters) -> Result<Queue, ActivateError> {
        let bad = |reason: String| ActivateError { device: "virtqueue", reason };
        let mut queue = Queue::new(registers.max_size).map_err(|error| bad(error.to_string()))?;
        let halves = |value: u64| (Some(value as u32), Some((value >> 32) as u32));
        queue.set_size(registers.size);
        let (low, high) = halves(registers.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(registers.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(registers.device);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(self.registers.features() & crate::virtio::FEATURE_EVENT_IDX != 0);
        queue.set_ready(true);
        let taken = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
        if taken != [registers.descriptors, registers.driver, registers.device] {
            return Err(bad("its rings are not aligned".into()));
        }
        if queue.is_valid(&self.ram) {
            Ok(queue)
        } else {
            Err(bad("its rings lie outside the guest's memory".into()))
        }
    }

    fn stop(&mut self) -> Result<(), EventLoopError> {
        self.worker.take().map_or(Ok(()), |(thread, id)| self.workers.of(thread).remove(id))
    }

    fn reset(&mut self) {
        let needs_reset = self.needs_reset.clone();
        if let Err(error) = needs_reset.lower_after(|| self.stop()) {
            tracing::error!(%error, "a device's worker cannot be stopped");
        }
        for kick in &self.kicks {
            let _ = kick.read(); // Non-blocking: empty already is fine.
        }
        self.positions.iter().for_each(|position| position.set(0, 0));
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::None => {}
            Action::Activate => {
                self.activate();
                self.settle();
            }
            Action::Reset => self.reset(),
        }
    }

    /// Waits until the device serves its queues, if it is to.
    fn settle(&self) {
        let thread = self.worker.as_ref().map(|(thread, _)| self.workers.of(*thread));
        if let Err(error) = thread.map_or(Ok(()), EventLoop::settle) {
            tracing::error!(%error, "a device's worker does not begin");
        }
    }
}

fn identity(virtio_id: u32) -> Identity {
    let class = match virtio_id {
        1 => [0, 0, 0x02],         // Network, Ethernet.
        2 | 26 => [0, 0x80, 0x01], // Mass storage, other.
        _ => [0, 0x80, 0x08],      // System peripheral, other.
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + virtio_id as u16,
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: 0x40 + virtio_id as u16,
    }
}

/// Where the structures lie (virtio 1.2, 4.1.4): `struct virtio_pci_cap` less its first two bytes.
fn add_virtio_capabilities(config: &mut ConfigSpace) -> Result<(), ConfigError> {
    let structures = [
        (TYPE_COMMON, COMMON, 0x38),
        (TYPE_INTERRUPT_STATUS, INTERRUPT_STATUS, 1),
        (TYPE_DEVICE_CONFIG, DEVICE_CONFIG, REGION_SIZE as u32),
    ];
    for (kind, offset, length) in structures {
        config.add_capability(VENDOR_CAPABILITY, &structure(16, kind, offset, length))?;
    }
    let mut notify = structure(20, TYPE_NOTIFY, NOTIFY, REGION_SIZE as u32).to_vec();
    notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
    config.add_capability(VENDOR_CAPABILITY, &notify)?;
    Ok(())
}

fn structure(capability_length: u8, kind: u8, offset: u64, length: u32) -> [u8; 14] {
    let mut body = [0; 14];
    body[0] = capability_length;
    body[1] = kind;
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..].copy_from_slice(&length.to_le_bytes());
    body
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        if self.gone {
            return Vec::new();
        }
        let changes = self.config.write(offset, data);
        self.msix.set_control(self.config.u16_at(usize::from(self.msix_control)));
        for change in &changes {
            self.move_doorbells(*change);
        }
        changes
    }

    fn read_bar(&mut self, _: u8, offset: u64, data: &mut [u8]) {
        let within = offset % REGION_SIZE;
        match offset - within {
            COMMON => {
                if self.needs_reset.is_raised() {
                    self.registers.set_needs_reset();
                }
                self.registers.read(within, data);
            }
            DEVICE_CONFIG => self.device.read_config(within as usize, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, _: u8, offset: u64, data: &[u8]) {
        if self.gone {
            return;
        }
        let within = offset % REGION_SIZE;
        match offset - within {
            COMMON => {
                let action = self.registers.write(within, data);
                self.perform(action);
            }
            DEVICE_CONFIG => self.device.write_config(within as usize, data),
            NOTIFY => self.ring((within / u64::from(NOTIFY_MULTIPLIER)) as usize),
            MSIX_TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }

    fn detach(&mut self) {
        self.gone = true;
        self.reset();
        for (_, address, _) in self.config.decoded_bars().collect::<Vec<_>>() {
            self.move_doorbells(BarChange {
                bar: 0,
                size: BAR_SIZE,
                old: Some(address),
                new: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::devices::rng::Rng;
    use crate::devices::testing;
    use crate::pci::line::MsiMessage;

    struct NoLines;

    impl MsiRouter for NoLines {
        fn allocate(&self) -> Result<u32, MsiError> {
            Ok(24)
        }
        fn attach(&self, _: u32, _: &Arc<EventFd>, _: MsiMessage) -> Result<(), MsiError> {
            Ok(())
        }
        fn detach(&self, _: u32, _: &EventFd) -> Result<(), MsiError> {
            Ok(())
        }
        fn release(&self, _: u32) {}
    }

    /// What was asked of the host, and whether it refuses.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(&'static str, u64)>>, AtomicBool);

    impl Recorder {
        fn take(&self) -> Vec<(&'static str, u64)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Doorbells for Recorder {
        fn watch(&self, address: u64, _: &EventFd) -> Result<(), TransportError> {
            self.0.lock().unwrap().push(("watch", address));
            match self.1.load(Ordering::Relaxed) {
                true => Err(TransportError::Doorbell { address, reason: "taken".into() }),
                false => Ok(()),
            }
        }
        fn unwatch(&self, address: u64, _: &EventFd) -> Result<(), TransportError> {
            self.0.lock().unwrap().push(("unwatch", address));
            Ok(())
        }
    }

    const COMMAND: u16 = 4;
    const BAR: u16 = 0x10;
    const MEMORY: [u8; 2] = [2, 0];

    /// A device of one queue, its doorbells, and where those are.
    fn function() -> (VirtioPci, Arc<Recorder>, u64) {
        let (bus, recorder) = (PciBus::new(), Arc::new(Recorder::default()));
        let io = EventLoop::start("tested", || Ok(())).unwrap();
        let workers = Workers { io, file_server: None, vhost_user: None };
        let (device, doorbells) = (Box::new(Rng::new()), recorder.clone());
        let ram = testing::ram();
        let function =
            VirtioPci::new(device, Some(&bus), ram, Arc::new(NoLines), doorbells, workers).unwrap();
        let bell = function.config.decoded_bars().next().unwrap().1 + NOTIFY;
        (function, recorder, bell)
    }

    #[test]
    fn doorbell_is_watched_once_it_was_rung_and_follows_its_device() {
        let (mut function, recorder, bell) = function();
        assert!(recorder.take().is_empty());
        function.write_bar(0, NOTIFY, &[0, 0]);
        assert_eq!(function.kicks[0].read().unwrap(), 1, "what is rung by an exit is heard");
        function.write_bar(0, NOTIFY, &[0, 0]);
        assert_eq!(recorder.take(), [("watch", bell)]);
        // A queue that it has not.
        function.write_bar(0, NOTIFY + 4, &[0, 0]);
        function.write_bar(0, NOTIFY + 0xffc, &[0, 0]);
        assert!(recorder.take().is_empty());
        function.write_config(COMMAND, &[0, 0]);
        function.write_config(BAR, &0xd000_0000u32.to_le_bytes());
        function.write_config(COMMAND, &MEMORY);
        assert_eq!(recorder.take(), [("unwatch", bell)]);
        function.write_bar(0, NOTIFY, &[0, 0]);
        assert_eq!(recorder.take(), [("watch", 0xd000_0000 + NOTIFY)]);
        function.detach();
        assert_eq!(recorder.take(), [("unwatch", 0xd000_0000 + NOTIFY)]);
        function.write_bar(0, NOTIFY, &[0, 0]);
        assert!(recorder.take().is_empty());
    }

    #[test]
    fn doorbell_that_cannot_be_watched_is_tried_once_where_it_is() {
        let (mut function, recorder, bell) = function();
        recorder.1.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            function.write_bar(0, NOTIFY, &[0, 0]);
        }
        assert_eq!(function.kicks[0].read().unwrap(), 3);
        assert_eq!(recorder.take(), [("watch", bell)]);
        function.write_config(COMMAND, &[0, 0]);
        assert!(recorder.take().is_empty(), "what is not watched is not let go of");
    }
}

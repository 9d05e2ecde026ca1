//! The driver's side of a virtqueue, for the devices' tests: real rings in real memory, no KVM.
//!
//! `virtio_queue::mock` is not used for the rings: it lays the used ring over the second half of
//! the available ring, which a test that fills a queue would see.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventManager, SubscriberId, SubscriberOps};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestRam;
use crate::virtio::{Activation, ActiveQueue, Fault, Interrupt, VirtioDevice, Worker};

/// `VIRTQ_DESC_F_NEXT`.
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub(crate) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub(crate) const INDIRECT: u16 = 4;

/// The size of the guest memory of a test.
pub(crate) const RAM_BYTES: usize = 64 << 20;
/// What a test may use for buffers begins here; below are the rings.
pub(crate) const BUFFERS: u64 = 1 << 20;

/// Guest memory for a test.
pub(crate) fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap()
}

/// The driver's half of one queue.
pub(crate) struct DriverQueue {
    ram: GuestRam,
    base: u64,
    size: u16,
    available: u16,
    seen: u16,
    next_descriptor: u16,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) interrupt: Arc<EventFd>,
}

impl DriverQueue {
    /// A queue whose rings are the `index`th 64 KiB of guest memory.
    pub(crate) fn new(ram: &GuestRam, index: u64, size: u16) -> Self {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            ram: ram.clone(),
            base: index << 16,
            size,
            available: 0,
            seen: 0,
            next_descriptor: 0,
            kick: event(),
            interrupt: event(),
        }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }

    /// The device's half.
    pub(crate) fn device_half(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.available_ring() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used_ring() as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.ram));
        ActiveQueue::new(
            queue,
            self.ram.clone(),
            Arc::clone(&self.kick),
            Interrupt::new(Arc::clone(&self.interrupt)),
        )
    }

    /// Writes one descriptor into a table anywhere.
    pub(crate) fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        descriptor: (u64, u32, u16, u16),
    ) {
        let (address, bytes, flags, next) = descriptor;
        let raw = RawDescriptor::from(Descriptor::new(address, bytes, flags, next));
        self.ram.write_obj(raw, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Makes a chain of (address, length, flags) available, without a kick; returns its head.
    pub(crate) fn offer(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (position, &(address, bytes, flags)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (self.next_descriptor + 1) % self.size;
            let last = position + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(self.base, index, (address, bytes, flags, self.next_descriptor));
        }
        self.offer_head(head);
        head
    }

    /// Makes a chain available that starts at a descriptor that is there already.
    pub(crate) fn offer_head(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Writes the index of the available ring, true or not.
    pub(crate) fn set_available_index(&self, index: u16) {
        self.ram.write_obj(index, GuestAddress(self.available_ring() + 2)).unwrap();
    }

    /// The table's address.
    pub(crate) fn table(&self) -> u64 {
        self.base
    }

    /// Kicks the device.
    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that the device gave back: head and bytes written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let used: u16 = self.ram.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if used == self.seen {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.ram.read_obj(GuestAddress(slot)).unwrap();
        let bytes: u32 = self.ram.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), bytes))
    }

    /// Whether the device interrupted since the last time this was asked.
    pub(crate) fn interrupted(&self) -> bool {
        self.interrupt.read().is_ok()
    }
}

/// A device's worker on an event loop that the test turns by hand.
pub(crate) struct Bench {
    pub(crate) ram: GuestRam,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) fault: Fault,
    events: EventManager<Box<dyn Worker>>,
    worker: SubscriberId,
}

impl Bench {
    /// Activates a device with all that it offers.
    pub(crate) fn activate(device: &mut dyn VirtioDevice, ram: &GuestRam) -> Self {
        let features = device.features();
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .enumerate()
            .map(|(index, &size)| DriverQueue::new(ram, index as u64, size))
            .collect();
        Self::activate_with(device, ram, features, queues)
    }

    /// Activates a device with some features and queues.
    pub(crate) fn activate_with(
        device: &mut dyn VirtioDevice,
        ram: &GuestRam,
        features: u64,
        queues: Vec<DriverQueue>,
    ) -> Self {
        Self::activate_without(device, ram, features, queues, &[])
    }

    /// The same of a driver that leaves some of the queues disabled.
    pub(crate) fn activate_without(
        device: &mut dyn VirtioDevice,
        ram: &GuestRam,
        features: u64,
        queues: Vec<DriverQueue>,
        disabled: &[usize],
    ) -> Self {
        let event_idx = features & crate::virtio::FEATURE_EVENT_IDX != 0;
        let fault = Fault::new(Arc::default(), Interrupt::none());
        let activation = Activation {
            ram: ram.clone(),
            features,
            queues: (0..)
                .zip(&queues)
                .map(|(index, queue)| {
                    (!disabled.contains(&index)).then(|| queue.device_half(event_idx))
                })
                .collect(),
            config_interrupt: Interrupt::none(),
            fault: fault.clone(),
        };
        let mut events = EventManager::<Box<dyn Worker>>::new().unwrap();
        let worker = events.add_subscriber(device.activate(activation).unwrap());
        Self { ram: ram.clone(), queues, fault, events, worker }
    }

    /// Lets the worker run until it has nothing to do.
    pub(crate) fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the worker spins");
    }

    /// Takes the worker off its loop, as a reset does.
    pub(crate) fn reset(mut self) {
        drop(self.events.remove_subscriber(self.worker).unwrap());
    }

    /// Kicks a queue and lets the worker run.
    pub(crate) fn kick(&mut self, queue: usize) {
        self.queues[queue].kick();
        self.settle();
    }

    /// Offers a chain, kicks, and returns how many bytes came back, if it came back.
    pub(crate) fn request(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> Option<u32> {
        let head = self.queues[queue].offer(buffers);
        self.kick(queue);
        self.queues[queue].take_used().map(|(used, bytes)| {
            assert_eq!(used, head);
            bytes
        })
    }

    /// As [`Bench::request`], for a device that answers later. `None` when it is broken instead.
    pub(crate) fn answer(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> Option<u32> {
        let head = self.queues[queue].offer(buffers);
        self.kick(queue);
        let late = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            if let Some((used, bytes)) = self.queues[queue].take_used() {
                assert_eq!(used, head);
                return Some(bytes);
            }
            if self.fault.is_reported() {
                return None;
            }
            assert!(std::time::Instant::now() < late, "no answer");
            std::thread::yield_now();
            self.settle();
        }
    }

    /// Writes bytes into guest memory.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads bytes out of guest memory.
    pub(crate) fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.ram.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

/// A pair of connected stream sockets that do not wait.
pub(crate) fn socket_pair() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .unwrap()
}

/// All that a non-blocking descriptor has now, and whether its end was reached.
pub(crate) fn drain(file: &OwnedFd) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        match rustix::io::read(file.as_fd(), &mut piece[..]) {
            Ok(0) => return (all, true),
            Ok(bytes) => all.extend_from_slice(&piece[..bytes]),
            Err(rustix::io::Errno::AGAIN) => return (all, false),
            Err(_) => return (all, true),
        }
    }
}

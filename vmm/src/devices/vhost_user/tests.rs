//! The device against a backend of the test's own: a thread that speaks the backend's side of the
//! protocol, and serves rings where it was told that they are.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, SubscriberOps};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vm_memory::Bytes;

use super::messages::{
    FEATURE_PROTOCOL, MAX_BODY_BYTES, PROTOCOL_CONFIG, PROTOCOL_MQ, PROTOCOL_REPLY_ACK,
};
use super::*;
use crate::devices::testing::{DriverQueue, RAM_BYTES, WRITE, socket_pair};
use crate::virtio::{FEATURE_EVENT_IDX, FEATURE_VERSION_1, Fault, Interrupt};

mod pairs;

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);
const SECTORS: u64 = 4096;
const FLUSH: u64 = 1 << 9;
const FEATURES: u64 = FEATURE_PROTOCOL | FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FLUSH;
const PROTOCOL: u64 = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG;

/// What a backend was told.
#[derive(Debug, Default)]
struct Told {
    features: u64,
    protocol: u64,
    /// Guest address, size, frontend's address, offset; and the file.
    memory: Vec<([u64; 4], OwnedFd)>,
    /// Of the only ring: size, base, and the addresses of descriptors, used and available ring.
    size: u64,
    base: u64,
    ring: [u64; 3],
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    inflight: Option<OwnedFd>,
}

/// How a backend of the test's is.
#[derive(Debug, Clone, Copy)]
struct Manner {
    features: u64,
    protocol: u64,
    sectors: u64,
    /// Answers nothing to this request.
    silent: Option<u32>,
    /// Answers this request with other bytes: header and body.
    nonsense: Option<(u32, [u32; 3], usize)>,
    /// Refuses this request.
    refuses: Option<u32>,
}

const GOOD: Manner = Manner {
    features: FEATURES,
    protocol: PROTOCOL,
    sectors: SECTORS,
    silent: None,
    nonsense: None,
    refuses: None,
};

struct Peer {
    socket: OwnedFd,
    manner: Manner,
    told: Told,
}

fn words(body: &[u8]) -> Vec<u64> {
    body.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

impl Peer {
    /// The next message, if there is one before the connection's end.
    fn read(&self) -> Option<(u32, bool, Vec<u8>, Vec<OwnedFd>)> {
        let (mut bytes, mut files, mut wanted) = (Vec::new(), Vec::new(), 12);
        while bytes.len() < wanted {
            let mut piece = vec![0; wanted - bytes.len()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut piece)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(&self.socket, &mut parts, &mut ancillary, flags).ok()?;
            if received.bytes == 0 {
                return None;
            }
            bytes.extend_from_slice(&piece[..received.bytes]);
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    files.extend(more);
                }
            }
            if bytes.len() == 12 {
                wanted += messages::u32_at(&bytes, 8).unwrap() as usize;
            }
        }
        let number = messages::u32_at(&bytes, 0).unwrap();
        let asked = messages::u32_at(&bytes, 4).unwrap() & 8 != 0;
        Some((number, asked, bytes.split_off(12), files))
    }

    fn write(&self, header: [u32; 3], body: &[u8], file: Option<&OwnedFd>) {
        let header: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        let message = [&header[..], body].concat();
        // The frontend may have closed it.
        let _ =
            sendmsg(&self.socket, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL);
    }

    /// Takes a message in, and answers it. False when the ring has been enabled.
    fn serve(
        &mut self,
        (number, asked, body, mut files): (u32, bool, Vec<u8>, Vec<OwnedFd>),
    ) -> bool {
        if self.manner.silent == Some(number) {
            return true;
        }
        if let Some((_, header, bytes)) = self.manner.nonsense.filter(|(at, ..)| *at == number) {
            self.write(header, &vec![0xff; bytes], None);
            return true;
        }
        let numbers = words(&body);
        let state = |at: usize| numbers[0] >> (32 * at) & 0xffff_ffff;
        let mut answer = None;
        let mut file = None;
        match number {
            1 => answer = Some(self.manner.features.to_le_bytes().to_vec()),
            2 => self.told.features = numbers[0],
            5 => {
                let parts = numbers[1..].chunks_exact(4);
                let parts = parts.map(|part| part.try_into().unwrap());
                self.told.memory = parts.zip(files.drain(..)).collect();
            }
            8 => self.told.size = state(1),
            9 => self.told.ring = [numbers[1], numbers[2], numbers[3]],
            10 => self.told.base = state(1),
            11 => answer = Some(body.clone()),
            12 => self.told.kick = files.pop(),
            13 => self.told.call = files.pop(),
            15 => answer = Some(self.manner.protocol.to_le_bytes().to_vec()),
            16 => self.told.protocol = numbers[0],
            17 => answer = Some(1u64.to_le_bytes().to_vec()),
            18 => self.told.enabled = state(1) == 1,
            24 => {
                let mut config = body.clone();
                config[12..20].copy_from_slice(&self.manner.sectors.to_le_bytes());
                answer = Some(config);
            }
            31 => {
                let mut area = body.clone();
                area[..8].copy_from_slice(&4096u64.to_le_bytes());
                answer = Some(area);
                file = Some(OwnedFd::from(tempfile::tempfile().unwrap()));
            }
            32 => self.told.inflight = files.pop(),
            _ => {}
        }
        let refused = u64::from(self.manner.refuses == Some(number));
        let answer = answer.or_else(|| asked.then(|| refused.to_le_bytes().to_vec()));
        if let Some(body) = answer {
            self.write([number, 5, body.len() as u32], &body, file.as_ref());
        }
        number != 18
    }
}

/// A backend that takes what it is told until the ring is enabled, or the connection ends.
fn backend(manner: Manner) -> (OwnedFd, JoinHandle<Peer>) {
    let (theirs, ours) = socket_pair();
    rustix::io::ioctl_fionbio(&ours, false).unwrap();
    let mut peer = Peer { socket: ours, manner, told: Told::default() };
    let serving = std::thread::spawn(move || {
        while let Some(message) = peer.read() {
            if !peer.serve(message) {
                break;
            }
        }
        peer
    });
    (theirs, serving)
}

/// Memory that is a file's.
fn file_ram(address: u64, file: OwnedFd, bytes: usize) -> GuestRam {
    let mapping = MmapRegion::from_file(FileOffset::new(file.into(), 0), bytes).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(address)).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

fn memory(bytes: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file.into()
}

fn block(read_only: bool) -> Kind {
    Kind::Block { read_only, rings: memory(VHOST_USER_RING_BYTES) }
}

/// A device on an event loop that the test turns.
struct Machine {
    device: VhostUser,
    handover: Handover,
    events: EventManager<Box<dyn Worker>>,
    queue: DriverQueue,
    fault: Fault,
    gone: Arc<AtomicU8>,
}

fn plan(kind: Kind, socket: OwnedFd, gone: &Arc<AtomicU8>, patience: Duration) -> Plan {
    let gone = gone.clone();
    Plan {
        kind,
        queues: 1,
        socket,
        ram: file_ram(0, memory(RAM_BYTES as u64), RAM_BYTES),
        number: 0,
        gone: Arc::new(move |_| {
            gone.fetch_add(1, Ordering::SeqCst);
        }),
        patience,
    }
}

fn refused(kind: Kind, manner: Manner) -> String {
    let (socket, _serving) = backend(manner);
    let result = VhostUser::new(plan(kind, socket, &Arc::default(), SHORT));
    result.err().expect("it is refused").to_string()
}

impl Machine {
    fn new(manner: Manner) -> (Self, JoinHandle<Peer>) {
        let (socket, serving) = backend(manner);
        let gone = Arc::new(AtomicU8::new(0));
        let plan = plan(block(false), socket, &gone, LONG);
        let ram = plan.ram.clone();
        let (device, handover, watcher) = VhostUser::new(plan).unwrap();
        let mut events = EventManager::<Box<dyn Worker>>::new().unwrap();
        events.add_subscriber(watcher);
        let queue = DriverQueue::new(&ram, 0, RING_SIZE);
        let fault = Fault::new(Arc::default(), Interrupt::none());
        (Self { device, handover, events, queue, fault, gone }, serving)
    }

    fn activate(&mut self, features: u64) -> event_manager::SubscriberId {
        let activation = Activation {
            ram: lock(&self.device.frontend).ram.clone(),
            features,
            queues: vec![Some(self.queue.device_half(false))],
            config_interrupt: Interrupt::none(),
            fault: self.fault.clone(),
        };
        let worker = self.device.activate(activation).unwrap();
        self.events.add_subscriber(worker)
    }

    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the loop spins");
    }

    /// Turns the loop until something holds.
    fn until(&mut self, mut holds: impl FnMut(&Self) -> bool) {
        let start = std::time::Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < LONG, "it does not come to that");
            self.events.run_with_timeout(10).unwrap();
        }
    }

    fn requests(&mut self, count: u64) -> Vec<u16> {
        (0..count).map(|at| self.queue.offer(&[((1 << 20) + at * 4096, 512, WRITE)])).collect()
    }
}

/// The ring that a backend serves, as it sees it.
struct Rings {
    memory: GuestRam,
    ring: [u64; 3],
    size: u64,
}

impl Rings {
    fn of(told: &Told) -> Self {
        let [_, used, available] = told.ring;
        let has = |at: u64| {
            told.memory.iter().find(|([_, bytes, from, _], _)| (*from..from + bytes).contains(&at))
        };
        let (part, file) = has(available).expect("the memory table has the ring");
        assert!(has(used).is_some() && has(told.ring[0]).is_some(), "{told:?}");
        let memory = file_ram(part[2], file.try_clone().unwrap(), part[1] as usize);
        Self { memory, ring: told.ring, size: told.size }
    }

    fn available(&self) -> Vec<u16> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.ring[2] + 2)).unwrap();
        let at = |slot: u64| GuestAddress(self.ring[2] + 4 + 2 * (slot % self.size));
        (0..index.into()).map(|slot| self.memory.read_obj(at(slot)).unwrap()).collect()
    }

    /// Answers `head`, the `number`th of all answers.
    fn answer(&self, number: u16, head: u32) {
        let entry = self.ring[1] + 4 + 8 * (u64::from(number) % self.size);
        self.memory.write_obj([head, 512u32], GuestAddress(entry)).unwrap();
        self.memory.write_obj(number + 1, GuestAddress(self.ring[1] + 2)).unwrap();
    }
}

fn call(told: &Told) {
    rustix::io::write(told.call.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn backend_is_told_of_memory_features_and_a_ring_of_ours() {
    let (mut machine, serving) = Machine::new(GOOD);
    assert_eq!(machine.device.id(), 2);
    assert_eq!(machine.device.features(), FLUSH | FEATURE_EVENT_IDX);
    assert_eq!(machine.device.config()[..8], SECTORS.to_le_bytes());
    assert_eq!(machine.device.config()[34..36], [1, 0]);
    machine.activate(FEATURE_VERSION_1 | FLUSH | FEATURE_EVENT_IDX);
    machine.settle();
    let told = serving.join().unwrap().told;
    // Thresholds are between the driver and the VMM only.
    assert_eq!(told.features, FEATURE_PROTOCOL | FEATURE_VERSION_1 | FLUSH);
    assert_eq!((told.protocol, told.enabled), (PROTOCOL, true));
    assert_eq!((told.size, told.base), (RING_SIZE.into(), 0));
    let parts: Vec<_> = told.memory.iter().map(|(part, _)| *part).collect();
    let ours = [OWN_RINGS, VHOST_USER_RING_BYTES, OWN_RINGS, 0];
    assert_eq!(parts, [[0, RAM_BYTES as u64, 0, 0], ours]);
    assert_eq!(told.ring, [machine.queue.table(), OWN_RINGS + 4096, OWN_RINGS]);
}

#[test]
fn restart_loses_no_request_and_answers_none_twice() {
    let (mut machine, serving) = Machine::new(GOOD);
    let heads = machine.requests(6);
    machine.activate(FEATURE_VERSION_1);
    machine.settle();
    let first = serving.join().unwrap();
    let rings = Rings::of(&first.told);
    assert_eq!(rings.available(), heads);
    // Out of order, the last of them without a word before it ends.
    rings.answer(0, heads[4].into());
    call(&first.told);
    machine.settle();
    assert_eq!(machine.queue.take_used(), Some((heads[4], 512)));
    assert!(machine.queue.interrupted());
    rings.answer(1, heads[1].into());
    drop(first);
    machine.until(|machine| machine.gone.load(Ordering::SeqCst) == 1);
    assert_eq!(machine.queue.take_used(), Some((heads[1], 512)));
    // While nobody serves, the guest may go on asking, and the loop has nothing to do.
    let later = machine.requests(1);
    machine.queue.kick();
    machine.settle();
    assert_eq!(machine.queue.take_used(), None);

    let (socket, serving) = backend(GOOD);
    machine.handover.give(socket);
    machine.settle();
    let second = serving.join().unwrap();
    assert_eq!((second.told.base, second.told.enabled), (0, true));
    let rings = Rings::of(&second.told);
    let left = [heads[0], heads[2], heads[3], heads[5], later[0]];
    assert_eq!(rings.available(), left);
    for (number, head) in (0..).zip(left) {
        rings.answer(number, head.into());
    }
    call(&second.told);
    machine.settle();
    let answered: Vec<_> = std::iter::from_fn(|| machine.queue.take_used()).collect();
    assert_eq!(answered, left.map(|head| (head, 512)));
    assert!(!machine.fault.is_reported());
}

#[test]
fn memory_of_what_is_in_flight_is_the_next_backends_too() {
    let keeping = Manner { protocol: PROTOCOL | PROTOCOL_INFLIGHT, ..GOOD };
    let (mut machine, serving) = Machine::new(keeping);
    machine.activate(FEATURE_VERSION_1 | FEATURE_EVENT_IDX);
    machine.settle();
    let first = serving.join().unwrap().told;
    let identity = |told: &Told| rustix::fs::fstat(told.inflight.as_ref().unwrap()).unwrap().st_ino;
    // Such a backend has the driver's own ring.
    assert_eq!(first.ring[0], machine.queue.table());
    assert!(first.ring[2] < RAM_BYTES as u64);
    assert!(first.features & FEATURE_EVENT_IDX != 0);
    let kept = identity(&first);
    drop(first);
    machine.until(|machine| machine.gone.load(Ordering::SeqCst) == 1);
    // What it left in the used ring without a word is told of.
    assert!(machine.queue.interrupted());
    let ram = lock(&machine.device.frontend).ram.clone();
    ram.write_obj(7u16, GuestAddress(machine.queue.table() + 0xc002)).unwrap();
    let (socket, serving) = backend(keeping);
    machine.handover.give(socket);
    machine.settle();
    let second = serving.join().unwrap().told;
    assert_eq!((identity(&second), second.base), (kept, 7));
}

#[test]
fn reset_takes_the_ring_back_and_the_next_driver_begins_anew() {
    let (mut machine, serving) = Machine::new(GOOD);
    machine.requests(2);
    let worker = machine.activate(FEATURE_VERSION_1);
    machine.settle();
    let mut peer = serving.join().unwrap();
    let serving = std::thread::spawn(move || {
        let message = peer.read().unwrap();
        let number = message.0;
        peer.serve(message);
        while let Some(message) = peer.read() {
            if !peer.serve(message) {
                break;
            }
        }
        (number, peer)
    });
    drop(machine.events.remove_subscriber(worker).unwrap());
    machine.queue = DriverQueue::new(&lock(&machine.device.frontend).ram.clone(), 1, RING_SIZE);
    machine.activate(FEATURE_VERSION_1);
    machine.settle();
    let (number, peer) = serving.join().unwrap();
    assert_eq!(number, 11, "it is asked for the ring");
    assert!(Rings::of(&peer.told).available().is_empty(), "what was in flight is forgotten");
}

#[test]
fn backend_that_does_not_fit_or_breaks_the_rules_is_refused_with_a_sentence() {
    let nonsense = |header, bytes| Manner { nonsense: Some((1, header, bytes)), ..GOOD };
    for (manner, word) in [
        (Manner { features: FEATURES & !FEATURE_VERSION_1, ..GOOD }, "virtio 1"),
        (Manner { features: FEATURES & !FEATURE_PROTOCOL, ..GOOD }, "protocol features"),
        (Manner { protocol: PROTOCOL & !PROTOCOL_CONFIG, ..GOOD }, "CONFIG"),
        (Manner { refuses: Some(3), ..GOOD }, "refuses"),
        (Manner { silent: Some(1), ..GOOD }, "does not answer"),
        (Manner { silent: Some(24), ..GOOD }, "does not answer"),
        (nonsense([2, 5, 8], 8), "no sense"),
        (nonsense([1, 1, 8], 8), "no sense"),
        (nonsense([1, 5, 4], 4), "no sense"),
        (nonsense([1, 5, u32::MAX], 8), "no sense"),
        (nonsense([1, 5, MAX_BODY_BYTES as u32 + 1], 8), "no sense"),
        // It says how much comes, and then half of it.
        (nonsense([1, 5, 8], 4), "does not answer"),
        (Manner { nonsense: Some((24, [24, 5, 12], 12)), ..GOOD }, "refuses"),
    ] {
        let text = refused(block(false), manner);
        assert!(text.contains(word), "{manner:?}: {text}");
    }
    assert!(refused(block(true), GOOD).contains("read-only"));
    let (socket, other) = socket_pair();
    drop(other);
    let result = VhostUser::new(plan(block(false), socket, &Arc::default(), SHORT));
    assert!(result.err().unwrap().to_string().contains("closed"));
}

#[test]
fn settings_past_their_bounds_are_refused() {
    let net = |mac, mtu| Kind::Net { mac, mtu };
    for (kind, queues) in [
        (block(false), 0),
        (block(false), 9),
        (net([1, 0, 0, 0, 0, 0], 1500), 1),
        (net([0; 6], 1500), 1),
        (net([2, 0, 0, 0, 0, 1], 67), 1),
        (net([2, 0, 0, 0, 0, 1], 1500), 9),
        (Kind::Fs { tag: String::new() }, 1),
        (Kind::Fs { tag: "x".repeat(37) }, 1),
    ] {
        let text = format!("{kind:?} {queues}");
        assert!(kind.check(queues).is_err(), "{text}");
    }
}

#[test]
fn another_device_in_place_of_the_first_is_not_taken() {
    let (mut machine, serving) = Machine::new(GOOD);
    drop(serving);
    for (number, other) in (1u8..).zip([
        Manner { sectors: SECTORS + 1, ..GOOD },
        Manner { features: FEATURES & !FLUSH, ..GOOD },
        Manner { protocol: PROTOCOL | PROTOCOL_INFLIGHT, ..GOOD },
        Manner { refuses: Some(3), ..GOOD },
    ]) {
        let (socket, _serving) = backend(other);
        machine.handover.give(socket);
        machine.settle();
        // The first time, the connection of before ends, too.
        assert_eq!(machine.gone.load(Ordering::SeqCst), number + 1, "{other:?}");
    }
    let (socket, serving) = backend(GOOD);
    machine.handover.give(socket);
    machine.activate(FEATURE_VERSION_1);
    machine.settle();
    assert!(serving.join().unwrap().told.enabled);
}

#[test]
fn answers_that_were_not_asked_for_end_the_connection() {
    for (number, head) in [(0, 200), (0, u32::MAX), (40, 0)] {
        let (mut machine, serving) = Machine::new(GOOD);
        let heads = machine.requests(2);
        machine.activate(FEATURE_VERSION_1);
        machine.settle();
        let peer = serving.join().unwrap();
        Rings::of(&peer.told).answer(number, head);
        call(&peer.told);
        machine.until(|machine| machine.gone.load(Ordering::SeqCst) == 1);
        assert!(!machine.fault.is_reported(), "that was not the driver");
        // The next one gets all of it.
        let (socket, serving) = backend(GOOD);
        machine.handover.give(socket);
        machine.settle();
        assert_eq!(Rings::of(&serving.join().unwrap().told).available(), heads);
    }
}

#[test]
fn driver_that_breaks_the_ring_loses_its_device_and_not_the_backend() {
    for breaks in [
        (|queue: &mut DriverQueue| queue.set_available_index(RING_SIZE + 1)) as fn(&mut _),
        |queue: &mut DriverQueue| queue.offer_head(RING_SIZE),
        |queue: &mut DriverQueue| (0..2).for_each(|_| queue.offer_head(3)),
    ] {
        let (mut machine, serving) = Machine::new(GOOD);
        machine.activate(FEATURE_VERSION_1);
        machine.settle();
        let _peer = serving.join().unwrap();
        breaks(&mut machine.queue);
        machine.queue.kick();
        machine.settle();
        assert!(machine.fault.is_reported());
        assert_eq!(machine.gone.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn silent_backend_holds_a_reset_for_a_bounded_time() {
    let (mut machine, serving) = Machine::new(GOOD);
    lock(&machine.device.frontend).patience = SHORT;
    let worker = machine.activate(FEATURE_VERSION_1);
    machine.settle();
    let peer = serving.join().unwrap();
    let (socket, serving) = backend(GOOD);
    machine.handover.give(socket);
    machine.settle();
    drop(peer);
    let _silent = serving.join().unwrap();
    let start = std::time::Instant::now();
    drop(machine.events.remove_subscriber(worker).unwrap());
    assert!(start.elapsed() >= SHORT && start.elapsed() < LONG);
    let before = machine.gone.load(Ordering::SeqCst);
    machine.until(|machine| machine.gone.load(Ordering::SeqCst) == before + 1);
}

#[test]
fn network_and_file_system_have_their_configurations() {
    let manner = Manner { features: FEATURES | 1 << 15, protocol: PROTOCOL_REPLY_ACK, ..GOOD };
    let made = |kind| {
        let (socket, _serving) = backend(manner);
        VhostUser::new(plan(kind, socket, &Arc::default(), LONG)).unwrap().0
    };
    let net = made(Kind::Net { mac: [2, 0, 0, 0, 0, 9], mtu: 1400 });
    assert_eq!(net.config(), [2, 0, 0, 0, 0, 9, 0, 0, 1, 0, 0x78, 5]);
    assert_eq!((net.id(), net.queue_sizes().len()), (1, 2));
    // Merged buffers, address and MTU, but no flush.
    assert_eq!(net.features(), 1 << 15 | 1 << 3 | 1 << 5 | FEATURE_EVENT_IDX);
    let fs = made(Kind::Fs { tag: "user-data".into() });
    assert_eq!(&fs.config()[..10], b"user-data\0");
    assert_eq!((fs.config()[36..40].to_vec(), fs.queue_sizes().len()), (vec![1, 0, 0, 0], 2));
    assert_eq!(fs.id(), 26);
}

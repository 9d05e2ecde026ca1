//! Networks of several pairs of queues.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::devices::testing::BUFFERS;

const MQ_AND_CONTROL: u64 = 1 << 22 | 1 << 17;
/// Where commands and their answers lie.
const COMMAND: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 4096;

/// Of a ring: whether it was enabled, or not any more.
type Enabled = (u32, bool);

/// A backend that has so many pairs of queues, and tells which it is to serve.
fn backend_of_pairs(manner: Manner, pairs: u64) -> (OwnedFd, Receiver<Enabled>, JoinHandle<u64>) {
    let (theirs, ours) = socket_pair();
    rustix::io::ioctl_fionbio(&ours, false).unwrap();
    let mut peer = Peer { socket: ours, manner, told: Told::default() };
    let (tell, told) = channel();
    let serving = std::thread::spawn(move || {
        while let Some(message) = peer.read() {
            match message.0 {
                17 => peer.write([17, 5, 8], &pairs.to_le_bytes(), None),
                18 => {
                    let word = words(&message.2)[0];
                    let _ = tell.send((word as u32, word >> 32 == 1));
                    peer.serve(message);
                }
                _ => drop(peer.serve(message)),
            }
        }
        peer.told.features
    });
    (theirs, told, serving)
}

fn net(queues: u8, manner: Manner, pairs: u64) -> VhostUser {
    let (socket, _, _) = backend_of_pairs(manner, pairs);
    let kind = Kind::Net { mac: [2, 0, 0, 0, 0, 9], mtu: 1400 };
    VhostUser::new(Plan { queues, ..plan(kind, socket, &Arc::default(), LONG) }).unwrap().0
}

const MANNER: Manner =
    Manner { features: FEATURES | 1 << 22, protocol: PROTOCOL_MQ | PROTOCOL_REPLY_ACK, ..GOOD };

#[test]
fn network_has_as_many_pairs_as_are_wanted_and_the_backend_has() {
    let without = Manner { features: FEATURES, ..MANNER };
    let unspoken = Manner { protocol: PROTOCOL_REPLY_ACK, ..MANNER };
    for (queues, manner, has, pairs) in [
        (1, MANNER, 8, 1),
        (2, MANNER, 8, 2),
        (8, MANNER, 3, 3),
        (8, MANNER, u64::MAX, 8),
        (4, MANNER, 0, 1),
        (4, MANNER, 1, 1),
        (4, without, 8, 1),
        (4, unspoken, 8, 1),
    ] {
        let device = net(queues, manner, has);
        let several = if pairs > 1 { MQ_AND_CONTROL } else { 0 };
        assert_eq!(device.features() & MQ_AND_CONTROL, several, "{queues} of {has}");
        assert_eq!(device.config()[8..10], [pairs, 0], "{queues} of {has}");
        let queues = 2 * usize::from(pairs) + usize::from(pairs > 1);
        assert_eq!(device.queue_sizes().len(), queues);
    }
}

/// A network of two pairs with its driver.
struct Network {
    machine: NetMachine,
    told: Receiver<Enabled>,
}

struct NetMachine {
    device: VhostUser,
    handover: Handover,
    events: EventManager<Box<dyn Worker>>,
    ram: GuestRam,
    queues: Vec<DriverQueue>,
    fault: Fault,
}

impl Network {
    fn new(features: u64) -> (Self, JoinHandle<u64>) {
        let (socket, told, serving) = backend_of_pairs(MANNER, 2);
        let kind = Kind::Net { mac: [2, 0, 0, 0, 0, 9], mtu: 1400 };
        let plan = Plan { queues: 2, ..plan(kind, socket, &Arc::default(), LONG) };
        let ram = plan.ram.clone();
        let (mut device, handover, watcher) = VhostUser::new(plan).unwrap();
        let mut events = EventManager::<Box<dyn Worker>>::new().unwrap();
        events.add_subscriber(watcher);
        let sizes = device.queue_sizes().to_vec();
        let queues = (0..).zip(sizes).map(|(at, size)| DriverQueue::new(&ram, at, size));
        let queues = queues.collect::<Vec<_>>();
        let fault = Fault::new(Arc::default(), Interrupt::none());
        let activation = Activation {
            ram: ram.clone(),
            features,
            queues: queues.iter().map(|queue| Some(queue.device_half(false))).collect(),
            config_interrupt: Interrupt::none(),
            fault: fault.clone(),
        };
        let worker = device.activate(activation).unwrap();
        events.add_subscriber(worker);
        let machine = NetMachine { device, handover, events, ram, queues, fault };
        let mut network = Self { machine, told };
        network.settle();
        (network, serving)
    }

    fn settle(&mut self) {
        while self.machine.events.run_with_timeout(0).unwrap() > 0 {}
    }

    /// What the device answers to a command by a control queue.
    fn ask(&mut self, control: usize, command: &[u8]) -> u8 {
        let NetMachine { ram, queues, .. } = &mut self.machine;
        ram.write_slice(command, GuestAddress(COMMAND)).unwrap();
        ram.write_slice(&[0x77], GuestAddress(ANSWER)).unwrap();
        queues[control].offer(&[(COMMAND, command.len() as u32, 0), (ANSWER, 1, WRITE)]);
        queues[control].kick();
        self.settle();
        self.machine.ram.read_obj(GuestAddress(ANSWER)).unwrap()
    }

    fn told(&self) -> Vec<Enabled> {
        self.told.try_iter().collect()
    }
}

#[test]
fn backend_serves_the_pairs_that_the_driver_uses() {
    let features = FEATURE_VERSION_1 | MQ_AND_CONTROL;
    let (mut network, serving) = Network::new(features);
    assert_eq!(network.told(), [(0, true), (1, true), (2, false), (3, false)]);
    assert_eq!(network.ask(4, &[4, 0, 2, 0]), 0);
    assert_eq!(network.told(), [(2, true), (3, true)]);
    // As it is already.
    assert_eq!(network.ask(4, &[4, 0, 2, 0]), 0);
    for wrong in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 0, 2], &[4, 0, 1, 0, 0], &[1, 0, 2, 0]] {
        assert_eq!(network.ask(4, wrong), 1, "{wrong:?}");
    }
    assert_eq!(network.told(), []);
    assert_eq!(network.ask(4, &[4, 0, 1, 0]), 0);
    assert_eq!(network.told(), [(2, false), (3, false)]);
    assert!(!network.machine.fault.is_reported());
    // The next backend is told of what is used by then, also of what was asked for meanwhile.
    lock(&network.machine.device.frontend).disconnect();
    assert_eq!(network.ask(4, &[4, 0, 2, 0]), 0);
    let (socket, told, _serving) = backend_of_pairs(MANNER, 2);
    network.told = told;
    network.machine.handover.give(socket);
    network.settle();
    assert_eq!(network.told(), [(0, true), (1, true), (2, true), (3, true)]);
    // The control queue is no matter of a backend's; that there are several pairs, it has to know.
    assert_eq!(serving.join().unwrap() & MQ_AND_CONTROL, 1 << 22);
    // Nor does it get one that is another.
    lock(&network.machine.device.frontend).disconnect();
    let (socket, told, _serving) = backend_of_pairs(MANNER, 1);
    network.told = told;
    network.machine.handover.give(socket);
    network.settle();
    assert_eq!(network.told(), []);
}

#[test]
fn command_without_room_for_an_answer_breaks_the_network() {
    let (mut network, _serving) = Network::new(FEATURE_VERSION_1 | MQ_AND_CONTROL);
    network.machine.queues[4].offer(&[(COMMAND, 4, 0)]);
    network.machine.queues[4].kick();
    network.settle();
    assert!(network.machine.fault.is_reported());
    network.machine.queues[4].kick();
    network.settle();
}

#[test]
fn driver_that_knows_of_one_pair_has_that_alone() {
    let (mut network, _serving) = Network::new(FEATURE_VERSION_1 | 1 << 17);
    assert_eq!(network.told(), [(0, true), (1, true)]);
    assert_eq!(network.ask(2, &[4, 0, 1, 0]), 1);
    let (network, _serving) = Network::new(FEATURE_VERSION_1);
    assert_eq!(network.told(), [(0, true), (1, true)]);
}

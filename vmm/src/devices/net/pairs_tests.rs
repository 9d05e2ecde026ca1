use std::io;

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::on_socket::OnSocket;
use super::tests::{packet, refusing_vhost, send};
use super::*;
use crate::devices::testing::{BUFFERS, Bench, DriverQueue, WRITE, drain, ram};

/// Where commands and their answers lie.
const COMMAND: u64 = BUFFERS + (8 << 20);
const ANSWER: u64 = COMMAND + 4096;
/// What no device answers.
const UNANSWERED: u8 = 0x77;

fn sockets(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (0..count).map(|_| pair()).unzip()
}

/// The driver of a device that negotiates those of its features, with so many of its queues.
fn activate(device: &mut OnSocket, features: u64, queues: usize) -> Bench {
    let ram = ram();
    let sizes = device.queue_sizes().to_vec();
    let queues = (0..).zip(sizes).take(queues);
    let queues = queues.map(|(index, size)| DriverQueue::new(&ram, index, size)).collect();
    let features = features & device.features();
    Bench::activate_with(device, &ram, features, queues)
}

fn bench(pairs: usize) -> (Bench, Vec<OwnedFd>) {
    let (taps, networks) = sockets(pairs);
    let mut device = OnSocket::new(taps, 1500);
    (activate(&mut device, u64::MAX, 2 * pairs + 1), networks)
}

/// What the device answers to a command by a control queue.
fn ask(bench: &mut Bench, control: usize, command: &[u8]) -> u8 {
    bench.write(COMMAND, command);
    bench.write(ANSWER, &[UNANSWERED]);
    let chain = [(COMMAND, command.len() as u32, 0), (ANSWER, 1, WRITE)];
    let chain = if command.is_empty() { &chain[1..] } else { &chain };
    assert_eq!(bench.request(control, chain), Some(1));
    bench.read(ANSWER, 1)[0]
}

fn set_pairs(bench: &mut Bench, control: usize, pairs: u16) -> u8 {
    let [low, high] = pairs.to_le_bytes();
    ask(bench, control, &[4, 0, low, high])
}

/// Whether a packet from a network gets into the guest by a pair.
fn is_received(bench: &mut Bench, network: &OwnedFd, pair: usize) -> bool {
    bench.queues[2 * pair].offer(&[(BUFFERS, 2048, WRITE)]);
    bench.kick(2 * pair);
    // What came before, and was not looked at.
    while bench.queues[2 * pair].take_used().is_some() {}
    send(network, &packet(60));
    bench.settle();
    bench.queues[2 * pair].take_used().is_some()
}

/// Whether a packet of the guest's by a pair gets to a network.
fn is_sent(bench: &mut Bench, network: &OwnedFd, pair: usize) -> bool {
    let sent = packet(60);
    bench.write(BUFFERS, &sent);
    assert_eq!(bench.request(2 * pair + 1, &[(BUFFERS, sent.len() as u32, 0)]), Some(0));
    drain(network).0 == sent
}

#[test]
fn pairs_that_the_driver_uses_carry_packets_and_others_get_none() {
    let (mut bench, networks) = bench(3);
    for (used, answer) in [(1, None), (2, Some(0)), (3, Some(0)), (1, Some(0)), (3, Some(0))] {
        if let Some(answer) = answer {
            assert_eq!(set_pairs(&mut bench, 6, used), answer);
        }
        for (pair, network) in networks.iter().enumerate() {
            let is_used = pair < usize::from(used);
            assert_eq!(is_received(&mut bench, network, pair), is_used, "{pair} of {used}");
            // What the driver has put there before it turned the pair off is not lost.
            assert!(is_sent(&mut bench, network, pair), "{pair} of {used}");
        }
    }
    assert!(!bench.fault.is_reported());
}

#[test]
fn packets_that_wait_come_when_the_pair_is_used() {
    let (mut bench, networks) = bench(2);
    assert!(!is_received(&mut bench, &networks[1], 1));
    assert_eq!(set_pairs(&mut bench, 4, 2), 0);
    assert!(bench.queues[2].take_used().is_some());
}

#[test]
fn what_is_no_number_of_pairs_changes_nothing() {
    let (mut bench, networks) = bench(3);
    assert_eq!(set_pairs(&mut bench, 6, 2), 0);
    let wrong: [&[u8]; 12] = [
        &[4, 0, 0, 0],
        &[4, 0, 4, 0],
        &[4, 0, 0, 0x80],
        &[4, 0, 0xff, 0xff],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
        &[4, 0, 1, 0, 0, 0, 0, 0],
        &[4, 1, 1, 0],
        &[4, 2, 1, 0],
        &[0, 0, 1, 0],
        &[4],
        &[],
    ];
    for command in wrong {
        assert_eq!(ask(&mut bench, 6, command), 1, "{command:?}");
        for (pair, network) in networks.iter().enumerate() {
            assert_eq!(is_received(&mut bench, network, pair), pair < 2, "{command:?}");
        }
        drop(networks.iter().map(drain).collect::<Vec<_>>());
    }
    assert!(!bench.fault.is_reported());
}

#[test]
fn answer_is_one_byte_whatever_room_there_is_and_commands_may_be_in_pieces() {
    let (mut bench, _networks) = bench(2);
    bench.write(COMMAND, &[4, 0, 2, 0]);
    bench.write(ANSWER, &[UNANSWERED; 8]);
    let chain = [(COMMAND, 1, 0), (COMMAND + 1, 1, 0), (COMMAND + 2, 2, 0), (ANSWER, 8, WRITE)];
    assert_eq!(bench.request(4, &chain), Some(1));
    assert_eq!(bench.read(ANSWER, 8), [[0].as_slice(), &[UNANSWERED; 7]].concat());
    assert!(bench.queues[4].interrupted());
}

#[test]
fn control_chains_without_an_answer_break_the_device() {
    for chain in [
        &[(COMMAND, 4, 0)][..],
        &[(ANSWER, 1, WRITE), (COMMAND, 4, 0)],
        &[(COMMAND, 4, 0), (ANSWER, 0, WRITE)],
        &[(COMMAND, 4, 0), (1 << 45, 1, WRITE)],
        &[(1 << 45, 4, 0), (ANSWER, 1, WRITE)],
    ] {
        let (mut bench, networks) = bench(2);
        bench.write(COMMAND, &[4, 0, 2, 0]);
        bench.queues[4].offer(chain);
        bench.kick(4);
        assert!(bench.fault.is_reported(), "{chain:?}");
        // It serves nothing any more, without a stir.
        bench.kick(4);
        assert!(!is_received(&mut bench, &networks[0], 0));
    }
}

#[test]
fn driver_that_knows_of_no_pairs_has_its_control_queue_behind_the_first() {
    let (taps, networks) = sockets(3);
    let mut device = OnSocket::new(taps, 1500);
    let mut bench = activate(&mut device, !MQ, 7);
    for pairs in [1, 2] {
        assert_eq!(set_pairs(&mut bench, 2, pairs), 1);
    }
    assert!(is_received(&mut bench, &networks[0], 0));
    // Nor can one that has no such queue say anything.
    let mut bench = activate(&mut device, !CTRL_VQ, 7);
    assert!(is_received(&mut bench, &networks[0], 0));
    bench.kick(6);
    assert!(!bench.fault.is_reported());
}

#[test]
fn pairs_that_the_driver_left_alone_cannot_be_asked_for() {
    let (taps, _networks) = sockets(3);
    let mut device = OnSocket::new(taps, 1500);
    let ram = ram();
    let queues = (0..7).map(|index| DriverQueue::new(&ram, index, 16)).collect();
    // Of the third pair there is only half.
    let features = device.features();
    let mut bench = Bench::activate_without(&mut device, &ram, features, queues, &[5]);
    assert_eq!(set_pairs(&mut bench, 6, 3), 1);
    assert_eq!(set_pairs(&mut bench, 6, 2), 0);
}

#[test]
fn refused_queue_leaves_the_pairs_as_they_are() {
    let (taps, networks) = sockets(3);
    let refuse = |_: &OwnedFd, attached| match attached {
        true => Err(io::ErrorKind::PermissionDenied.into()),
        false => Ok(()),
    };
    let mut device = OnSocket::with_attachments(taps, 1500, refuse);
    let mut bench = activate(&mut device, u64::MAX, 7);
    assert_eq!(set_pairs(&mut bench, 6, 2), 1);
    assert_eq!(set_pairs(&mut bench, 6, 1), 0);
    assert!(is_received(&mut bench, &networks[0], 0));
    assert!(!is_received(&mut bench, &networks[1], 1));
}

#[test]
fn driver_that_changes_its_mind_without_end_is_refused_and_the_next_begins_with_one_pair() {
    let (taps, networks) = sockets(2);
    let mut device = OnSocket::new(taps, 1500);
    let mut bench = activate(&mut device, u64::MAX, 5);
    let answers = (0..40).map(|n| set_pairs(&mut bench, 4, 2 - n % 2)).collect::<Vec<_>>();
    let changes = answers.iter().filter(|answer| **answer == 0).count();
    // Those that are as it is count for nothing.
    assert!((16..40).contains(&changes) && answers.contains(&1), "{answers:?}");
    assert!(!bench.fault.is_reported());
    bench.reset();
    assert_eq!(device.taps.attached(), 1);
    let mut bench = activate(&mut device, u64::MAX, 5);
    assert!(is_received(&mut bench, &networks[0], 0));
    assert!(!is_received(&mut bench, &networks[1], 1));
}

#[test]
fn all_pairs_are_carried_by_the_worker_when_the_kernel_refuses() {
    let (taps, networks) = sockets(2);
    let vhosts = (0..2).map(|_| refusing_vhost(vhost::RING_FEATURES)).collect();
    let mut device = OnSocket::new(taps, 1500).with(vhosts);
    let mut bench = activate(&mut device, u64::MAX, 5);
    assert_eq!(set_pairs(&mut bench, 4, 2), 0);
    for (pair, network) in networks.iter().enumerate() {
        assert!(is_received(&mut bench, network, pair) && is_sent(&mut bench, network, pair));
    }
    bench.reset();
    assert_eq!(device.taps.attached(), 1);
}

#[test]
fn network_that_goes_away_is_survived_by_all_pairs() {
    let (mut bench, networks) = bench(2);
    assert_eq!(set_pairs(&mut bench, 4, 2), 0);
    drop(networks);
    bench.settle();
    for pair in 0..2 {
        bench.write(BUFFERS, &packet(10));
        assert_eq!(bench.request(2 * pair + 1, &[(BUFFERS, 22, 0)]), Some(0));
    }
    assert_eq!(set_pairs(&mut bench, 4, 1), 0);
    assert!(!bench.fault.is_reported());
}

#[test]
fn queues_are_numbered_as_the_specification_has_them() {
    assert_eq!(queue_sizes(1), [256, 256]);
    assert_eq!(queue_sizes(3), [256, 256, 256, 256, 256, 256, 16]);
    assert_eq!((pairs_features(1), pairs_features(2)), (0, 1 << 17 | 1 << 22));
    let config = config([2, 0, 0, 0, 0, 1], 0x0102, 1500);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 0, 0, 2, 1, 0xdc, 5]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// As many pairs are used as was asked for last, of those that can be.
    #[test]
    fn any_commands_leave_the_pairs_that_were_asked_for(
        commands in prop::collection::vec((0_u8..6, 0_u8..2, 0_u16..6), 0..12),
    ) {
        let (taps, networks) = sockets(3);
        let mut device = OnSocket::new(taps, 1500);
        let mut bench = activate(&mut device, u64::MAX, 7);
        let mut used = 1;
        for (class, command, pairs) in commands {
            let [low, high] = pairs.to_le_bytes();
            let right = class == 4 && command == 0 && (1..=3).contains(&pairs);
            let answer = ask(&mut bench, 6, &[class, command, low, high]);
            prop_assert_eq!(answer, u8::from(!right));
            used = if right { pairs.into() } else { used };
        }
        prop_assert_eq!(device.taps.attached(), used);
        for (pair, network) in networks.iter().enumerate() {
            prop_assert_eq!(is_received(&mut bench, network, pair), pair < used);
        }
    }
}

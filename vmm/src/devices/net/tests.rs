use std::fs::File;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::on_socket::OnSocket;
use super::*;
use crate::devices::testing::{BUFFERS, Bench, DriverQueue, RAM_BYTES, WRITE, drain, ram};

fn bench(features: u64, payload: usize) -> (Bench, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, network) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let ram = ram();
    let queues = (0..2).map(|index| DriverQueue::new(&ram, index, 64)).collect();
    let mut device = OnSocket { tap, payload };
    (Bench::activate_with(&mut device, &ram, features, queues), network)
}

fn packet(bytes: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend((0..bytes).map(|index| (index * 7) as u8));
    packet
}

fn send(network: &OwnedFd, packet: &[u8]) {
    assert_eq!(rustix::io::write(network, packet).unwrap(), packet.len());
}

#[test]
fn address_and_mtu_beyond_their_bounds_are_refused() {
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    let unicast = [2, 0, 0, 0, 0, 1];
    for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        assert!(matches!(Net::new(file(), mac, 1500), Err(NetError::Mac(_))));
    }
    assert!(matches!(Net::new(file(), unicast, 67), Err(NetError::Mtu(67))));
    assert!(matches!(Net::new(file(), unicast, 68), Err(NetError::Tap { .. })));
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(matches!(Net::new(null, unicast, 1500), Err(NetError::Tap { .. })));
}

#[test]
fn packet_of_the_guest_goes_out_whole() {
    let (mut bench, network) = bench(MRG_RXBUF, 1500);
    let sent = packet(1400);
    bench.write(BUFFERS, &sent);
    let chain = [(BUFFERS, 12, 0), (BUFFERS + 12, 600, 0), (BUFFERS + 612, 800, 0)];
    assert_eq!(bench.request(1, &chain), Some(0));
    assert_eq!(drain(&network).0, sent);
    assert!(!bench.fault.is_reported());
}

#[test]
fn packet_of_the_guest_beyond_the_limits_is_dropped() {
    let (mut bench, network) = bench(MRG_RXBUF, 1500);
    let longest = (HEADER_BYTES + ETHERNET_BYTES + MAX_JOINED_BYTES) as u32;
    assert_eq!(bench.request(1, &[(BUFFERS, longest + 1, 0)]), Some(0));
    assert_eq!(drain(&network), (vec![], false));
    assert!(!bench.fault.is_reported());
}

#[test]
fn packet_waits_until_the_guest_has_room() {
    let (mut bench, network) = bench(0, 1500);
    let first = packet(100);
    send(&network, &first);
    bench.settle();
    let head = bench.queues[0].offer(&[(BUFFERS, 2048, WRITE)]);
    bench.kick(0);
    assert_eq!(bench.queues[0].take_used(), Some((head, first.len() as u32)));
    let got = bench.read(BUFFERS, first.len());
    assert_eq!(got[10..12], [1, 0]);
    assert_eq!(got[12..], first[12..]);
    assert!(bench.queues[0].interrupted());
}

#[test]
fn packet_fills_as_many_buffers_as_it_needs() {
    let (mut bench, network) = bench(MRG_RXBUF | FEATURE_EVENT_IDX, 3000);
    let mut heads = Vec::new();
    for index in 0..8 {
        heads.push(bench.queues[0].offer(&[(BUFFERS + index * 4096, 1000, WRITE)]));
    }
    bench.kick(0);
    let sent = packet(2500);
    send(&network, &sent);
    bench.settle();
    let mut got = Vec::new();
    for (index, bytes) in [1000, 1000, 512].into_iter().enumerate() {
        assert_eq!(bench.queues[0].take_used(), Some((heads[index], bytes)));
        got.extend(bench.read(BUFFERS + index as u64 * 4096, bytes as usize));
    }
    assert_eq!(bench.queues[0].take_used(), None);
    assert_eq!(got[10..12], [3, 0]);
    assert_eq!(got[12..], sent[12..]);
    assert!(bench.queues[0].interrupted());
    // Those that are left are too few for the largest packet.
    send(&network, &packet(10));
    bench.queues[0].offer(&[(BUFFERS, 20, WRITE)]);
    bench.kick(0);
    assert_eq!(bench.queues[0].take_used(), Some((heads[3], 22)));
}

#[test]
fn burst_is_delivered_in_order_over_several_turns() {
    let (mut bench, network) = bench(MRG_RXBUF, 100);
    let (mut sent, mut arrived) = (0_u8, Vec::new());
    for _ in 0..8 {
        let mut addresses = std::collections::HashMap::new();
        for offset in 0..32 {
            let address = BUFFERS + offset * 4096;
            let head = bench.queues[0].offer(&[(address, 256, WRITE)]);
            addresses.insert(head, address);
        }
        for _ in 0..31 {
            let mut one = packet(20);
            one[12] = sent;
            sent += 1;
            send(&network, &one);
        }
        bench.kick(0);
        while let Some((head, bytes)) = bench.queues[0].take_used() {
            assert_eq!(bytes, 32);
            let address = addresses.remove(&head).unwrap_or(BUFFERS + 31 * 4096);
            arrived.push(bench.read(address + 12, 1)[0]);
        }
    }
    assert_eq!(arrived.len(), usize::from(sent));
    assert!(arrived.is_sorted());
    assert!(!bench.fault.is_reported());
}

#[test]
fn network_that_goes_away_is_survived() {
    let (mut bench, network) = bench(0, 1500);
    bench.queues[0].offer(&[(BUFFERS, 2048, WRITE)]);
    bench.kick(0);
    drop(network);
    bench.settle();
    bench.write(BUFFERS, &packet(10));
    assert_eq!(bench.request(1, &[(BUFFERS, 22, 0)]), Some(0));
    assert!(!bench.fault.is_reported());
}

#[test]
fn malformed_chains_break_the_device() {
    for (queue, chain) in [
        (1, (BUFFERS, 11, 0)),
        (1, (BUFFERS, 100, WRITE)),
        (1, (RAM_BYTES as u64, 100, 0)),
        (0, (BUFFERS, 12, WRITE)),
        (0, (BUFFERS, 100, 0)),
    ] {
        let (mut bench, _network) = bench(MRG_RXBUF, 1500);
        bench.queues[queue].offer(&[chain]);
        bench.kick(queue);
        assert!(bench.fault.is_reported(), "{chain:?}");
        bench.kick(0);
        bench.kick(1);
    }
}

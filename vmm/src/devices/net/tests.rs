use std::fs::File;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{GuestAddress, GuestMemory};

use super::on_socket::OnSocket;
use super::*;
use crate::devices::testing::{BUFFERS, Bench, DriverQueue, RAM_BYTES, WRITE, drain, ram};
use crate::memory::GuestRam;
use crate::virtio::ActiveQueue;
use crate::virtio::FEATURE_VERSION_1;

fn bench(features: u64, payload: usize) -> (Bench, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, network) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let ram = ram();
    let queues = (0..2).map(|index| DriverQueue::new(&ram, index, 64)).collect();
    let mut device = OnSocket::new(vec![tap], payload);
    (Bench::activate_with(&mut device, &ram, features, queues), network)
}

pub(super) fn packet(bytes: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend((0..bytes).map(|index| (index * 7) as u8));
    packet
}

pub(super) fn send(network: &OwnedFd, packet: &[u8]) {
    assert_eq!(rustix::io::write(network, packet).unwrap(), packet.len());
}

#[test]
fn address_and_mtu_beyond_their_bounds_are_refused() {
    let file = || vec![OwnedFd::from(tempfile::tempfile().unwrap())];
    let unicast = [2, 0, 0, 0, 0, 1];
    for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        assert!(matches!(Net::new(file(), mac, 1500, vec![]), Err(NetError::Mac(_))));
    }
    assert!(matches!(Net::new(file(), unicast, 67, vec![]), Err(NetError::Mtu(67))));
    assert!(matches!(Net::new(file(), unicast, 68, vec![]), Err(NetError::Tap { .. })));
    let null = vec![OwnedFd::from(File::open("/dev/null").unwrap())];
    assert!(matches!(Net::new(null, unicast, 1500, vec![]), Err(NetError::Tap { .. })));
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

/// vhost-net as a device has it, on a descriptor that refuses each of its requests.
pub(super) fn refusing_vhost(features: u64) -> VhostNet {
    let device = OwnedFd::from(File::open("/dev/null").unwrap());
    VhostNet::with_features(device, features).unwrap()
}

#[test]
fn descriptor_that_is_no_vhost_net_is_refused() {
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let error = VhostNet::new(null).unwrap_err();
    assert!(matches!(error, VhostError::Kernel { .. }), "{error}");
    assert!(error.to_string().contains("ask for the features of vhost-net"), "{error}");
}

#[test]
fn driver_is_offered_what_device_and_kernel_both_know() {
    let offered = CSUM | MAC | HOST_TSO4 | MRG_RXBUF | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX;
    // VIRTIO_F_ANY_LAYOUT and what only vhost has are not the device's to offer.
    let all = vhost::RING_FEATURES | 1 << 24 | 1 << 26 | 1 << 27;
    for (known, lost) in [
        (all, 0),
        (all & !MRG_RXBUF, MRG_RXBUF),
        (FEATURE_VERSION_1, MRG_RXBUF | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX),
    ] {
        assert_eq!(refusing_vhost(known).limit(offered), offered & !lost, "{known:#x}");
    }
    let device = OwnedFd::from(File::open("/dev/null").unwrap());
    let error = VhostNet::with_features(device, all & !FEATURE_VERSION_1).unwrap_err();
    assert!(matches!(error, VhostError::Old(_)), "{error}");
}

#[test]
fn packets_are_carried_by_the_worker_when_the_kernel_refuses() {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, network) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let ram = ram();
    let queues = (0..2).map(|index| DriverQueue::new(&ram, index, 64)).collect();
    let mut device = OnSocket::new(vec![tap], 1500);
    device = device.with(vec![refusing_vhost(vhost::RING_FEATURES)]);
    let mut bench = Bench::activate_with(&mut device, &ram, MRG_RXBUF, queues);
    let sent = packet(1400);
    bench.write(BUFFERS, &sent);
    assert_eq!(bench.request(1, &[(BUFFERS, sent.len() as u32, 0)]), Some(0));
    assert_eq!(drain(&network).0, sent);
    let head = bench.queues[0].offer(&[(BUFFERS, 2048, WRITE)]);
    bench.kick(0);
    send(&network, &sent);
    bench.settle();
    assert_eq!(bench.queues[0].take_used(), Some((head, sent.len() as u32)));
    assert!(bench.queues[0].interrupted() && !bench.fault.is_reported());
    // A broken queue is one of the worker's, whose kicks are taken all the same.
    bench.queues[1].offer(&[(BUFFERS, 4, 0)]);
    bench.kick(1);
    assert!(bench.fault.is_reported());
    bench.kick(1);
    bench.reset();
}

#[test]
fn ring_has_an_address_here_when_it_is_in_one_piece() {
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestMemoryMmap};
    const END: u64 = 0x10000;
    // Two pieces, one behind the other for the guest.
    let ranges = [(GuestAddress(0), END as usize), (GuestAddress(END), END as usize)];
    let ram: GuestRam = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let ring = |at: [u64; 3]| {
        let mut queue = Queue::new(16).unwrap();
        queue.set_size(16);
        queue.set_desc_table_address(Some(at[0] as u32), Some(0));
        queue.set_avail_ring_address(Some(at[1] as u32), Some(0));
        queue.set_used_ring_address(Some(at[2] as u32), Some(0));
        queue.set_ready(true);
        let kick = Arc::new(vmm_sys_util::eventfd::EventFd::new(0).unwrap());
        ActiveQueue::new(queue, ram.clone(), kick, crate::virtio::Interrupt::none())
    };
    // Of 16 entries: 256, 38 and 134 bytes. The second and the third are where one piece ends, and
    // the other.
    let at = [0x1000, END - 38, 2 * END - 136];
    let found = ring(at).host_addresses().unwrap();
    for (at, found) in at.into_iter().zip(found) {
        ram.write_obj(at ^ 0x5a5a, GuestAddress(at)).unwrap();
        let slice = ram.get_slice(GuestAddress(at), 8).unwrap();
        assert_eq!(slice.ptr_guard().as_ptr() as u64, found, "{at:#x}");
    }
    for wrong in [
        [END - 240, 0x2000, 0x3000],
        [0x1000, END - 36, 0x3000],
        [0x1000, 0x2000, END - 132],
        [2 * END - 240, 0x2000, 0x3000],
        [0x1000, 0x2000, 2 * END - 132],
    ] {
        assert!(ring(wrong).host_addresses().is_none(), "{wrong:x?}");
    }
}

#[test]
fn kernel_is_told_of_each_piece_of_memory() {
    let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(0x10_0000), 0x3000)];
    let ram: GuestRam = vm_memory::GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let table = vhost::memory_table(&ram);
    let here = |at: u64| ram.get_slice(GuestAddress(at), 1).unwrap().ptr_guard().as_ptr() as u64;
    let first = [0, 0x2000, here(0), 0];
    let second = [0x10_0000, 0x3000, here(0x10_0000), 0];
    assert_eq!(table, [&[2][..], &first, &second].concat());
}

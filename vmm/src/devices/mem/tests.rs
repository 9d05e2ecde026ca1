use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::testing::{BUFFERS, Bench, WRITE, ram};

const START: u64 = 32 << 20;

/// A device whose region is the upper half of a test's memory and more, and whose memory is 16 MiB.
fn device() -> Mem {
    Mem::new(Room { start: START, bytes: 1 << 30, present: 16 << 20 }, Discards::default())
}

fn request(kind: u16, address: u64, blocks: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// Type and state of the response.
fn ask(bench: &mut Bench, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
    bench.write(BUFFERS, &request(kind, address, blocks));
    let chain = [(BUFFERS, 24, 0), (BUFFERS + 64, 10, WRITE)];
    assert_eq!(bench.request(0, &chain), Some(10));
    let response = bench.read(BUFFERS + 64, RESPONSE_BYTES);
    let number = |at: usize| u16::from_le_bytes([response[at], response[at + 1]]);
    (number(0), number(8))
}

fn field(device: &Mem, offset: usize) -> u64 {
    let mut bytes = [0; 8];
    device.read_config(offset, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn driver_reads_what_there_is_and_what_it_has() {
    let mut device = device();
    let mut bench = Bench::activate(&mut device, &ram());
    let fields = [0, 16, 24, 32, 40, 48].map(|offset| field(&device, offset));
    assert_eq!(fields, [2 << 20, START, 1 << 30, 128 << 20, 0, 16 << 20]);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START, 3), (0, 0));
    assert_eq!(field(&device, SIZES + 8), 6 << 20);
    assert_eq!(field(&device, CONFIG_BYTES), 0);
    assert_eq!(field(&device, usize::MAX), 0);
    assert_eq!(ask(&mut bench, REQUEST_STATE, START, 3), (0, 0));
    assert_eq!(ask(&mut bench, REQUEST_STATE, START, 4), (0, 2));
    assert_eq!(ask(&mut bench, REQUEST_STATE, START + (6 << 20), 1), (0, 1));
}

#[test]
fn request_that_cannot_be_is_answered_and_the_device_goes_on() {
    let mut bench = Bench::activate(&mut device(), &ram());
    let (nack, error) = ((1, 0), (3, 0));
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START, 9), nack);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START + (16 << 20), 1), nack);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START + (128 << 20), 1), error);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, 0, 1), error);
    assert_eq!(ask(&mut bench, REQUEST_UNPLUG, START, 1), error);
    assert_eq!(ask(&mut bench, REQUEST_STATE, START, u16::MAX), error);
    assert_eq!(ask(&mut bench, 4, START, 1), error);
    assert!(!bench.fault.is_reported());
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START, 8), (0, 0));
}

#[test]
fn what_is_given_back_is_gone() {
    let ram = ram();
    for keeps in [false, true] {
        let room = Room { start: START, bytes: 1 << 30, present: 16 << 20 };
        let discards = Discards::default();
        let _hold = keeps.then(|| discards.hold());
        let mut bench = Bench::activate(&mut Mem::new(room, discards), &ram);
        ask(&mut bench, REQUEST_PLUG, START, 8);
        let second = GuestAddress(START + (2 << 20));
        ram.write_slice(b"kept", GuestAddress(START)).unwrap();
        ram.write_slice(b"gone", second).unwrap();
        assert_eq!(ask(&mut bench, REQUEST_UNPLUG, second.0, 1), (0, 0));
        let expected: &[u8; 4] = if keeps { b"gone" } else { &[0; 4] };
        assert_eq!(bench.read(second.0, 4), expected);
        assert_eq!(bench.read(START, 4), b"kept");
        assert_eq!(ask(&mut bench, REQUEST_UNPLUG_ALL, 0, 0), (0, 0));
        assert_eq!(bench.read(START, 4) == b"kept", keeps);
        assert_eq!(ask(&mut bench, REQUEST_STATE, START, 8), (0, 1));
    }
}

#[test]
fn chain_that_is_wrong_breaks_the_device() {
    for chain in [
        vec![(BUFFERS, 23, 0), (BUFFERS + 64, 10, WRITE)],
        vec![(BUFFERS, 24, 0), (BUFFERS + 64, 9, WRITE)],
        vec![(BUFFERS, 24, 0)],
        vec![(START << 8, 24, 0), (BUFFERS + 64, 10, WRITE)],
    ] {
        let mut bench = Bench::activate(&mut device(), &ram());
        assert_eq!(bench.request(0, &chain), None);
        assert!(bench.fault.is_reported());
    }
}

#[test]
fn more_requests_than_one_turn_takes_are_all_answered() {
    let mut bench = Bench::activate(&mut device(), &ram());
    bench.write(BUFFERS, &request(REQUEST_STATE, START, 1));
    for round in 0..3 {
        for _ in 0..32 {
            bench.queues[0].offer(&[(BUFFERS, 24, 0), (BUFFERS + 64, 10, WRITE)]);
        }
        bench.kick(0);
        for _ in 0..32 {
            assert!(bench.queues[0].take_used().is_some(), "round {round}");
        }
    }
}

#[test]
fn device_without_memory_asks_for_nothing() {
    let mut device =
        Mem::new(Room { start: START, bytes: 1 << 30, present: 0 }, Discards::default());
    let mut bench = Bench::activate(&mut device, &ram());
    assert_eq!([32, 40, 48].map(|offset| field(&device, offset)), [0; 3]);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START, 1), (3, 0));
    assert_eq!(ask(&mut bench, REQUEST_UNPLUG_ALL, 0, 0), (0, 0));
}

#[test]
fn driver_that_goes_on_looks_again_where_there_is_memory_for_it() {
    assert!(!device().config_is_as_saved());
    let without = Room { start: START, bytes: 1 << 30, present: 0 };
    assert!(Mem::new(without, Discards::default()).config_is_as_saved());
}

#[test]
fn driver_learns_of_memory_that_comes_and_goes() {
    let mut device = device();
    let demand = device.demand();
    let mut bench = Bench::activate(&mut device, &ram());
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START, 8), (0, 0));
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START + (16 << 20), 1), (1, 0));
    demand.extend(160 << 20);
    assert_eq!([32, 40, 48].map(|offset| field(&device, offset)), [256 << 20, 16 << 20, 16 << 20]);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START + (16 << 20), 1), (1, 0));
    demand.request(18 << 20);
    assert_eq!(field(&device, 48), 18 << 20);
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START + (16 << 20), 1), (0, 0));
    demand.request(4 << 20);
    assert_eq!((demand.plugged_bytes(), demand.requested_bytes()), (18 << 20, 4 << 20));
    assert_eq!(ask(&mut bench, REQUEST_UNPLUG, START, 7), (0, 0));
    assert_eq!(ask(&mut bench, REQUEST_PLUG, START, 1), (1, 0));
    assert_eq!(demand.plugged_bytes(), 4 << 20);
}

use std::sync::Arc;

use super::*;
use crate::devices::testing::{BUFFERS, Bench, DriverQueue, NEXT, RAM_BYTES, WRITE, ram};
use crate::virtio::queue::Position;

const PAGE: u64 = 4096;
const FREE: u64 = 32 << 20;

fn bench(discards: &Discards) -> Bench {
    Bench::activate(&mut Balloon::new(discards.clone()), &ram())
}

fn fill(bench: &Bench, pages: impl IntoIterator<Item = u64>) {
    pages.into_iter().for_each(|page| bench.write(FREE + page * PAGE, b"used"));
}

fn kept(bench: &Bench, page: u64) -> bool {
    bench.read(FREE + page * PAGE, 4) == b"used"
}

#[test]
fn nothing_is_asked_for() {
    let device = Balloon::new(Discards::default());
    let mut config = [0xff; 16];
    device.read_config(0, &mut config);
    assert_eq!(config, [0; 16]);
    assert_eq!(device.features() & 0x3f, FEATURE_REPORTING);
}

#[test]
fn what_is_reported_is_gone_and_nothing_else() {
    let mut bench = bench(&Discards::default());
    fill(&bench, 0..8);
    let chain =
        [(FREE + PAGE, 4096, WRITE), (FREE + 3 * PAGE, 8192, WRITE), (FREE + 6 * PAGE, 100, WRITE)];
    assert_eq!(bench.request(REPORTING, &chain), Some(0));
    assert!(bench.queues[REPORTING].interrupted());
    let left: Vec<bool> = (0..8).map(|page| kept(&bench, page)).collect();
    assert_eq!(left, [true, false, true, false, false, true, true, true]);
    // It is memory as before.
    fill(&bench, [1]);
    assert!(kept(&bench, 1) && !bench.fault.is_reported());
}

#[test]
fn what_functions_of_the_host_hold_stays_until_they_are_gone() {
    let discards = Discards::default();
    let mut bench = bench(&discards);
    fill(&bench, [0]);
    let hold = discards.hold();
    assert_eq!(bench.request(REPORTING, &[(FREE, 4096, WRITE)]), Some(0));
    assert!(kept(&bench, 0));
    drop(hold);
    assert_eq!(bench.request(REPORTING, &[(FREE, 4096, WRITE)]), Some(0));
    assert!(!kept(&bench, 0));
}

#[test]
fn chain_that_is_wrong_breaks_the_device_and_frees_nothing() {
    for chain in [
        vec![(FREE, 4096, 0)],
        vec![(FREE, 4096, WRITE), (RAM_BYTES as u64 - PAGE, 8192, WRITE)],
        vec![(FREE, 4096, WRITE), (u64::MAX - PAGE + 1, 4096, WRITE)],
        vec![(FREE, 4096, WRITE), (FREE << 8, 4096, WRITE)],
    ] {
        let mut bench = bench(&Discards::default());
        fill(&bench, [0]);
        assert_eq!(bench.request(REPORTING, &chain), None);
        assert!(bench.fault.is_reported() && kept(&bench, 0), "{chain:?}");
        // From then on, it does nothing.
        assert_eq!(bench.request(REPORTING, &[(FREE, 4096, WRITE)]), None);
        assert_eq!(bench.request(INFLATE, &[(BUFFERS, 4, 0)]), None);
        assert!(kept(&bench, 0));
    }
}

#[test]
fn chain_without_end_breaks_the_device() {
    let mut bench = bench(&Discards::default());
    let table = bench.queues[REPORTING].table();
    bench.queues[REPORTING].write_descriptor(table, 0, (FREE, 4096, WRITE | NEXT, 0));
    bench.queues[REPORTING].offer_head(0);
    bench.kick(REPORTING);
    assert!(bench.fault.is_reported());
}

#[test]
fn index_beyond_the_queue_breaks_the_device() {
    for queue in [INFLATE, DEFLATE, REPORTING] {
        let mut bench = bench(&Discards::default());
        bench.queues[queue].set_available_index(33);
        bench.kick(queue);
        assert!(bench.fault.is_reported(), "queue {queue}");
    }
}

#[test]
fn what_goes_into_a_balloon_is_given_back_unread() {
    let mut bench = bench(&Discards::default());
    // Numbers of pages, as a balloon's driver writes them, or anything at all.
    fill(&bench, [0]);
    bench.write(BUFFERS, &(FREE / PAGE).to_le_bytes());
    for queue in [INFLATE, DEFLATE] {
        for chain in [(BUFFERS, 4, 0), (FREE, 4096, WRITE), (u64::MAX, u32::MAX, 7)] {
            assert_eq!(bench.request(queue, &[chain]), Some(0), "queue {queue}: {chain:?}");
        }
    }
    assert!(kept(&bench, 0) && !bench.fault.is_reported());
    for round in 0..3 {
        for _ in 0..32 {
            bench.queues[INFLATE].offer(&[(BUFFERS, 4, 0)]);
        }
        bench.kick(INFLATE);
        for _ in 0..32 {
            assert!(bench.queues[INFLATE].take_used().is_some(), "round {round}");
        }
    }
}

#[test]
fn as_much_as_linux_reports_at_once_is_served() {
    let mut bench = bench(&Discards::default());
    fill(&bench, 0..64);
    let chain: Vec<_> = (0..32).map(|at| (FREE + 2 * at * PAGE, 4096, WRITE)).collect();
    assert_eq!(bench.request(REPORTING, &chain), Some(0));
    assert!((0..64).all(|page| kept(&bench, page) == (page % 2 == 1)));
}

#[test]
fn more_than_one_turn_gives_back_is_answered_when_all_is() {
    let mut bench = bench(&Discards::default());
    let ends = [0, (RAM_BYTES as u64 - FREE) / PAGE - 1];
    fill(&bench, ends);
    // All of it again and again, the half of it in one piece that is more than a turn's.
    let whole = (BUFFERS, (RAM_BYTES as u64 - BUFFERS) as u32, WRITE);
    let half = (FREE, (RAM_BYTES as u64 - FREE) as u32, WRITE);
    assert!(whole.1 as usize > MAX_WAKE_BYTES);
    assert_eq!(bench.request(REPORTING, &[half, whole, half]), Some(0));
    assert!(ends.iter().all(|page| !kept(&bench, *page)));
    assert_eq!(bench.request(REPORTING, &[(FREE, 0, WRITE)]), Some(0));
}

/// The worker's half of a queue that goes on from a position.
fn reports(driver: &DriverQueue, position: &Arc<Position>, ram: &GuestRam) -> Reports {
    Reports {
        queue: driver.device_half(true).starting_at(position.clone()),
        ram: ram.clone(),
        discards: Discards::default(),
        done: 0,
        warned: false,
    }
}

#[test]
fn chain_that_is_half_done_is_left_to_the_next_worker() {
    let (ram, position) = (ram(), Arc::new(Position::default()));
    let mut driver = DriverQueue::new(&ram, 0, 32);
    let head = driver.offer(&[(FREE, 32 << 20, WRITE), (BUFFERS, 4 << 20, WRITE)]);
    let mut first = reports(&driver, &position, &ram);
    assert!(first.serve().unwrap());
    drop(first);
    assert_eq!((position.get(), driver.take_used()), ((0, 0), None));
    let mut second = reports(&driver, &position, &ram);
    assert!(second.serve().unwrap());
    assert!(!second.serve().unwrap());
    drop(second);
    assert_eq!((position.get(), driver.take_used()), ((1, 1), Some((head, 0))));
}

#[test]
fn driver_that_reports_nothing_is_served_all_the_same() {
    let ram = ram();
    let queues = (0..3).map(|index| DriverQueue::new(&ram, index, 32)).collect();
    let mut device = Balloon::new(Discards::default());
    let mut bench = Bench::activate_with(&mut device, &ram, FEATURE_EVENT_IDX, queues);
    fill(&bench, [0]);
    assert_eq!(bench.request(REPORTING, &[(FREE, 4096, WRITE)]), None);
    assert_eq!(bench.request(DEFLATE, &[(BUFFERS, 4, 0)]), Some(0));
    assert!(kept(&bench, 0) && !bench.fault.is_reported());
    bench.reset();
}

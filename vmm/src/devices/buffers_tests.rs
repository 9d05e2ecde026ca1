use std::os::fd::AsFd;

use super::super::testing::{BUFFERS, DriverQueue, INDIRECT, NEXT, RAM_BYTES, WRITE, drain, ram};
use super::*;

fn chain_of(buffers: &[(u64, u32, u16)]) -> (GuestRam, Chain) {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, 0, 16);
    driver.offer(buffers);
    let chain = driver.device_half(false).pop().unwrap().unwrap();
    (ram, chain)
}

fn refusal(buffers: &[(u64, u32, u16)]) -> String {
    Buffers::of_chain(chain_of(buffers).1).unwrap_err().to_string()
}

#[test]
fn buffers_of_a_chain_are_split_by_direction() {
    let (_, chain) =
        chain_of(&[(BUFFERS, 10, 0), (BUFFERS + 100, 0, 0), (BUFFERS + 200, 20, WRITE)]);
    let (readable, writable) = Buffers::of_chain(chain).unwrap();
    assert_eq!((readable.len(), writable.len()), (10, 20));
    assert_eq!(readable.vectors(readable.span()), 1);
}

#[test]
fn buffer_outside_memory_is_refused() {
    let end = RAM_BYTES as u64;
    assert!(Buffers::of_chain(chain_of(&[(end - 1, 1, 0)]).1).is_ok());
    assert!(refusal(&[(end - 1, 2, 0)]).contains("not in guest memory"));
    assert!(refusal(&[(end, 1, WRITE)]).contains("not in guest memory"));
    assert!(refusal(&[(u64::MAX, 2, 0)]).contains("not in guest memory"));
}

#[test]
fn readable_after_writable_is_refused() {
    assert!(refusal(&[(BUFFERS, 1, WRITE), (BUFFERS, 1, 0)]).contains("after a writable"));
}

#[test]
fn direction_that_a_device_does_not_expect_is_refused() {
    assert!(Buffers::readable(chain_of(&[(BUFFERS, 1, WRITE)]).1).is_err());
    assert!(Buffers::writable(chain_of(&[(BUFFERS, 1, 0)]).1).is_err());
}

#[test]
fn chain_that_loops_is_refused() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, 0, 16);
    driver.write_descriptor(driver.table(), 0, (BUFFERS, 1, NEXT, 1));
    driver.write_descriptor(driver.table(), 1, (BUFFERS, 1, NEXT, 0));
    driver.offer_head(0);
    let chain = driver.device_half(false).pop().unwrap().unwrap();
    assert!(Buffers::of_chain(chain).unwrap_err().to_string().contains("loops"));
}

#[test]
fn chain_with_a_descriptor_past_its_table_is_refused() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, 0, 16);
    driver.write_descriptor(driver.table(), 0, (BUFFERS, 1, NEXT, 16));
    driver.offer_head(0);
    let chain = driver.device_half(false).pop().unwrap().unwrap();
    assert!(Buffers::of_chain(chain).is_err());
}

#[test]
fn indirect_chain_is_followed_and_a_broken_one_refused() {
    let ram = ram();
    for (table, accepted) in [(BUFFERS + 0x1000, true), (RAM_BYTES as u64, false)] {
        let mut driver = DriverQueue::new(&ram, 0, 16);
        if accepted {
            driver.write_descriptor(table, 0, (BUFFERS, 3, NEXT, 1));
            driver.write_descriptor(table, 1, (BUFFERS, 4, WRITE, 0));
        }
        driver.offer(&[(table, 32, INDIRECT)]);
        let chain = driver.device_half(false).pop().unwrap().unwrap();
        match Buffers::of_chain(chain) {
            Ok((readable, writable)) => assert_eq!((readable.len(), writable.len()), (3, 4)),
            Err(_) => assert!(!accepted),
        }
    }
}

#[test]
fn spans_cross_buffers_and_end_with_them() {
    let (ram, chain) = chain_of(&[(BUFFERS, 4, 0), (BUFFERS + 100, 4, 0), (BUFFERS + 200, 4, 0)]);
    let buffers = Buffers::readable(chain).unwrap();
    buffers.copy_from(&ram, 2, b"abcdefgh").unwrap();
    let mut copied = [0; 8];
    buffers.copy_to(&ram, 2, &mut copied).unwrap();
    assert_eq!(&copied, b"abcdefgh");
    assert!(buffers.copy_to(&ram, 5, &mut copied).is_err());
    assert!(buffers.copy_to(&ram, usize::MAX, &mut copied).is_err());

    let (ours, theirs) = super::super::testing::socket_pair();
    let sent = buffers.send(&ram, ours.as_fd(), Span { offset: 3, bytes: 6 }).unwrap();
    assert_eq!(sent, 6);
    assert_eq!(drain(&theirs), (b"bcdefg".to_vec(), false));
    assert_eq!(
        buffers.receive(&ram, ours.as_fd(), buffers.span()).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn more_buffers_than_a_call_takes_are_moved_by_several() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, 0, 256);
    let pieces: Vec<_> = (0..200).map(|index| (BUFFERS + index * 10, 3, 0)).collect();
    driver.offer(&pieces);
    let chain = driver.device_half(false).pop().unwrap().unwrap();
    let buffers = Buffers::readable(chain).unwrap();
    let data: Vec<u8> = (0..600).map(|index| index as u8).collect();
    buffers.copy_from(&ram, 0, &data).unwrap();
    let file = tempfile::tempfile().unwrap();
    let moved_all = |write: bool| {
        let (mut span, mut position) = (buffers.span(), 7);
        while span.bytes > 0 {
            let vectors = buffers.kept_vectors(&ram, span, MAX_VECTORS).unwrap();
            assert_eq!(vectors.count(), buffers.vectors(span).min(MAX_VECTORS));
            let moved = vectors.move_at(file.as_fd(), write, position).unwrap();
            assert_eq!(moved, vectors.bytes());
            span = Span { offset: span.offset + moved, bytes: span.bytes - moved };
            position += moved as u64;
        }
    };
    moved_all(true);
    buffers.copy_from(&ram, 0, &[0; 600]).unwrap();
    moved_all(false);
    let mut copied = vec![0; 600];
    buffers.copy_to(&ram, 0, &mut copied).unwrap();
    assert_eq!(copied, data);
    assert_eq!(buffers.fill_random(&ram, buffers.span()).unwrap(), 600);
}

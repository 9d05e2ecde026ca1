//! The VMM process against the real KVM, with guests of a few dozen bytes: how each of them ends,
//! what it sees of its platform, and what a wrong request gets. `/dev/kvm` has to be there; it
//! need not be fit for Linux.

mod client;
mod guests;

use std::fs::File;
use std::io::{Read, Seek};

use client::{Attachments, Vmm};
use guests::{POWER_OFF, Request, attach, file, kernel, out, request, start, tap, tap_queues};
use vial_vmm_api::{
    Action, Descriptor, DeviceConfig, DiskShape, Event, ExitReason, Failure, FailureKind,
    IMAGE_MAGIC, IMAGE_MAGIC_AT, MAX_LATE_DISKS, MAX_LATE_INTERFACES, MAX_PASSED_FUNCTIONS,
    PassedBy, Reply, VmState,
};

/// `mov eax, [address]; mov dx, 0x3f8; out dx, al; shr eax, 8; …` for all four bytes.
fn print_dword(address: u32) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(address.to_le_bytes()); // mov edi, address
    code.extend([0x8b, 0x07, 0x66, 0xba, 0xf8, 0x03]); // mov eax, [rdi]; mov dx, 0x3f8
    for _ in 0..4 {
        code.extend([0xee, 0xc1, 0xe8, 0x08]); // out dx, al; shr eax, 8
    }
    code
}

fn boot(vmm: &mut Vmm, request: Request) -> Result<Reply, vial_vmm_api::Failure> {
    vmm.ask(Action::Boot(Box::new(request.config)), &request.files.all())
}

/// Boots `code` and checks that both the event and the exit status tell `reason`.
fn ends(code: &[u8], reason: ExitReason) {
    let mut vmm = start();
    let report = boot(&mut vmm, request(kernel(code))).expect("boot");
    let Reply::Booted(report) = report else { panic!("{report:?}") };
    assert!(report.marks.is_sorted_by_key(|(_, at)| *at), "{report:?}");
    assert_eq!(vmm.event().0, Event::Exited(reason));
    assert_eq!(vmm.wait().code(), Some(reason.status().into()));
}

#[test]
fn guest_that_powers_off_ends_with_0() {
    ends(&out(POWER_OFF.0, POWER_OFF.1), ExitReason::PowerOff);
}

#[test]
fn guest_that_resets_is_told_apart() {
    ends(&out(0x602, 1), ExitReason::Reset);
}

#[test]
fn guest_that_panics_is_told_apart() {
    ends(&out(0x505, 1), ExitReason::Panic);
}

#[test]
fn guest_with_a_triple_fault_is_told_apart() {
    // lidt [0] of an empty table, then an undefined instruction.
    ends(&[0x0f, 0x01, 0x1c, 0x25, 0x20, 0x05, 0, 0, 0x0f, 0x0b], ExitReason::TripleFault);
}

/// Maps 2 MiB of the 32-bit hole, from a multiple of that on: the page tables map the first gibibyte, so by a table of their own at
/// 0xc000.
fn map_of_the_hole(start: u32) -> Vec<u8> {
    let entry = 0xc000 + (start - 0xc000_0000) / (2 << 20) * 8;
    let entries = [(0xa018, 0xc003), (entry, start | 0x83)];
    entries.into_iter().flat_map(|(address, entry)| store(address, entry)).collect()
}

/// `mov edi, address; mov eax, value; mov [rdi], rax`
fn store(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(address.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.extend([0x48, 0x89, 0x07]);
    code
}

#[test]
fn image_is_there_to_read_and_what_a_guest_writes_to_it_goes_nowhere() {
    const IMAGE: u32 = 0xf000_0000;
    let last = IMAGE + (2 << 20) - 8;
    let mut code = map_of_the_hole(IMAGE);
    for address in [IMAGE, last] {
        code.extend(print_dword(address));
        code.extend(store(address, 0x5c5c_5c5c));
        code.extend(print_dword(address));
    }
    code.extend(out(POWER_OFF.0, POWER_OFF.1));
    let mut image = vec![0; 2 << 20];
    image[..4].copy_from_slice(b"head");
    image[IMAGE_MAGIC_AT as usize..][..IMAGE_MAGIC.len()].copy_from_slice(&IMAGE_MAGIC);
    image[(2 << 20) - 8..].copy_from_slice(b"the tail");
    let mut file = file(&image);
    let mut console = tempfile::tempfile().unwrap();
    let mut request = request(kernel(&code));
    request.config.console = Some(request.files.add(console.try_clone().unwrap()));
    request.config.image = Some(request.files.add(file.try_clone().unwrap()));
    let mut vmm = start();
    boot(&mut vmm, request).expect("boot");
    assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
    let content = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert_eq!(content(&mut console), b"headheadthe the ");
    assert!(content(&mut file) == image, "the image has changed");
}

#[test]
fn console_and_configuration_space_show_what_was_configured() {
    let mut code = map_of_the_hole(0xe000_0000);
    code.extend(out(0x3f8, b'>'));
    for device in 0..4 {
        code.extend(print_dword(0xe000_0000 + (device << 15)));
    }
    code.extend(out(POWER_OFF.0, POWER_OFF.1));
    let mut console = tempfile::tempfile().unwrap();
    let mut request = request(kernel(&code));
    request.config.console = Some(request.files.add(console.try_clone().unwrap()));
    request.config.devices =
        vec![DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![] }, DeviceConfig::Rng];
    let mut vmm = start();
    boot(&mut vmm, request).expect("boot");
    assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
    let mut text = Vec::new();
    console.rewind().unwrap();
    console.read_to_end(&mut text).unwrap();
    let mut expected = vec![b'>'];
    for id in [0x0008_1b36u32, 0x1053_1af4, 0x1044_1af4, u32::MAX] {
        expected.extend(id.to_le_bytes());
    }
    assert_eq!(text, expected);
}

/// `jmp $`
const FOREVER: [u8; 2] = [0xeb, 0xfe];

#[test]
fn stop_ends_a_guest_that_never_would() {
    let mut vmm = start();
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Empty)));
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
    let again = boot(&mut vmm, request(kernel(&FOREVER))).unwrap_err();
    assert_eq!(again.kind, FailureKind::State);
    assert_eq!(vmm.ask(Action::Stop, &[]), Ok(Reply::Done));
    assert_eq!(vmm.wait().code(), Some(ExitReason::Stopped.status().into()));
}

#[test]
fn vm_ends_when_nobody_holds_its_socket() {
    let mut vmm = start();
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot");
    vmm.hang_up();
    assert_eq!(vmm.wait().code(), Some(ExitReason::Stopped.status().into()));
}

#[test]
fn wrong_request_is_refused_in_a_sentence_and_the_next_may_be_right() {
    type Spoil = fn(&mut Request);
    let cases: [(Spoil, &str); 8] = [
        (|r| r.config.memory_mib = 16, "16 MiB of memory"),
        (|r| r.config.vcpus = 0, "vCPUs"),
        (|r| r.config.kernel = r.files.add(file(b"#!/bin/sh\n")), "uncompressed 64-bit ELF"),
        (|r| r.config.kernel = r.files.add(file(b"")), "uncompressed 64-bit ELF"),
        (|r| r.config.image = Some(r.files.add(file(&vec![0; 4096]))), "vial-mkimage"),
        (|r| r.config.kvm = r.files.add(File::open("/dev/null").unwrap()), "/dev/kvm"),
        (|r| r.config.kernel = Descriptor(63), "missing or named twice"),
        (
            |r| r.config.devices = vec![DeviceConfig::Vsock { guest_cid: 2, host_ports: vec![] }],
            "reserved",
        ),
    ];
    let mut vmm = start();
    for (spoil, words) in cases {
        let mut request = request(kernel(&FOREVER));
        spoil(&mut request);
        let failure = boot(&mut vmm, request).unwrap_err();
        assert!(failure.message.contains(words), "{words}: {}", failure.message);
    }
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot after refusals");
}

/// Why functions are refused whose descriptors are those of plain files.
fn functions_refused(vmm: &mut Vmm, functions: Vec<Descriptor>) -> Failure {
    let mut refused = |way: fn(Descriptor) -> PassedBy| {
        let mut files = Attachments::default();
        let way = way(files.add(file(b"")));
        files.add(file(b""));
        let action = Action::AddFunctions { way, functions: functions.clone() };
        vmm.ask(action, &files.all()).unwrap_err()
    };
    let by_groups = refused(|container| PassedBy::Groups { container, groups: Vec::new() });
    let by_iommufd = refused(|iommufd| PassedBy::Iommufd { iommufd, address_space: 1 });
    assert_eq!(by_groups, by_iommufd);
    by_groups
}

#[test]
fn functions_that_cannot_be_added_are_refused_and_the_vm_runs_on() {
    let mut vmm = start();
    let failure = functions_refused(&mut vmm, vec![Descriptor(1)]);
    assert_eq!(failure.kind, FailureKind::State, "{failure:?}");
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot");
    let failure = functions_refused(&mut vmm, vec![Descriptor(1)]);
    assert!(failure.message.contains("hot_plug"), "{failure:?}");

    let mut vmm = start();
    let mut request = request(kernel(&FOREVER));
    request.config.hot_plug = true;
    boot(&mut vmm, request).expect("boot");
    let cases: [(Vec<Descriptor>, &str, FailureKind); 5] = [
        (vec![], "no function", FailureKind::Invalid),
        (vec![Descriptor(1); MAX_PASSED_FUNCTIONS + 1], "more than 16", FailureKind::Invalid),
        (vec![Descriptor(2)], "missing or named twice", FailureKind::Invalid),
        (vec![Descriptor(1); 2], "missing or named twice", FailureKind::Invalid),
        (vec![Descriptor(1)], "does not describe itself", FailureKind::Host),
    ];
    for (functions, words, kind) in cases {
        let failure = functions_refused(&mut vmm, functions);
        assert!(failure.message.contains(words) && failure.kind == kind, "{words}: {failure:?}");
    }
    let failure = vmm.ask(Action::RemoveFunctions { set: 0 }, &[]).unwrap_err();
    assert!(failure.message.contains("no set 0"), "{failure:?}");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
}

/// Asks for a disk of `file`.
fn add_disk(vmm: &mut Vmm, file: File, read_only: bool) -> Result<Reply, Failure> {
    let mut files = Attachments::default();
    let file = files.add(file);
    let (shape, ring) = (DiskShape::default(), None);
    let action = Action::AddDisk { file, read_only, serial: "late".into(), shape, ring };
    vmm.ask(action, &files.all())
}

#[test]
fn disks_come_to_a_vm_that_runs_and_go_and_wrong_ones_are_refused() {
    let disk = || file(&[7; 4096]);
    let mut vmm = start();
    let failure = add_disk(&mut vmm, disk(), false).unwrap_err();
    assert_eq!(failure.kind, FailureKind::State, "{failure:?}");
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot");
    let mut numbers = Vec::new();
    for round in 0..MAX_LATE_DISKS {
        let added = add_disk(&mut vmm, disk(), round % 2 == 0).expect("a disk");
        let Reply::DiskAdded { device } = added else { panic!("{added:?}") };
        assert!((1..=31).contains(&device) && !numbers.contains(&device), "{device}");
        numbers.push(device);
    }
    let failure = add_disk(&mut vmm, disk(), false).unwrap_err();
    assert!(failure.message.contains("more than 8 disks"), "{failure:?}");
    // A number is free again when its disk is gone.
    for device in [numbers[0], numbers[3]] {
        assert_eq!(vmm.ask(Action::RemoveDisk { device }, &[]), Ok(Reply::Done));
        let failure = vmm.ask(Action::RemoveDisk { device }, &[]).unwrap_err();
        assert!(failure.message.contains("no disk came"), "{failure:?}");
        assert_eq!(add_disk(&mut vmm, disk(), true), Ok(Reply::DiskAdded { device }));
    }
    assert_eq!(vmm.ask(Action::RemoveDisk { device: numbers[1] }, &[]), Ok(Reply::Done));
    // Those that it began with are not such disks.
    let failure = vmm.ask(Action::RemoveDisk { device: 0 }, &[]).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
    let failure = add_disk(&mut vmm, file(&[7; 511]), true).unwrap_err();
    assert!(failure.message.contains("less than one sector"), "{failure:?}");
    let failure = add_disk(&mut vmm, File::open("/dev/null").unwrap(), true).unwrap_err();
    assert!(failure.message.contains("character device"), "{failure:?}");
    let of_reading = File::open("/proc/self/exe").unwrap();
    let failure = add_disk(&mut vmm, of_reading, false).unwrap_err();
    assert!(failure.message.contains("not open for reading and writing"), "{failure:?}");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
}

/// Asks for an interface of `tap`.
fn add_interface(vmm: &mut Vmm, tap: File, mac: [u8; 6]) -> Result<Reply, Failure> {
    add_queues(vmm, vec![tap], mac)
}

/// Asks for one of the queues of a tap.
fn add_queues(vmm: &mut Vmm, taps: Vec<File>, mac: [u8; 6]) -> Result<Reply, Failure> {
    let mut files = Attachments::default();
    let taps = taps.into_iter().map(|tap| files.add(tap)).collect();
    vmm.ask(Action::AddInterface { taps, mac, mtu: 1500, vhosts: vec![] }, &files.all())
}

#[test]
fn interfaces_come_to_a_vm_that_runs_and_go_and_wrong_ones_are_refused() {
    let mac = |n: usize| [2, 0, 0, 0, 0, n as u8];
    let mut vmm = start();
    let failure = add_interface(&mut vmm, tap(), mac(0)).unwrap_err();
    assert_eq!(failure.kind, FailureKind::State, "{failure:?}");
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot");
    let mut numbers = Vec::new();
    for n in 0..MAX_LATE_INTERFACES {
        let added = add_interface(&mut vmm, tap(), mac(n)).expect("an interface");
        let Reply::InterfaceAdded { device } = added else { panic!("{added:?}") };
        assert!((1..=31).contains(&device) && !numbers.contains(&device), "{device}");
        numbers.push(device);
    }
    let failure = add_interface(&mut vmm, tap(), mac(9)).unwrap_err();
    assert!(failure.message.contains("more than 8 interfaces"), "{failure:?}");
    // What is a disk's to take is none of these.
    let failure = vmm.ask(Action::RemoveDisk { device: numbers[0] }, &[]).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
    for device in [numbers[0], numbers[5]] {
        assert_eq!(vmm.ask(Action::RemoveInterface { device }, &[]), Ok(Reply::Done));
        let failure = vmm.ask(Action::RemoveInterface { device }, &[]).unwrap_err();
        assert!(failure.message.contains("no interface came"), "{failure:?}");
        let again = add_interface(&mut vmm, tap(), mac(9));
        assert_eq!(again, Ok(Reply::InterfaceAdded { device }));
    }
    let device = numbers[1];
    assert_eq!(vmm.ask(Action::RemoveInterface { device }, &[]), Ok(Reply::Done));
    let failure = add_interface(&mut vmm, tap(), [1; 6]).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
    let failure = add_interface(&mut vmm, file(&[7; 512]), mac(9)).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
    // What is to carry its packets and is no vhost-net.
    let mut files = Attachments::default();
    let (taps, vhosts) = (vec![files.add(tap())], vec![files.add(file(&[7; 512]))]);
    let wrong = Action::AddInterface { taps, mac: mac(9), mtu: 1500, vhosts };
    let failure = vmm.ask(wrong, &files.all()).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
    assert!(failure.message.contains("vhost-net"), "{failure:?}");
    let wrong = Action::AddInterface {
        taps: vec![Descriptor(0)],
        mac: mac(9),
        mtu: 1500,
        vhosts: vec![Descriptor(0)],
    };
    let failure = vmm.ask(wrong, &files.all()).unwrap_err();
    assert!(failure.message.contains("named twice"), "{failure:?}");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
}

#[test]
fn queues_of_one_tap_make_an_interface_and_others_do_not() {
    let mac = [2, 0, 0, 0, 0, 1];
    let mut vmm = start();
    boot(&mut vmm, request(kernel(&FOREVER))).expect("boot");
    for count in [1, 2, 8] {
        let added = add_queues(&mut vmm, tap_queues(count), mac).expect("an interface");
        let Reply::InterfaceAdded { device } = added else { panic!("{added:?}") };
        assert_eq!(vmm.ask(Action::RemoveInterface { device }, &[]), Ok(Reply::Done));
    }
    let mut two_taps = tap_queues(2);
    two_taps[1] = tap_queues(2).remove(1);
    let both_attached = {
        let mut queues = tap_queues(2);
        let other = queues.remove(1);
        attach(&other, true);
        queues.push(other);
        queues
    };
    for (queues, word) in [
        (vec![], "0 queues"),
        (tap_queues(9), "9 queues"),
        (vec![tap(), tap()], "queues of one tap"),
        (two_taps, "queues of one tap"),
        (both_attached, "only the first is attached"),
        (tap_queues(2).split_off(1), "only the first is attached"),
    ] {
        let failure = add_queues(&mut vmm, queues, mac).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
        assert!(failure.message.contains(word), "{failure:?}");
    }
    // Of what carries packets as many as of queues.
    let mut files = Attachments::default();
    let taps = tap_queues(2).into_iter().map(|tap| files.add(tap)).collect();
    let vhosts = vec![files.add(file(&[7; 512]))];
    let wrong = Action::AddInterface { taps, mac, mtu: 1500, vhosts };
    let failure = vmm.ask(wrong, &files.all()).unwrap_err();
    assert!(failure.message.contains("2 queues of a tap and 1 of"), "{failure:?}");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
}

#[test]
fn packet_that_is_no_request_ends_the_process_with_1() {
    let mut vmm = start();
    vmm.send_raw(&[0xff; 32], &[]);
    assert_eq!(vmm.wait().code(), Some(1));
}

#[test]
fn most_vcpus_and_most_memory_boot() {
    let mut request = request(kernel(&out(POWER_OFF.0, POWER_OFF.1)));
    request.config.vcpus = 64;
    request.config.memory_mib = 64 << 10;
    let mut vmm = start();
    boot(&mut vmm, request).expect("boot");
    assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
}

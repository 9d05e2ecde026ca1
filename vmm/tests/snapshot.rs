//! Machines that are saved and go on elsewhere, on the real KVM.

mod client;
mod guests;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use client::{Attachments, Vmm};
use guests::{LOAD_ADDRESS, POWER_OFF, kernel, out, request, start};
use vial_vmm_api::{
    API_VERSION, Action, Descriptor, DeviceConfig, Event, ExitReason, Failure, FailureKind, Reply,
    RestoreConfig, TemplateConfig, VmSize, VmState,
};

/// Where the guest counts, and finds whether it should end behind that.
const COUNTER: u64 = 0x180_0000;
const END: u64 = COUNTER + 8;

/// Counts in a register and in memory until it finds that it should end, and reads an absent port
/// meanwhile. It powers off when both agree, and resets else.
fn counting() -> Vec<u8> {
    let mut code = vec![0xbf]; // mov edi, COUNTER
    code.extend((COUNTER as u32).to_le_bytes());
    code.extend([0x31, 0xdb]); // xor ebx, ebx
    code.extend([0x48, 0xff, 0xc3]); // again: inc rbx
    code.extend([0xb0, 0x00, 0xe4, 0x60, 0x3c, 0xff]); // mov al, 0; in al, 0x60; cmp al, 0xff
    code.extend([0x75, 0x12]); // jne reset
    code.extend([0x48, 0x89, 0x1f]); // mov [rdi], rbx
    code.extend([0x83, 0x7f, 0x08, 0x00, 0x74, 0xec]); // cmp dword [rdi + 8], 0; je again
    code.extend([0x48, 0x39, 0x1f, 0x75, 0x07]); // cmp [rdi], rbx; jne reset
    code.extend(out(POWER_OFF.0, POWER_OFF.1));
    code.extend(out(0x602, 1)); // reset:
    code
}

/// The most vCPUs that a machine goes on with.
const MAX_VCPUS: u8 = 4;

struct Saved {
    memory: File,
    state: File,
}

fn devices() -> Vec<DeviceConfig> {
    vec![
        DeviceConfig::Rng,
        DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![1] },
        DeviceConfig::Balloon,
        DeviceConfig::Memory,
    ]
}

fn boot_template(vmm: &mut Vmm, vcpus: u8) -> Result<Reply, Failure> {
    let mut request = request(kernel(&counting()));
    request.config.vcpus = vcpus;
    request.config.devices = devices();
    let template = TemplateConfig { machine: request.config, max_vcpus: MAX_VCPUS };
    vmm.ask(Action::BootTemplate(Box::new(template)), &request.files.all())
}

fn save(vmm: &mut Vmm) -> Result<Saved, Failure> {
    let (memory, state) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut files = Attachments::default();
    let action = Action::Save {
        memory: files.add(memory.try_clone().unwrap()),
        state: files.add(state.try_clone().unwrap()),
    };
    vmm.ask(action, &files.all()).map(|reply| {
        assert_eq!(reply, Reply::Done);
        Saved { memory, state }
    })
}

/// A machine that has counted for a moment, at rest.
fn saved(vcpus: u8) -> Saved {
    let mut vmm = start();
    boot_template(&mut vmm, vcpus).expect("boot");
    std::thread::sleep(Duration::from_millis(50));
    let saved = save(&mut vmm).expect("save");
    assert_eq!(vmm.event().0, Event::Exited(ExitReason::Stopped));
    assert_eq!(vmm.wait().code(), Some(ExitReason::Stopped.status().into()));
    saved
}

impl Saved {
    fn word(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, address).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Lets the guest end when it goes on, and fail when it begins anew.
    fn let_end(&self) {
        self.memory.write_all_at(&1u32.to_le_bytes(), END).unwrap();
        self.memory.write_all_at(&out(0x602, 1), LOAD_ADDRESS).unwrap();
    }

    fn state_bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.state.rewind().unwrap();
        self.state.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn restore(
        &self,
        vmm: &mut Vmm,
        change: impl FnOnce(&mut RestoreConfig),
    ) -> Result<Reply, Failure> {
        let mut files = Attachments::default();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let mut state = self.state.try_clone().unwrap();
        state.rewind().unwrap();
        let mut config = RestoreConfig {
            version: API_VERSION,
            kvm: files.add(kvm),
            memory: files.add(self.memory.try_clone().unwrap()),
            state: files.add(state),
            vcpus: 1,
            memory_mib: 32,
            devices: devices(),
            hot_plug: false,
            max_memory_mib: None,
        };
        change(&mut config);
        vmm.ask(Action::Restore(Box::new(config)), &files.all())
    }
}

#[test]
fn restored_guest_goes_on_where_it_was_as_often_as_it_is_restored() {
    let saved = saved(1);
    let counted = saved.word(COUNTER);
    assert!(counted > 0);
    let mut waiting = start();
    saved.restore(&mut waiting, |_| {}).expect("restore");
    assert_eq!(waiting.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
    // The machine that runs has this page for itself since it first wrote to it; so have others
    // from here on, with another content.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(saved.word(COUNTER), counted, "a machine writes to what it shares with others");
    saved.let_end();
    for _ in 0..2 {
        let mut vmm = start();
        let reply = saved.restore(&mut vmm, |_| {}).expect("restore");
        let Reply::Booted(report) = reply else { panic!("{reply:?}") };
        assert!(report.marks.is_sorted_by_key(|(_, at)| *at), "{report:?}");
        assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
    }
    assert_eq!(waiting.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
}

#[test]
fn machine_has_a_generation_and_takes_more_devices_when_it_is_restored() {
    let saved = saved(2);
    assert_ne!((saved.word(0xf_f000), saved.word(0xf_f008)), (0, 0));
    saved.let_end();
    let mut vmm = start();
    saved
        .restore(&mut vmm, |config| {
            config.vcpus = 2;
            config.devices.push(DeviceConfig::Rng);
        })
        .expect("restore");
    assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
}

#[test]
fn machine_goes_on_with_more_vcpus_and_memory_than_it_had() {
    let saved = saved(1);
    saved.let_end();
    for (vcpus, memory_mib) in [(MAX_VCPUS, 32), (1, 34), (2, 512)] {
        let mut vmm = start();
        let restored = saved.restore(&mut vmm, |config| {
            (config.vcpus, config.memory_mib) = (vcpus, memory_mib);
        });
        restored.expect("restore");
        assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
    }
}

/// The guest asks for nothing, so what it is asked to have it never takes.
#[test]
fn machine_that_runs_grows_within_its_bounds() {
    let saved = saved(1);
    let size = |vcpus, memory_mib| Ok(Reply::Size(VmSize { vcpus, memory_mib, plugged_mib: 32 }));
    let resize = |vcpus, memory_mib| Action::Resize { vcpus, memory_mib };
    let mut vmm = start();
    saved.restore(&mut vmm, |_| {}).expect("restore");
    let failure = vmm.ask(resize(1, 34), &[]).unwrap_err();
    assert!(failure.message.contains("keeps its size"), "{failure:?}");
    let mut vmm = start();
    let failure = vmm.ask(resize(1, 34), &[]).unwrap_err();
    assert_eq!(failure.kind, FailureKind::State, "{failure:?}");
    let restored = saved.restore(&mut vmm, |config| config.max_memory_mib = Some(2048));
    restored.expect("restore");
    assert_eq!(vmm.ask(Action::Size, &[]), size(1, 32));
    assert_eq!(vmm.ask(resize(1, 34), &[]), size(1, 34));
    assert_eq!(vmm.ask(resize(3, 1024), &[]), size(3, 1024));
    for (vcpus, memory_mib, words) in [
        (2, 1024, "3 to 4"),
        (MAX_VCPUS + 1, 1024, "3 to 4"),
        (3, 2050, "32 to 2048"),
        (3, 30, "32 to 2048"),
        (3, 33, "steps of 2"),
    ] {
        let failure = vmm.ask(resize(vcpus, memory_mib), &[]).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
        assert!(failure.message.contains(words), "{words}: {}", failure.message);
    }
    assert_eq!(vmm.ask(resize(MAX_VCPUS, 32), &[]), size(MAX_VCPUS, 32));
    assert_eq!(vmm.ask(resize(MAX_VCPUS, 2048), &[]), size(MAX_VCPUS, 2048));
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
}

#[test]
fn state_that_does_not_fit_is_refused_by_name_and_a_boot_may_follow() {
    let mut saved = saved(1);
    let good = saved.state_bytes();
    let mut vmm = start();
    type Change = fn(&mut RestoreConfig);
    let changes: [(Change, &str); 9] = [
        (|c| c.vcpus = 0, "give 1 to"),
        (|c| c.vcpus = MAX_VCPUS + 1, "1 to 4 vCPUs, and 5"),
        (|c| c.memory_mib = 33, "32 MiB of memory, and 33"),
        (|c| c.version += 1, "one release"),
        (|c| c.devices.truncate(1), "4 devices, and 1"),
        (|c| (c.memory_mib, c.devices[3]) = (64, DeviceConfig::Rng), "32 MiB of memory, and 64"),
        (|c| (c.max_memory_mib, c.hot_plug) = (Some(64), true), "grow later"),
        (|c| c.devices.reverse(), "the machine has"),
        (|c| c.memory = Descriptor(9), "missing or named twice"),
    ];
    for (change, words) in changes {
        let failure = saved.restore(&mut vmm, change).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
        assert!(failure.message.contains(words), "{words}: {}", failure.message);
    }
    for at in (0..good.len()).step_by(good.len() / 61) {
        for cut in [false, true] {
            let mut bytes = good.clone();
            if cut {
                bytes.truncate(at)
            } else {
                bytes[at] ^= 0x10
            }
            saved.state = tempfile::tempfile().unwrap();
            saved.state.write_all(&bytes).unwrap();
            let failure = saved.restore(&mut vmm, |_| {}).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Invalid, "{failure:?}");
            assert!(failure.message.contains("make it again"), "{at}: {}", failure.message);
        }
    }
    saved.state = tempfile::tempfile().unwrap();
    saved.state.write_all(&good).unwrap();
    saved.memory.set_len(16 << 20).unwrap();
    let failure = saved.restore(&mut vmm, |_| {}).unwrap_err();
    assert!(failure.message.contains("guest memory"), "{}", failure.message);
    let request = request(kernel(&out(POWER_OFF.0, POWER_OFF.1)));
    vmm.ask(Action::Boot(Box::new(request.config)), &request.files.all()).expect("boot");
    assert_eq!(vmm.event().0, Event::Exited(ExitReason::PowerOff));
}

#[test]
fn machine_that_cannot_be_saved_says_so_and_runs_on() {
    let mut vmm = start();
    assert_eq!(save(&mut vmm).err().map(|failure| failure.kind), Some(FailureKind::State));
    let mut plain = request(kernel(&counting()));
    plain.config.devices = devices();
    plain.config.devices.pop();
    vmm.ask(Action::Boot(Box::new(plain.config)), &plain.files.all()).expect("boot");
    let failure = save(&mut vmm).err().expect("a failure");
    assert!(failure.message.contains("as a template"), "{failure:?}");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));

    let mut vmm = start();
    let mut console = request(kernel(&counting()));
    console.config.console = Some(console.files.add(tempfile::tempfile().unwrap()));
    let template = TemplateConfig { machine: console.config, max_vcpus: 1 };
    let action = Action::BootTemplate(Box::new(template));
    let failure = vmm.ask(action, &console.files.all()).unwrap_err();
    assert!(failure.message.contains("console"), "{failure:?}");
    boot_template(&mut vmm, 1).expect("boot");
    // A connection that the guest, which has no driver, never takes.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut files = Attachments::default();
    let socket = files.add(theirs);
    vmm.ask(Action::VsockConnect { port: 1, socket }, &files.all()).expect("connect");
    let failure = save(&mut vmm).err().expect("a failure");
    assert_eq!(failure.kind, FailureKind::State, "{failure:?}");
    assert_eq!(vmm.ask(Action::Status, &[]), Ok(Reply::Status(VmState::Running)));
    drop(ours);
}

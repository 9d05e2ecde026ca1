//! Boots a kernel with its console on standard output: the shortest way to look at a guest.
//!
//!     boot VMM KERNEL [IMAGE [COMMAND_LINE [VCPUS [MEMORY_MIB [SHARED_DIR]]]]]

#[path = "../tests/client/mod.rs"]
mod client;

use std::fs::{File, OpenOptions};
use std::path::Path;

use vial_vmm_api::{API_VERSION, Action, DeviceConfig, Event, Placement, VmConfig};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize| arguments.get(index).filter(|text| !text.is_empty());
    let [vmm, kernel] = [0, 1].map(|index| argument(index).expect("boot VMM KERNEL …"));
    let mut files = client::Attachments::default();
    let open = |path: &str| File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").expect("/dev/kvm");
    let mut devices =
        vec![DeviceConfig::Vsock { guest_cid: 3, host_ports: vec![1024] }, DeviceConfig::Rng];
    if let Some(directory) = argument(6) {
        let root = files.add(open(directory));
        devices.push(DeviceConfig::Fs { tag: "vial".into(), root, proc_fd: None });
    }
    let config = VmConfig {
        version: API_VERSION,
        kvm: files.add(kvm),
        vcpus: argument(4).map_or(1, |text| text.parse().expect("VCPUS")),
        memory_mib: argument(5).map_or(128, |text| text.parse().expect("MEMORY_MIB")),
        kernel: files.add(open(kernel)),
        image: argument(2).map(|path| files.add(open(path))),
        command_line: argument(3).cloned().unwrap_or_else(|| "console=ttyS0 panic=-1".into()),
        console: Some(files.add(std::io::stdout().try_clone_to_owned())),
        devices,
        hot_plug: false,
        placement: Placement::default(),
        shared_memory: None,
    };
    let mut vmm = client::Vmm::start(Path::new(vmm));
    let report = vmm.ask(Action::Boot(Box::new(config)), &files.all());
    eprintln!("boot: {report:?}");
    if report.is_err() {
        return;
    }
    loop {
        match vmm.event() {
            (Event::Exited(reason), _) => break eprintln!("boot: {reason}"),
            (event, _) => eprintln!("boot: {event:?}"),
        }
    }
}

/// The standard output as a descriptor of one's own.
trait TryClone {
    fn try_clone_to_owned(&self) -> std::os::fd::OwnedFd;
}

impl TryClone for std::io::Stdout {
    fn try_clone_to_owned(&self) -> std::os::fd::OwnedFd {
        std::os::fd::AsFd::as_fd(self).try_clone_to_owned().expect("standard output")
    }
}

//! What the VMM is handed, and the request by which the VM comes to run.

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
};

use rustix::fs::{Mode, OFlags};
use vial_agent_protocol::{READY_PORT, SHARE_TAG, SOCKET_PORT};
use vial_vmm_api::{
    API_VERSION, Action, AddedFunctions, Descriptor, DeviceConfig, Placement, Reply, VmConfig,
};

use super::{
    Plan, Reach, functions, growth,
    start::{self, Saved, Started},
    vmm,
};
use crate::{
    config::Config,
    devices::handles::Handles,
    error::ServiceError,
    jail::descriptors,
    network::Tap,
    share::Share,
    size::Size,
    state_dir::StateDir,
    vhost_user::connect::Connected,
    vmm_client::{self, VmmClient},
    vmm_process::VmmProcess,
};

/// The guest's context id. Each VM has a vsock of its own, so all can have the same.
const GUEST_CID: u32 = 3;
/// How much of the console's end is shown with a failure.
const CONSOLE_TAIL_BYTES: u64 = 1024;

/// What the VMM is handed and exists before the sandbox does.
pub(super) struct Files {
    kvm: File,
    kernel: File,
    image: File,
}

/// All that the VMM is handed.
pub(super) struct Handed<'a> {
    pub(super) files: &'a Files,
    pub(super) console: Option<&'a File>,
    pub(super) share: &'a Share,
    pub(super) taps: Vec<Tap>,
    pub(super) passed: Option<Handles>,
    pub(super) backends: Option<Connected>,
    pub(super) hot_plug: bool,
    pub(super) placement: Placement,
}

impl Files {
    pub(super) fn open(config: &Config) -> Result<Self, ServiceError> {
        Ok(Self {
            kvm: open(
                Path::new("/dev/kvm"),
                true,
                "Vial needs hardware virtualisation: see `vial check`",
            )?,
            kernel: open(
                &config.kernel,
                false,
                "install the guest kernel there, or set `kernel` in the configuration",
            )?,
            image: open(
                &config.image,
                false,
                "install the guest image there, or set `image` in the configuration",
            )?,
        })
    }
}

fn open(path: &Path, device: bool, remedy: &'static str) -> Result<File, ServiceError> {
    let open = if device { descriptors::open_device } else { descriptors::open_file };
    open(path).map_err(|error| ServiceError::Open {
        path: path.display().to_string(),
        error,
        remedy,
    })
}

fn open_path(path: &Path) -> Result<OwnedFd, ServiceError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| ServiceError::Open {
        path: path.display().to_string(),
        error: error.into(),
        remedy: "see the shim's log",
    })
}

pub(super) fn open_console(dir: &StateDir) -> Result<File, ServiceError> {
    let path = dir.console();
    File::options().read(true).append(true).create(true).mode(0o600).open(&path).map_err(|error| {
        ServiceError::Open {
            path: path.display().to_string(),
            error,
            remedy: "set `debug_console = false`",
        }
    })
}

/// The end of what the guest wrote to its console, to go behind a failure.
pub(super) fn console_tail(console: Option<&File>) -> String {
    let Some(console) = console else { return String::new() };
    let length = console.metadata().map(|metadata| metadata.len()).unwrap_or_default();
    let from = length.saturating_sub(CONSOLE_TAIL_BYTES);
    let mut tail = vec![0; CONSOLE_TAIL_BYTES as usize];
    let bytes = console.read_at(&mut tail, from).unwrap_or_default();
    let text: String = String::from_utf8_lossy(&tail[..bytes])
        .chars()
        .filter(|c| !c.is_control() || *c == '\n')
        .collect();
    format!("; its console ends with:\n{}", text.trim_end())
}

/// The devices that a VM has whatever its pod is, in this order: entropy, vsock, the shared directory,
/// and what gives memory back, in all those `frees` holds for.
pub(crate) fn base_devices(
    root: Descriptor,
    own_descriptors: Descriptor,
    frees: bool,
) -> Vec<DeviceConfig> {
    let mut devices = vec![
        DeviceConfig::Rng,
        DeviceConfig::Vsock { guest_cid: GUEST_CID, host_ports: vec![READY_PORT, SOCKET_PORT] },
        DeviceConfig::Fs { tag: SHARE_TAG.into(), root, proc_fd: Some(own_descriptors) },
    ];
    devices.extend(frees.then_some(DeviceConfig::Balloon));
    devices
}

/// Where the VM has what not all VMs have.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) functions: Option<AddedFunctions>,
    /// The numbers of the devices that backends serve.
    pub(super) backends: Vec<u8>,
    /// How far it can grow.
    pub(super) reach: Reach,
}

/// Lets the VM run: from a template when there is one that fits, else its kernel boots.
pub(super) async fn boot(
    plan: &Plan,
    Handed { files, console, share, taps, passed, backends, hot_plug, placement }: Handed<'_>,
    process: &VmmProcess,
    client: &VmmClient,
) -> Result<(Started, Made), ServiceError> {
    let lost = |what: &'static str| {
        move |error| ServiceError::Open { path: what.into(), error, remedy: "see the shim's log" }
    };
    let root = match plan.config.jail {
        true => process.root().map_err(lost("the VMM's root"))?,
        false => open_path(&share.share)?,
    };
    let proc_fd = descriptors::process_descriptors(process.pid())
        .map_err(lost("the VMM's own descriptors"))?;
    let mut given = Given::default();
    // Memory that functions of the host write to, that backends share or that is in huge pages stays.
    // Of functions that come later the VMM takes care.
    let frees = passed.is_none() && backends.is_none() && placement.huge_pages.is_none();
    let mut devices = base_devices(given.add(&root), given.add(&proc_fd), frees);
    let base = devices.len();
    for Tap { queues, vhosts, mac, mtu } in &taps {
        devices.push(DeviceConfig::Net {
            taps: queues.iter().map(|queue| given.add(queue)).collect(),
            mac: *mac,
            mtu: *mtu,
            vhosts: vhosts.iter().map(|vhost| given.add(vhost)).collect(),
        });
    }
    if let Some(handles) = &passed {
        let (way, functions) = functions::hand(&mut given, handles);
        devices.push(DeviceConfig::Passthrough { way, functions });
    }
    let shared_memory = backends.as_ref().map(|connected| {
        devices.extend(connected.configs(plan.config.vcpus, |descriptor| given.add(descriptor)));
        given.add(&connected.memory)
    });
    let kvm = given.add(&files.kvm);
    let (template, mut missing) = start::find_template(plan, &devices, &placement);
    if let Some(template) = &template {
        // Those of the template come first.
        let mut devices = devices.clone();
        devices.insert(base, DeviceConfig::Memory);
        let memory_mib = template.grown_mib(plan.config.memory_mib);
        let saved = Saved {
            memory: given.add(&template.memory),
            state: given.add(&template.state),
            kvm,
            devices: &devices,
            memory_mib,
            hot_plug,
            max_memory_mib: growth::most_memory_mib(&plan.config).filter(|_| !hot_plug),
        };
        let max_memory_mib = saved.max_memory_mib;
        if start::restore(plan, template, saved, client, &given).await? {
            let new_devices = devices.len() > base + 1;
            let more_memory_mib = template.more_mib(memory_mib);
            let reach = match max_memory_mib {
                None if hot_plug => Reach::Fixed("since functions of the host can come to it"),
                None => Reach::Fixed("as the configuration has it"),
                Some(memory_mib) => Reach::UpTo {
                    base_mib: template.base_memory_mib(),
                    most: Size {
                        vcpus: plan.config.max_vcpus.min(template.max_vcpus()),
                        memory_mib,
                    },
                },
            };
            let made = Made { functions: None, backends: Vec::new(), reach };
            return Ok((Started::Restored { new_devices, more_memory_mib }, made));
        }
        missing = true;
    }
    let config = VmConfig {
        version: API_VERSION,
        kvm,
        vcpus: plan.config.vcpus,
        memory_mib: plan.config.memory_mib,
        kernel: given.add(&files.kernel),
        image: Some(given.add(&files.image)),
        command_line: plan.config.command_line(),
        console: console.map(|console| given.add(console)),
        devices,
        hot_plug,
        placement,
        shared_memory,
    };
    let action = Action::Boot(Box::new(config));
    let answer = client.request(action, &given.0).await;
    // The VMM alone holds them from here on: they go when it goes.
    drop(given);
    drop((taps, passed, backends));
    match answer {
        Ok(Reply::Booted(report)) => {
            start::mark_report(plan, report.marks);
            let reach = Reach::Fixed("having booted a kernel of its own");
            let made = Made { functions: report.functions, backends: report.backends, reach };
            Ok((Started::Booted { template_missing: missing }, made))
        }
        Ok(_) => Err(vmm("boot the VM")(vmm_client::VmmError::Answer)),
        // Why it ended is better known to whoever waits for the process.
        Err(vmm_client::VmmError::Closed) => std::future::pending().await,
        Err(error) => Err(vmm("boot the VM")(error)),
    }
}

/// Descriptors in the order in which a message names them.
#[derive(Default)]
pub(super) struct Given<'a>(pub(super) Vec<BorrowedFd<'a>>);

impl<'a> Given<'a> {
    pub(super) fn add(&mut self, file: &'a impl AsFd) -> Descriptor {
        // A VM has a handful of them, far below what a message can carry.
        let index = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        self.0.push(file.as_fd());
        Descriptor(index)
    }
}

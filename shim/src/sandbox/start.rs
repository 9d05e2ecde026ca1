//! How a VM comes to run besides by a boot, from a template, where on the host it does, and how its
//! agent is met either way.

use std::os::fd::OwnedFd;

use tokio::{net::UnixStream, sync::mpsc};
use vial_agent_protocol::{AGENT_PORT, READY_PORT, agent::AdoptRequest};
use vial_vmm_api::{
    API_VERSION, Action, Descriptor, DeviceConfig, FailureKind, Placement, Reply, RestoreConfig,
};

use super::{Given, Plan, vmm};
use crate::{
    agent::Agent,
    devices::pci::Sysfs,
    error::ServiceError,
    jail::cgroup::Cgroup,
    numa::{
        Mode,
        placed::{Placed, Subject},
    },
    size::Size,
    state_dir::{State, StateDir},
    template::{self, NoTemplate, Template, ahead},
    timeline::Timeline,
    vhost_user::reconnect::Reconnector,
    vmm_client::{self, VmmClient, VmmEvent},
};

/// How a VM came to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Started {
    /// Its kernel boots: because there is no template, though the pod could have gone on from one,
    /// or because it could not.
    Booted { template_missing: bool },
    /// It goes on from a template, with devices that the template had not, or without, and with
    /// more memory, in MiB.
    Restored { new_devices: bool, more_memory_mib: u32 },
}

pub(super) fn mark_report(plan: &Plan, marks: Vec<(String, u64)>) {
    for (name, at_ns) in marks {
        plan.timeline.mark_at(&format!("VMM: {name}"), at_ns);
    }
}

/// The template that the VM can go on from; without one, whether it is only missing.
pub(super) fn find_template(
    plan: &Plan,
    devices: &[DeviceConfig],
    placement: &Placement,
) -> (Option<Template>, bool) {
    // Others cannot be added to a machine while it is restored.
    let fits = |device: &DeviceConfig| {
        matches!(
            device,
            DeviceConfig::Rng
                | DeviceConfig::Vsock { .. }
                | DeviceConfig::Fs { .. }
                | DeviceConfig::Balloon
                | DeviceConfig::Net { .. }
        )
    };
    // What no pod of a template writes comes from where the first of them has read it.
    let own = match placement {
        _ if plan.numa.mode == Mode::Strict => Some("`strict`, and its pages are on any node"),
        Placement { huge_pages: Some(_), .. } => Some("huge pages"),
        Placement { nodes, .. } if nodes.len() > 1 => Some("several NUMA nodes"),
        _ => None,
    };
    let found = match (devices.iter().all(fits), own) {
        _ if !plan.template => Err(NoTemplate::Unwanted),
        (false, _) => Err(NoTemplate::Devices),
        (true, Some(what)) => Err(NoTemplate::Placed(what)),
        (true, None) => template::open(&plan.config),
    };
    match found {
        Ok(template) => {
            plan.timeline.mark(&format!("template found: {}", template.name));
            (Some(template), false)
        }
        Err(reason) => {
            if matches!(reason, NoTemplate::Stale { .. } | NoTemplate::Unreadable { .. }) {
                tracing::warn!("the VM boots cold: of the templates, {reason}");
            } else {
                tracing::info!("the VM boots cold: of the templates, {reason}");
            }
            (None, reason.is_for_want_of_one())
        }
    }
}

/// Prepares where the VM goes. The VMM's cgroup is bound by it before there is a VMM.
pub(super) fn place(
    plan: &Plan,
    dir: &StateDir,
    state: &State,
) -> Result<(Placed, Placement), ServiceError> {
    let sysfs = Sysfs::default();
    let node = |address| sysfs.node(address).map(|node| (address, node));
    let subject = Subject {
        wanted: plan.numa,
        size: Size { vcpus: plan.config.vcpus, memory_mib: plan.config.memory_mib },
        functions: state.devices.iter().filter_map(|record| node(record.address)).collect(),
        cgroup: state.jail.as_ref().map(|jail| Cgroup::new(&jail.cgroup)),
        dir: dir.clone(),
        state_directory: plan.config.state_directory.clone(),
    };
    Ok(Placed::new(subject, Some((plan.id.clone(), plan.claim.clone())))?)
}

/// Where the parts of a saved machine are among the descriptors that are given.
pub(super) struct Saved<'a> {
    pub(super) memory: Descriptor,
    pub(super) state: Descriptor,
    pub(super) kvm: Descriptor,
    pub(super) devices: &'a [DeviceConfig],
    pub(super) memory_mib: u32,
    pub(super) hot_plug: bool,
    pub(super) max_memory_mib: Option<u32>,
}

/// Lets the VM go on from a template. Returns whether it does: one that the VMM refuses is none.
pub(super) async fn restore(
    plan: &Plan,
    template: &Template,
    Saved { memory, state, kvm, devices, memory_mib, hot_plug, max_memory_mib }: Saved<'_>,
    client: &VmmClient,
    given: &Given<'_>,
) -> Result<bool, ServiceError> {
    let config = RestoreConfig {
        version: API_VERSION,
        kvm,
        memory,
        state,
        vcpus: plan.config.vcpus,
        memory_mib,
        devices: devices.to_vec(),
        hot_plug,
        max_memory_mib,
    };
    match client.request(Action::Restore(Box::new(config)), &given.0).await {
        Ok(Reply::Booted(report)) => {
            mark_report(plan, report.marks);
            tracing::info!("the VM goes on from the template {}", template.name);
            Ok(true)
        }
        Ok(_) => Err(vmm("restore the VM")(vmm_client::VmmError::Answer)),
        Err(vmm_client::VmmError::Refused(failure)) => {
            plan.timeline.mark("template refused");
            tracing::warn!(
                "the VM boots cold: the template {} is refused: {}; `vial template create` makes \
                 it anew",
                template.name,
                failure.message
            );
            // What the host refuses now, it may grant to the next one.
            if failure.kind == FailureKind::Invalid {
                ahead::discard(&plan.config, template);
            }
            Ok(false)
        }
        // Why it ended is better known to whoever waits for the process.
        Err(vmm_client::VmmError::Closed) => std::future::pending().await,
        Err(error) => Err(vmm("restore the VM")(error)),
    }
}

/// Waits until the agent can serve, and greets it. The connection by which it said so is returned,
/// too: its end is the agent's end.
pub(super) async fn meet_agent(
    plan: &Plan,
    started: Started,
    client: &VmmClient,
    events: (&mut mpsc::Receiver<VmmEvent>, &Reconnector),
) -> Result<(UnixStream, Agent), ServiceError> {
    let Plan { config, timeline, .. } = plan;
    let connect = || async { client.connect(AGENT_PORT).await.map_err(vmm("reach the agent")) };
    match started {
        Started::Booted { .. } => {
            let ready = wait_ready(events).await?;
            timeline.mark("guest ready");
            let agent = Agent::greet(connect().await?, config.boot_timeout, timeline).await?;
            timeline.mark("agent greeted");
            Ok((ready, agent))
        }
        Started::Restored { new_devices, more_memory_mib } => {
            // What the guest remembers of its boot was not this pod's.
            let forgotten = Timeline::default();
            let agent = Agent::greet(connect().await?, config.boot_timeout, &forgotten).await?;
            timeline.mark("agent greeted");
            let request = AdoptRequest {
                new_devices,
                vcpus: config.vcpus.into(),
                more_memory_mib,
                ..Default::default()
            };
            agent.adopt(request).await?;
            let ready = wait_ready(events).await?;
            timeline.mark("guest adopted");
            Ok((ready, agent))
        }
    }
}

/// Waits until the agent connects to the ready port.
async fn wait_ready(
    (events, reconnector): (&mut mpsc::Receiver<VmmEvent>, &Reconnector),
) -> Result<UnixStream, ServiceError> {
    loop {
        match events.recv().await {
            Some(VmmEvent::GuestConnected { port: READY_PORT, socket }) => {
                return ready_stream(socket).map_err(|error| ServiceError::Open {
                    path: "the guest's ready connection".into(),
                    error,
                    remedy: "see the shim's log",
                });
            }
            Some(VmmEvent::GuestConnected { port, .. }) => {
                tracing::warn!("the guest connected to port {port}, which nothing serves");
            }
            Some(VmmEvent::BackendGone(backend)) => reconnector.gone(backend),
            Some(VmmEvent::Exited(reason)) => tracing::warn!("{reason} before it was ready"),
            None => std::future::pending().await,
        }
    }
}

fn ready_stream(socket: OwnedFd) -> std::io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

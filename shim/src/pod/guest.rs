//! A container's part in the guest: what the agent is asked for, and what its failures mean.

use std::time::Duration;

use protobuf::MessageField;
use vial_agent_protocol::agent;

use super::{KILL_PATIENCE, NewContainer};
use crate::{
    bundles,
    container::Container,
    devices,
    disks::Wanted,
    error::ServiceError,
    pids::Joined,
    pod_files,
    process::{KILLED, Process},
    sandbox::{Plan, Sandbox},
    spec::{Spec, SpecError},
    stdio::Streams,
};

/// What a container wants beside what its spec alone says.
pub(super) struct Wants<'a> {
    /// Whose process ids it has, if not its own.
    pub(super) pids: Option<Joined>,
    /// Block devices of the host.
    pub(super) disks: &'a [Wanted],
    /// PCI functions of the host.
    pub(super) devices: &'a devices::wanted::Wanted,
}

/// Makes a container on the host and in the guest, or nothing of it.
pub(super) async fn make(
    plan: &Plan,
    sandbox: &Sandbox,
    new: &NewContainer,
    (mut bytes, spec): (Vec<u8>, &mut Spec),
    Wants { pids, disks, devices }: Wants<'_>,
) -> Result<Container, ServiceError> {
    if plan.files.is_some() {
        pod_files::substitute(spec, &mut bytes, &sandbox.dir.pod_files())
            .map_err(|error| SpecError::Parse { path: new.bundle.join("config.json"), error })?;
    }
    let shared_memory = spec.take_shared_memory();
    let made = async {
        if new.id != plan.id {
            bundles::remember(&sandbox.dir, &new.id, &new.bundle)?;
        }
        let mut served = sandbox.served.clone();
        served.extend(sandbox.give_disks(&new.id, disks).await?);
        let given_functions = sandbox.given_functions(devices, &plan.devices.addresses).await?;
        let mut shared =
            sandbox.share.add_container(&new.id, &new.bundle, &new.root_mounts, spec).await?;
        plan.timeline.mark(&format!("root mounted: {}", new.id));
        let (followed, sockets) =
            sandbox.sockets.prepare(&new.id, spec, &sandbox.share, &mut shared).await;
        let (streams, stdio) =
            Streams::open(&new.places, &sandbox.vmm, &sandbox.next_stream).await?;
        let mounts = shared.mounts.iter().map(|mount| agent::SharedMount {
            index: mount.index,
            path: mount.path.clone(),
            host_guards: mount.host_guards,
            copied: mount.copied.is_some(),
            sockets: mount.sockets,
            ..Default::default()
        });
        let request = agent::CreateContainerRequest {
            container_id: new.id.clone(),
            spec: bytes,
            root: shared.root,
            mounts: mounts.collect(),
            stdio: MessageField::some(stdio),
            shared_memory: shared_memory
                .into_iter()
                .map(|(index, bytes)| agent::SharedMemory { index, bytes, ..Default::default() })
                .collect(),
            pid_namespace: MessageField::from_option(pids.map(pid_namespace)),
            functions: sandbox.function_names().await,
            given_functions,
            served,
            sockets,
            ..Default::default()
        };
        sandbox.agent.create(&request).await?;
        let copied = shared.mounts.into_iter();
        let copied = copied.filter_map(|mount| Some((mount.index, mount.copied?)));
        sandbox.copies.follow(&new.id, copied.collect());
        sandbox.sockets.follow(followed);
        plan.timeline.mark(&format!("container created: {}", new.id));
        Ok(Process::init(new.places.clone(), streams))
    };
    match made.await {
        Ok(init) => Ok(Container::new(new.id.clone(), new.bundle.clone(), true, init)),
        Err(error) => {
            let error = explain(sandbox, error).await;
            sandbox.take_disks(&new.id).await;
            if let Err(leftover) = sandbox.share.remove_container(&new.id) {
                tracing::error!("cannot take back the mounts of {}: {leftover}", new.id);
            }
            bundles::forget(&sandbox.dir, &new.id);
            Err(error)
        }
    }
}

fn pid_namespace(joined: Joined) -> agent::PidNamespace {
    match joined {
        Joined::Pod => agent::PidNamespace { pod: true, ..Default::default() },
        Joined::Container(id) => agent::PidNamespace { container_id: id, ..Default::default() },
    }
}

pub(super) async fn start_init(
    plan: &Plan,
    sandbox: &Sandbox,
    id: &str,
) -> Result<(), ServiceError> {
    sandbox.agent.start(id).await?;
    plan.timeline.mark(&format!("container started: {id}"));
    write_timeline(plan, sandbox);
    Ok(())
}

pub(super) async fn start_exec(
    sandbox: &Sandbox,
    id: &str,
    process: &Process,
) -> Result<(), ServiceError> {
    let (streams, stdio) =
        Streams::open(&process.places, &sandbox.vmm, &sandbox.next_stream).await?;
    process.attach(streams);
    let request = agent::ExecProcessRequest {
        container_id: id.into(),
        exec_id: process.exec_id.clone(),
        process: process.spec.clone(),
        stdio: MessageField::some(stdio),
        functions: sandbox.function_names().await,
        ..Default::default()
    };
    Ok(sandbox.agent.exec(&request).await?)
}

/// The timeline is for people who look; a sandbox does not fail for it.
pub(super) fn write_timeline(plan: &Plan, sandbox: &Sandbox) {
    if let Err(error) = sandbox.dir.write_timeline(&plan.timeline.sorted()) {
        tracing::warn!("{error}");
    }
}

/// Waits for the agent to tell of a process's end.
pub(super) async fn wait(
    sandbox: &Sandbox,
    container: &Container,
    process: &Process,
) -> (u32, u64) {
    if !container.in_guest {
        return std::future::pending().await;
    }
    match sandbox.agent.wait(&container.id, &process.exec_id).await {
        Ok(ended) => ended,
        Err(error) => {
            // When the VM ends, its end is the reason that is told. It is known a moment later.
            let end = tokio::time::timeout(KILL_PATIENCE, sandbox.wait_end()).await;
            let why = end.unwrap_or_else(|_| error.to_string());
            tracing::error!("{} {} is lost: {why}", container.id, process.exec_id);
            (KILLED, 0)
        }
    }
}

/// Makes the agent forget a process or container. What it refuses is logged: the host's part goes
/// in any case, and the guest's goes with the VM.
pub(super) async fn forget(sandbox: &Sandbox, id: &str, exec_id: &str) {
    let forgotten = if exec_id.is_empty() {
        sandbox.agent.delete_container(id).await
    } else {
        sandbox.agent.delete_process(id, exec_id).await
    };
    if let Err(error) = forgotten {
        tracing::warn!("the guest did not forget {id} {exec_id}: {error}");
    }
}

/// A failed call to the agent of a VM that has just ended failed because of that.
pub(super) async fn explain(sandbox: &Sandbox, error: ServiceError) -> ServiceError {
    if error.code() != ttrpc::Code::UNAVAILABLE {
        return error;
    }
    match tokio::time::timeout(Duration::from_secs(1), sandbox.wait_end()).await {
        Ok(why) => ServiceError::VmEnded(why),
        Err(_) => error,
    }
}

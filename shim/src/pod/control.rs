//! What is done to containers that run: statistics, new limits, pausing, and telling of a want of
//! memory.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::{
    cgroups_v2::metrics::Metrics,
    events::task::{TaskOOM, TaskPaused, TaskResumed},
};
use vial_agent_protocol::MAX_SPEC_BYTES;

use super::{Pod, guest::explain};
use crate::{
    container::Container,
    error::ServiceError,
    metrics,
    numa::claim::Resources,
    sandbox::{Sandbox, Shortage},
};

/// The least time between two tellings of a want of memory, so that a guest cannot flood
/// containerd with them.
const OOM_PAUSE: Duration = Duration::from_millis(100);

impl Pod {
    /// What a container uses: as its cgroup in the guest counts it. For a pause container, what
    /// the VM costs the host.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn stats(&self, id: &str) -> Result<Metrics, ServiceError> {
        let container = self.container(id)?;
        let sandbox = self.sandbox().await?;
        if !container.in_guest {
            return Ok(metrics::of_vmm(sandbox.pid())?);
        }
        match sandbox.agent.stats(id).await {
            Ok(stats) => Ok(metrics::of_container(&stats)),
            Err(error) => Err(explain(&sandbox, error.into()).await),
        }
    }

    /// Changes a container's limits to those of an OCI `linux.resources` in JSON.
    ///
    /// # Errors
    /// [`ServiceError`]; nothing has changed then.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), ServiceError> {
        let (_, sandbox) = self.of_guest(id, "changed").await?;
        if resources.len() > MAX_SPEC_BYTES {
            let text = format!("the resources have more than {MAX_SPEC_BYTES} bytes");
            return Err(ServiceError::Invalid(text));
        }
        let asked: Resources = serde_json::from_slice(&resources).map_err(|error| {
            ServiceError::Invalid(format!("the resources are no OCI linux.resources: {error}"))
        })?;
        let _turn = sandbox.growth.turn().await;
        let before = sandbox.placed.update(id, &asked)?;
        let had = match sandbox.growth.claim(id, &asked, Shortage::Refused).await {
            Ok(had) => had,
            Err(error) => {
                if let Err(error) = sandbox.placed.put_back(id, before) {
                    tracing::warn!("the VM stays where the failed update wanted it: {error}");
                }
                return Err(explain(&sandbox, error.into()).await);
            }
        };
        match sandbox.agent.update(id, resources).await {
            Ok(()) => {
                sandbox.growth.settle().await;
                Ok(())
            }
            Err(error) => {
                sandbox.growth.put_back(id, had).await;
                if let Err(error) = sandbox.placed.put_back(id, before) {
                    tracing::warn!("the VM stays where the failed update wanted it: {error}");
                }
                Err(explain(&sandbox, error.into()).await)
            }
        }
    }

    /// Stops a container's processes where they are.
    ///
    /// # Errors
    /// [`ServiceError`]; they run on then.
    pub async fn pause(&self, id: &str) -> Result<(), ServiceError> {
        let (container, sandbox) = self.of_guest(id, "paused").await?;
        let asked = async { Ok(sandbox.agent.pause(id).await?) };
        let event = TaskPaused { container_id: id.into(), ..Default::default() };
        match container.init.pause_by(asked, self.events.publish(event)).await {
            Ok(()) => Ok(()),
            Err(error) => Err(explain(&sandbox, error).await),
        }
    }

    /// Lets a paused container's processes run on.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn resume(&self, id: &str) -> Result<(), ServiceError> {
        let (container, sandbox) = self.of_guest(id, "resumed").await?;
        let asked = async { Ok(sandbox.agent.resume(id).await?) };
        let event = TaskResumed { container_id: id.into(), ..Default::default() };
        match container.init.resume_by(asked, self.events.publish(event)).await {
            Ok(()) => Ok(()),
            Err(error) => Err(explain(&sandbox, error).await),
        }
    }

    /// A container that the guest has.
    async fn of_guest(
        &self,
        id: &str,
        action: &str,
    ) -> Result<(Arc<Container>, Arc<Sandbox>), ServiceError> {
        let container = self.container(id)?;
        if !container.in_guest {
            let text = format!("a pod's sandbox is its VM, which cannot be {action} by itself");
            return Err(ServiceError::Precondition(text));
        }
        Ok((container, self.sandbox().await?))
    }

    /// Tells containerd whenever the kernel has ended processes of a container for want of memory,
    /// until the container is gone.
    pub(super) async fn watch_oom(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        container: Arc<Container>,
    ) {
        loop {
            let known = container.oom_kills.load(Ordering::Relaxed);
            match sandbox.agent.wait_oom(&container.id, known).await {
                Ok(kills) if kills > known => self.tell_oom(&container, kills).await,
                // The container or the VM is gone, or counts nothing.
                _ => return,
            }
            tokio::time::sleep(OOM_PAUSE).await;
        }
    }

    /// Tells containerd once that `kills` processes of a container have ended for want of memory.
    pub(super) async fn tell_oom(&self, container: &Container, kills: u64) {
        if container.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills {
            tracing::warn!("{} ran out of memory ({kills} processes so far)", container.id);
            let event = TaskOOM { container_id: container.id.clone(), ..Default::default() };
            self.events.publish(event).await;
        }
    }
}

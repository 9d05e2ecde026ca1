//! CRI as a kubelet calls it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;

use super::grpc::{self, Refused};
use super::wire::*;

/// How long one call may take. The emulated host is slow; a hang is not slowness.
const PATIENCE: Duration = Duration::from_secs(180);

/// A CRI server.
#[derive(Debug, Clone)]
pub(crate) struct Cri {
    socket: PathBuf,
    deadline: Option<Duration>,
}

impl Cri {
    /// containerd's.
    pub(crate) fn new() -> Self {
        Self::at("/run/containerd/containerd.sock".as_ref())
    }

    /// That of a certain socket.
    pub(crate) fn at(socket: &Path) -> Self {
        Self { socket: socket.into(), deadline: None }
    }

    /// One whose requests the server gives up after that long.
    pub(crate) fn given_up_after(deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..Self::new() }
    }

    fn call<Answer: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Answer> {
        let method = format!("runtime.v1.RuntimeService/{method}");
        grpc::call(&self.socket, &method, request, (self.deadline, PATIENCE))
    }

    pub(crate) fn version(&self) -> Result<VersionResponse> {
        self.call("Version", &VersionRequest::default())
    }

    /// What each handler offers, by its name.
    pub(crate) fn handlers(&self) -> Result<BTreeMap<String, RuntimeHandlerFeatures>> {
        let answer: StatusResponse = self.call("Status", &Empty {})?;
        let handlers = answer.runtime_handlers.into_iter();
        Ok(handlers.map(|one| (one.name, one.features.unwrap_or_default())).collect())
    }

    /// Names of all images.
    pub(crate) fn images(&self) -> Result<Vec<String>> {
        let method = "runtime.v1.ImageService/ListImages";
        let answer: ListImagesResponse =
            grpc::call(&self.socket, method, &Empty {}, (self.deadline, PATIENCE))?;
        Ok(answer.images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    /// Starts a pod sandbox with a runtime handler, and returns its id.
    pub(crate) fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Result<String> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        Ok(self.call::<PodId>("RunPodSandbox", &request)?.pod_sandbox_id)
    }

    pub(crate) fn stop_pod(&self, id: &str) -> Result<()> {
        self.call("StopPodSandbox", &PodId { pod_sandbox_id: id.into() }).map(|Empty {}| ())
    }

    pub(crate) fn remove_pod(&self, id: &str) -> Result<()> {
        self.call("RemovePodSandbox", &PodId { pod_sandbox_id: id.into() }).map(|Empty {}| ())
    }

    pub(crate) fn pod_status(&self, id: &str) -> Result<PodSandboxStatus> {
        let answer: PodSandboxStatusResponse =
            self.call("PodSandboxStatus", &PodId { pod_sandbox_id: id.into() })?;
        answer.status.context("a pod without a status")
    }

    /// What else a pod's runtime tells of it.
    pub(crate) fn pod_info(&self, id: &str) -> Result<serde_json::Value> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", &request)?;
        let info = answer.info.get("info").context("a verbose status without info")?;
        serde_json::from_str(info).with_context(|| format!("{info:?} is no JSON"))
    }

    /// Ids of all pods.
    pub(crate) fn pods(&self) -> Result<Vec<String>> {
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", &Empty {})?;
        Ok(answer.items.into_iter().map(|pod| pod.id).collect())
    }

    pub(crate) fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        Ok(self.call::<ContainerId>("CreateContainer", &request)?.container_id)
    }

    /// Ids of a pod's containers.
    pub(crate) fn containers(&self, pod: &str) -> Result<Vec<String>> {
        let answer: ListContainersResponse = self.call("ListContainers", &Empty {})?;
        let of_pod = answer.containers.into_iter().filter(|one| one.pod_sandbox_id == pod);
        Ok(of_pod.map(|one| one.id).collect())
    }

    pub(crate) fn start(&self, id: &str) -> Result<()> {
        self.call("StartContainer", &ContainerId { container_id: id.into() }).map(|Empty {}| ())
    }

    /// Asks to end, and ends after that many seconds.
    pub(crate) fn stop(&self, id: &str, seconds: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: id.into(), timeout: seconds };
        self.call("StopContainer", &request).map(|Empty {}| ())
    }

    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        self.call("RemoveContainer", &ContainerId { container_id: id.into() }).map(|Empty {}| ())
    }

    pub(crate) fn status(&self, id: &str) -> Result<ContainerStatus> {
        let answer: ContainerStatusResponse =
            self.call("ContainerStatus", &ContainerId { container_id: id.into() })?;
        answer.status.context("a container without a status")
    }

    pub(crate) fn update(&self, id: &str, linux: LinuxContainerResources) -> Result<()> {
        let request =
            UpdateContainerResourcesRequest { container_id: id.into(), linux: Some(linux) };
        self.call("UpdateContainerResources", &request).map(|Empty {}| ())
    }

    /// Opens the container's log file anew, as after a rotation.
    pub(crate) fn reopen_log(&self, id: &str) -> Result<()> {
        self.call("ReopenContainerLog", &ContainerId { container_id: id.into() }).map(|Empty {}| ())
    }

    /// Runs a command to its end. `seconds` is its time limit, 0 none.
    pub(crate) fn exec_sync(
        &self,
        id: &str,
        words: &[&str],
        seconds: i64,
    ) -> Result<ExecSyncResponse> {
        let cmd = words.iter().map(|&word| word.into()).collect();
        self.call("ExecSync", &ExecSyncRequest { container_id: id.into(), cmd, timeout: seconds })
    }

    /// Where a command's streams will be served.
    pub(crate) fn exec_url(&self, request: &ExecRequest) -> Result<String> {
        Ok(self.call::<Streaming>("Exec", request)?.url)
    }

    /// Where a container's streams will be served.
    pub(crate) fn attach_url(&self, request: &AttachRequest) -> Result<String> {
        Ok(self.call::<Streaming>("Attach", request)?.url)
    }

    /// Where ports of a pod will be served.
    pub(crate) fn forward_url(&self, pod: &str, ports: &[i32]) -> Result<String> {
        let request = PortForwardRequest { pod_sandbox_id: pod.into(), port: ports.to_vec() };
        Ok(self.call::<Streaming>("PortForward", &request)?.url)
    }

    pub(crate) fn stats(&self, id: &str) -> Result<ContainerStats> {
        let answer: ContainerStatsResponse =
            self.call("ContainerStats", &ContainerId { container_id: id.into() })?;
        answer.stats.context("a container without statistics")
    }

    pub(crate) fn pod_stats(&self, id: &str) -> Result<PodSandboxStats> {
        let answer: PodSandboxStatsResponse =
            self.call("PodSandboxStats", &PodId { pod_sandbox_id: id.into() })?;
        answer.stats.context("a pod without statistics")
    }

    /// Statistics of all pods.
    pub(crate) fn all_pod_stats(&self) -> Result<Vec<PodSandboxStats>> {
        let answer: ListPodSandboxStatsResponse = self.call("ListPodSandboxStats", &Empty {})?;
        Ok(answer.stats)
    }
}

/// What the server refused a call with; an error when it did not refuse it.
pub(crate) fn refused<Answer: std::fmt::Debug>(called: Result<Answer>) -> Result<Refused> {
    match called {
        Ok(answer) => anyhow::bail!("{answer:?} where a refusal was due"),
        Err(error) => error.downcast::<Refused>(),
    }
}

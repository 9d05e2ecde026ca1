//! containerd's Sandbox API, for a runtime with `sandboxer = "shim"`: the pod is the VM, and
//! there is no container that stands for it.
//!
//! ```text
//! CreateSandbox  the plan, and the VM's boot begins
//! StartSandbox   answers when the agent does
//! StopSandbox    ends the VM, and every container with it
//! ShutdownSandbox ends the shim
//! ```

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    protobuf::MessageField,
    sandbox_api as api,
    sandbox_async::Sandbox as SandboxApi,
    ttrpc::{Result, asynchronous::TtrpcContext},
    types::platform::Platform,
};

use crate::{
    error::ServiceError, events::timestamp, metrics, plan::Place, pod::Pod, process::KILLED,
    request::whole,
};

/// CRI's names of a sandbox's states (`PodSandboxState`).
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// How and when the sandbox ended.
#[derive(Debug, Clone, Copy)]
struct End {
    status: u32,
    at: SystemTime,
}

#[derive(Default)]
struct Moments {
    created: Option<SystemTime>,
    ended: Option<End>,
    /// Whether containerd asked for the end.
    stopping: bool,
}

/// The sandbox service of one shim.
#[derive(Clone)]
pub struct SandboxService {
    pod: Arc<Pod>,
    place: Place,
    moments: Arc<Mutex<Moments>>,
}

type Context = TtrpcContext;

impl SandboxService {
    /// Answers for the sandbox of `pod`.
    pub fn new(pod: Arc<Pod>, place: Place) -> Self {
        Self { pod, place, moments: Arc::default() }
    }

    fn moments(&self) -> MutexGuard<'_, Moments> {
        self.moments.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn check(&self, id: &str) -> std::result::Result<(), ServiceError> {
        if id == self.place.id {
            return Ok(());
        }
        Err(ServiceError::NotFound { what: "sandbox", id: id.into() })
    }

    /// The end, told the same to everyone.
    fn ended(&self) -> End {
        let mut moments = self.moments();
        let status = if moments.stopping { 0 } else { KILLED };
        *moments.ended.get_or_insert_with(|| End { status, at: SystemTime::now() })
    }

    /// Waits for the end of a sandbox that was started.
    async fn end(&self) -> std::result::Result<End, ServiceError> {
        let sandbox = self.pod.sandbox().await?;
        sandbox.wait_end().await;
        Ok(self.ended())
    }
}

fn told<T>(call: &str, result: std::result::Result<T, ServiceError>) -> Result<T> {
    if let Err(error) = &result {
        tracing::error!("{call}: {error}");
    }
    Ok(result?)
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &Context,
        request: api::CreateSandboxRequest,
    ) -> Result<api::CreateSandboxResponse> {
        tracing::info!("create sandbox {}", request.sandbox_id);
        self.check(&request.sandbox_id)?;
        self.pod.mark_asked();
        let planned = self
            .place
            .plan_of_request(&request)
            .map_err(ServiceError::from)
            .and_then(|plan| self.pod.set_plan(Ok(plan)));
        told("create the sandbox", planned)?;
        let ahead = self.pod.clone();
        tokio::spawn(async move { ahead.start_ahead().await });
        Ok(api::CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &Context,
        request: api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse> {
        tracing::info!("start sandbox {}", request.sandbox_id);
        self.check(&request.sandbox_id)?;
        let pod = self.pod.clone();
        let start = async move { told("start the sandbox", pod.start_sandbox().await) };
        let sandbox = whole(start).await?;
        let created = *self.moments().created.get_or_insert_with(SystemTime::now);
        Ok(api::StartSandboxResponse {
            pid: sandbox.pid(),
            created_at: MessageField::some(timestamp(created)),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &Context,
        request: api::PlatformRequest,
    ) -> Result<api::PlatformResponse> {
        self.check(&request.sandbox_id)?;
        // As Go names them, of which there is one.
        let platform =
            Platform { os: "linux".into(), architecture: "amd64".into(), ..Default::default() };
        Ok(api::PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &Context,
        request: api::StopSandboxRequest,
    ) -> Result<api::StopSandboxResponse> {
        tracing::info!("stop sandbox {}", request.sandbox_id);
        self.check(&request.sandbox_id)?;
        self.moments().stopping = true;
        let pod = self.pod.clone();
        whole(async move { told("stop the sandbox", pod.stop_sandbox().await) }).await?;
        Ok(api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &Context,
        request: api::WaitSandboxRequest,
    ) -> Result<api::WaitSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let End { status, at } = self.end().await?;
        Ok(api::WaitSandboxResponse {
            exit_status: status,
            exited_at: MessageField::some(timestamp(at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &Context,
        request: api::SandboxStatusRequest,
    ) -> Result<api::SandboxStatusResponse> {
        self.check(&request.sandbox_id)?;
        let mut response = api::SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            state: NOT_READY.into(),
            created_at: MessageField::from_option(self.moments().created.map(timestamp)),
            ..Default::default()
        };
        // One that was never started is not ready, and no failure.
        let Ok(sandbox) = self.pod.sandbox().await else { return Ok(response) };
        response.pid = sandbox.pid();
        let end = sandbox.end();
        if request.verbose {
            // What reads it takes each value for JSON.
            let state = sandbox.dir.read_now().unwrap_or_default();
            let info = serde_json::json!({ "pid": sandbox.pid(), "end": end, "sandbox": state });
            response.info.insert("info".into(), info.to_string());
        }
        match end {
            None => response.state = READY.into(),
            Some(_) => response.exited_at = MessageField::some(timestamp(self.ended().at)),
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &Context,
        request: api::PingRequest,
    ) -> Result<api::PingResponse> {
        self.check(&request.sandbox_id)?;
        Ok(api::PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &Context,
        request: api::ShutdownSandboxRequest,
    ) -> Result<api::ShutdownSandboxResponse> {
        tracing::info!("shut down sandbox {}", request.sandbox_id);
        self.check(&request.sandbox_id)?;
        self.moments().stopping = true;
        let pod = self.pod.clone();
        whole(async move { told("shut the sandbox down", pod.shutdown(true).await) }).await?;
        Ok(api::ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &Context,
        request: api::SandboxMetricsRequest,
    ) -> Result<api::SandboxMetricsResponse> {
        self.check(&request.sandbox_id)?;
        let pid = self.pod.sandbox().await?.pid();
        let data = metrics::of_vmm(pid).and_then(|metrics| metrics::encode(&metrics));
        let data = told("read the statistics", data.map_err(ServiceError::from))?;
        let mut response = api::SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(data);
        Ok(response)
    }
}

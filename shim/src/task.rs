//! containerd's task API.
//!
//! Each call finds its container and process and lets [`Pod`] do the work; here are only the
//! conversions. What fails is mapped to a ttrpc code in [`crate::error`]. What changes something is done to its end, also when
//! nobody waits for it any more ([`crate::request`]).

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    protobuf::{EnumOrUnknown, MessageField},
    shim_async::Task,
    ttrpc::{Result, asynchronous::TtrpcContext},
    types::task::ProcessInfo,
};

use crate::{
    error::ServiceError,
    events::timestamp,
    life::{Exit, ProcessState},
    metrics,
    pod::{NewContainer, Pod},
    process::Process,
    request::{heard, whole},
    stdio::Places,
};

/// The task service of one shim.
#[derive(Clone)]
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// Answers for `pod`.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

type Context = TtrpcContext;

fn empty<E>(result: std::result::Result<(), ServiceError>) -> std::result::Result<api::Empty, E>
where
    E: From<ServiceError>,
{
    Ok(result.map(|()| api::Empty::default())?)
}

/// Logs a failure on its way to containerd, which only shows it to whoever asked.
fn logged<T>(
    call: &str,
    id: &str,
    result: std::result::Result<T, ServiceError>,
) -> std::result::Result<T, ServiceError> {
    if let Err(error) = &result {
        match error.code() {
            ttrpc::Code::NOT_FOUND | ttrpc::Code::UNIMPLEMENTED => {
                tracing::debug!("{call} {id}: {error}");
            }
            _ => tracing::error!("{call} {id}: {error}"),
        }
    }
    result
}

/// Does `work` to its end. Its failure is logged there, for nobody may hear of it.
async fn done<T: Send + 'static>(
    call: &'static str,
    id: &str,
    work: impl Future<Output = std::result::Result<T, ServiceError>> + Send + 'static,
) -> std::result::Result<T, ServiceError> {
    let id = id.to_owned();
    whole(async move { logged(call, &id, work.await) }).await
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &Context, request: api::StateRequest) -> Result<api::StateResponse> {
        let container = self.pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut response = api::StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.display().to_string(),
            pid: self.pod.pid().await,
            stdin: process.places.stdin.clone(),
            stdout: process.places.stdout.clone(),
            stderr: process.places.stderr.clone(),
            terminal: process.places.terminal,
            ..Default::default()
        };
        let status = match process.state() {
            ProcessState::Added | ProcessState::Created | ProcessState::Starting => {
                api::Status::CREATED
            }
            ProcessState::Running => api::Status::RUNNING,
            ProcessState::Pausing => api::Status::PAUSING,
            ProcessState::Paused => api::Status::PAUSED,
            ProcessState::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(timestamp(exit.at));
                api::Status::STOPPED
            }
            ProcessState::Deleted => api::Status::UNKNOWN,
        };
        response.status = EnumOrUnknown::new(status);
        Ok(response)
    }

    async fn create(
        &self,
        _: &Context,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        tracing::info!("create {}", request.id);
        let id = request.id.clone();
        let new = NewContainer {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            root_mounts: request.rootfs,
            places: Places {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
            checkpoint: request.checkpoint,
        };
        let (pod, taken_back) = (self.pod.clone(), self.pod.clone());
        let unheard = id.clone();
        let create = async move { logged("create", &id, pod.create(new).await) };
        let created = heard(create, |created| async move {
            if created.is_ok() {
                taken_back.take_back(&unheard).await;
            }
        });
        let pid = created.await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &Context, request: api::StartRequest) -> Result<api::StartResponse> {
        tracing::info!("start {} {}", request.id, request.exec_id);
        let (pod, id) = (self.pod.clone(), request.id.clone());
        let start = async move { pod.start(&request.id, &request.exec_id).await };
        let pid = done("start", &id, start).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(
        &self,
        _: &Context,
        request: api::DeleteRequest,
    ) -> Result<api::DeleteResponse> {
        tracing::info!("delete {} {}", request.id, request.exec_id);
        let pid = self.pod.pid().await;
        let (pod, id) = (self.pod.clone(), request.id.clone());
        let delete = async move { pod.delete(&request.id, &request.exec_id).await };
        let Exit { status, at } = done("delete", &id, delete).await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: status,
            exited_at: MessageField::some(timestamp(at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &Context, request: api::PidsRequest) -> Result<api::PidsResponse> {
        let pids = logged("pids", &request.id, self.pod.pids(&request.id).await)?;
        let processes =
            pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &Context, request: api::PauseRequest) -> Result<api::Empty> {
        tracing::info!("pause {}", request.id);
        let (pod, id) = (self.pod.clone(), request.id.clone());
        empty(done("pause", &request.id, async move { pod.pause(&id).await }).await)
    }

    async fn resume(&self, _: &Context, request: api::ResumeRequest) -> Result<api::Empty> {
        tracing::info!("resume {}", request.id);
        let (pod, id) = (self.pod.clone(), request.id.clone());
        empty(done("resume", &request.id, async move { pod.resume(&id).await }).await)
    }

    async fn checkpoint(&self, _: &Context, _: api::CheckpointTaskRequest) -> Result<api::Empty> {
        empty(Err(ServiceError::Unimplemented("a checkpoint of a container")))
    }

    async fn update(&self, _: &Context, request: api::UpdateTaskRequest) -> Result<api::Empty> {
        tracing::info!("update {}", request.id);
        let resources = request.resources.unwrap_or_default();
        if !resources.type_url.ends_with("/LinuxResources") {
            let text = format!("'{}' is no OCI LinuxResources", resources.type_url.escape_debug());
            return empty(Err(ServiceError::Invalid(text)));
        }
        let (pod, id) = (self.pod.clone(), request.id.clone());
        let update = async move { pod.update(&id, resources.value).await };
        empty(done("update", &request.id, update).await)
    }

    async fn stats(&self, _: &Context, request: api::StatsRequest) -> Result<api::StatsResponse> {
        let read = self.pod.stats(&request.id).await;
        let encoded = read.and_then(|metrics| Ok(metrics::encode(&metrics)?));
        let stats = logged("stats", &request.id, encoded)?;
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn kill(&self, _: &Context, request: api::KillRequest) -> Result<api::Empty> {
        tracing::info!("kill {} {} by {}", request.id, request.exec_id, request.signal);
        let (pod, id) = (self.pod.clone(), request.id.clone());
        let kill = async move {
            pod.kill(&request.id, &request.exec_id, request.signal, request.all).await
        };
        empty(done("kill", &id, kill).await)
    }

    async fn exec(&self, _: &Context, request: api::ExecProcessRequest) -> Result<api::Empty> {
        tracing::info!("exec {} {}", request.id, request.exec_id);
        let places = Places {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let spec = request.spec.into_option().unwrap_or_default().value;
        let exec = Process::exec(request.exec_id, places, spec);
        let (pod, id) = (self.pod.clone(), request.id.clone());
        empty(done("exec", &request.id, async move { pod.add_exec(&id, exec).await }).await)
    }

    async fn resize_pty(&self, _: &Context, request: api::ResizePtyRequest) -> Result<api::Empty> {
        let size = (request.width, request.height);
        let resized = self.pod.resize(&request.id, &request.exec_id, size).await;
        empty(logged("resize", &request.id, resized))
    }

    async fn close_io(&self, _: &Context, request: api::CloseIORequest) -> Result<api::Empty> {
        let process = self.pod.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(api::Empty::default())
    }

    async fn wait(&self, _: &Context, request: api::WaitRequest) -> Result<api::WaitResponse> {
        let process = self.pod.container(&request.id)?.process(&request.exec_id)?;
        let Exit { status, at } = process.wait().await;
        Ok(api::WaitResponse {
            exit_status: status,
            exited_at: MessageField::some(timestamp(at)),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &Context, _: api::ConnectRequest) -> Result<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod.pid().await,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &Context, request: api::ShutdownRequest) -> Result<api::Empty> {
        tracing::info!("shutdown {}", request.id);
        let pod = self.pod.clone();
        let shut_down = async move { pod.shutdown(request.now).await };
        empty(done("shutdown", &request.id, shut_down).await)
    }
}

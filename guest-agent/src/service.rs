//! The ttrpc face of the agent: conversions, and the one place where errors get their codes.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};
use vial_agent_protocol::agent::{
    AddFunctionsResponse, AddSocketRequest, AdoptRequest, ChangeNetworkRequest,
    ConfigureNetworkRequest, ConfigurePodRequest, ContainerRequest, CreateContainerRequest,
    CreateContainerResponse, Empty, ExecProcessRequest, FunctionName, FunctionsRequest,
    HelloRequest, HelloResponse, JoinSocketRequest, KillProcessRequest, ListPidsResponse,
    Mark as WireMark, ProcessRequest, RemoveSocketRequest, RenewCopyRequest, ResizeRequest,
    ResizeTerminalRequest, StartResponse, StatsResponse, Stdio, UpdateContainerRequest,
    WaitOomRequest, WaitOomResponse, WaitProcessResponse,
};
use vial_agent_protocol::{PROTOCOL_VERSION, agent_ttrpc};

use crate::adopt::Adoption;
use crate::cgroup::CgroupError;
use crate::container::{ContainerError, Containers, Create, Exec, PidNamespace};
use crate::copies::CopyError;
use crate::devices::DeviceError;
use crate::functions;
use crate::launch::LaunchError;
use crate::marks::{Mark, now_ns};
use crate::network;
use crate::pod;
use crate::reaper::ExitStatus;
use crate::shutdown::Shutdown;
use crate::sockets::SocketError;
use crate::spec::environment::Names;
use crate::stdio::{StdioError, StdioIds};

type Answer<T> = ttrpc::Result<T>;

/// What answers the shim.
pub(crate) struct AgentService {
    pub(crate) containers: Containers,
    pub(crate) marks: Vec<Mark>,
    pub(crate) shutdown: Shutdown,
    pub(crate) adoption: Arc<Adoption>,
}

/// The code that the shim, and through it containerd, tells errors apart by.
fn code(error: &ContainerError) -> Code {
    use ContainerError as E;
    match error {
        E::NoContainer(_) | E::NoExec { .. } | E::NoCopy { .. } | E::Finished => Code::NOT_FOUND,
        E::Socket(SocketError::Nobody(_)) => Code::NOT_FOUND,
        E::Exists(_) | E::ExecExists { .. } => Code::ALREADY_EXISTS,
        E::TooMany | E::TooManyExecs => Code::RESOURCE_EXHAUSTED,
        E::Id(_)
        | E::SpecSize(_)
        | E::Signal(_)
        | E::AllOfExec
        | E::Size { .. }
        | E::Spec(_)
        | E::Share(_)
        | E::Workdir(_)
        | E::Copy(CopyError::Name(_))
        | E::Device(DeviceError::TooMany(_))
        | E::Launch(LaunchError::Executable(_))
        | E::Stdio(StdioError::TerminalStderr | StdioError::Twice(_)) => Code::INVALID_ARGUMENT,
        E::Pod(error) if error.is_of_the_request() => Code::INVALID_ARGUMENT,
        E::Served(error) if error.is_of_the_request() => Code::INVALID_ARGUMENT,
        E::Function(error) if error.is_of_the_request() => Code::INVALID_ARGUMENT,
        E::Socket(error) if error.is_of_the_request() => Code::INVALID_ARGUMENT,
        E::Resource(error) if error.is_of_the_request() => Code::INVALID_ARGUMENT,
        E::NoOomCount(_) => Code::UNIMPLEMENTED,
        E::Cgroup(CgroupError::Restless(_)) => Code::DEADLINE_EXCEEDED,
        E::State { .. } | E::NoTerminal(_) | E::Stdio(StdioError::Stream(_)) => {
            Code::FAILED_PRECONDITION
        }
        E::File { .. }
        | E::Terminal(_)
        | E::Kill(_)
        | E::Start { .. }
        | E::Stdio(StdioError::Pipe(_))
        | E::Launch(_)
        | E::Copy(_)
        | E::Cgroup(_)
        | E::Resource(_)
        | E::Pod(_)
        | E::Served(_)
        | E::Function(_)
        | E::Socket(_)
        | E::Device(_)
        | E::Node(_)
        | E::BrokenOff => Code::INTERNAL,
    }
}

fn answer(error: ContainerError) -> ttrpc::Error {
    let code = code(&error);
    if code == Code::INTERNAL {
        tracing::error!("{error}");
    }
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}

/// What failed for the whole guest: always in the log, and the shim's fault when it is the request's.
fn failed(error: &impl std::fmt::Display, of_the_request: bool) -> ttrpc::Error {
    tracing::error!("{error}");
    let code = if of_the_request { Code::INVALID_ARGUMENT } else { Code::INTERNAL };
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}

/// Runs `work` to its end even when the caller goes away or its time is up: half a container is
/// worse than one that nobody asked for.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, ContainerError>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or(Err(ContainerError::BrokenOff)).map_err(answer)
}

fn stdio(stdio: &Stdio) -> StdioIds {
    StdioIds {
        terminal: stdio.terminal,
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
    }
}

fn names(functions: Vec<FunctionName>) -> Names {
    functions.into_iter().map(|function| (function.host, function.guest)).collect()
}

fn wire_mark(mark: &Mark) -> WireMark {
    let mut wire = WireMark::new();
    wire.name = mark.name.to_owned();
    wire.at_ns = mark.at_ns;
    wire
}

fn started((pid, mark): (u32, Mark)) -> StartResponse {
    let mut response = StartResponse::new();
    response.pid = pid;
    response.started = Some(wire_mark(&mark)).into();
    response
}

fn exited(status: ExitStatus) -> WaitProcessResponse {
    let mut response = WaitProcessResponse::new();
    response.exit_status = u32::from(status.0);
    response
}

#[async_trait]
impl agent_ttrpc::Agent for AgentService {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> Answer<HelloResponse> {
        if request.version != PROTOCOL_VERSION {
            tracing::warn!("the shim speaks protocol {}, not {PROTOCOL_VERSION}", request.version);
        }
        let mut response = HelloResponse::new();
        response.version = PROTOCOL_VERSION;
        response.agent_version = env!("CARGO_PKG_VERSION").to_owned();
        response.kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
        response.marks = self.marks.iter().map(wire_mark).collect();
        response.now_ns = now_ns();
        Ok(response)
    }

    async fn adopt(&self, _: &TtrpcContext, request: AdoptRequest) -> Answer<Empty> {
        let adopted = self.adoption.adopt(&request).await;
        adopted.map_err(|error| failed(&error, error.is_of_the_request()))?;
        Ok(Empty::new())
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> Answer<Empty> {
        let resized = self.adoption.resize(&request).await;
        resized.map_err(|error| failed(&error, error.is_of_the_request()))?;
        Ok(Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> Answer<Empty> {
        let wrong = |error: network::NetworkError| failed(&error, error.is_of_the_request());
        network::await_functions(&request).await.map_err(wrong)?;
        // A few dozen messages to the kernel, which answers each at once.
        network::configure(&request).map_err(wrong)?;
        Ok(Empty::new())
    }

    async fn change_network(
        &self,
        _: &TtrpcContext,
        request: ChangeNetworkRequest,
    ) -> Answer<Empty> {
        let wrong = |error: network::NetworkError| failed(&error, error.is_of_the_request());
        network::await_change(&request).await.map_err(wrong)?;
        // A few messages to the kernel, which answers each at once; a few thousand if all is replaced.
        network::change(&request).map_err(wrong)?;
        Ok(Empty::new())
    }

    async fn configure_pod(&self, _: &TtrpcContext, request: ConfigurePodRequest) -> Answer<Empty> {
        pod::configure(&request, self.containers.places()).map_err(|error| answer(error.into()))?;
        Ok(Empty::new())
    }

    async fn add_functions(
        &self,
        _: &TtrpcContext,
        request: FunctionsRequest,
    ) -> Answer<AddFunctionsResponse> {
        // The kernel answers when the drivers have looked at what they found.
        let added = functions::add(&request.devices);
        let mut response = AddFunctionsResponse::new();
        response.drivers = added.map_err(|error| failed(&error, error.is_of_the_request()))?;
        Ok(response)
    }

    async fn remove_functions(&self, _: &TtrpcContext, request: FunctionsRequest) -> Answer<Empty> {
        let removed = functions::remove(&request.devices);
        removed.map_err(|error| failed(&error, error.is_of_the_request()))?;
        Ok(Empty::new())
    }

    async fn renew_copy(&self, _: &TtrpcContext, request: RenewCopyRequest) -> Answer<Empty> {
        let containers = &self.containers;
        containers
            .renew_copy(&request.container_id, request.index, &request.data)
            .map_err(answer)?;
        Ok(Empty::new())
    }

    async fn add_socket(&self, _: &TtrpcContext, request: AddSocketRequest) -> Answer<Empty> {
        let added = self.containers.add_socket(&request.container_id, &request.socket);
        added.map_err(answer)?;
        Ok(Empty::new())
    }

    async fn remove_socket(&self, _: &TtrpcContext, request: RemoveSocketRequest) -> Answer<Empty> {
        self.containers.remove_socket(request.number);
        Ok(Empty::new())
    }

    async fn join_socket(&self, _: &TtrpcContext, request: JoinSocketRequest) -> Answer<Empty> {
        self.containers.join_socket(&request.places).map_err(answer)?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<CreateContainerResponse> {
        let containers = self.containers.clone();
        let create = Create {
            stdio: stdio(&request.stdio),
            id: request.container_id,
            spec: request.spec,
            root: request.root,
            mounts: request.mounts,
            shared_memory: request
                .shared_memory
                .into_iter()
                .map(|shared| (shared.index, shared.bytes))
                .collect(),
            pid_namespace: match request.pid_namespace.into_option() {
                None => PidNamespace::None,
                Some(namespace) if namespace.pod => PidNamespace::Pod,
                Some(namespace) => PidNamespace::Of(namespace.container_id),
            },
            functions: names(request.functions),
            given_functions: request.given_functions,
            served: request.served,
            sockets: request.sockets,
        };
        // Limits, and file systems in memory, go by what there is.
        self.adoption.grown().await.map_err(|error| failed(&error, false))?;
        let mut response = CreateContainerResponse::new();
        response.pid = whole(async move { containers.create(create).await }).await?;
        Ok(response)
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<StartResponse> {
        let containers = self.containers.clone();
        whole(async move { containers.start(&request.container_id).await }).await.map(started)
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Answer<StartResponse> {
        let containers = self.containers.clone();
        let exec = Exec {
            stdio: stdio(&request.stdio),
            container: request.container_id,
            exec: request.exec_id,
            process: request.process,
            functions: names(request.functions),
        };
        whole(async move { containers.exec(exec).await }).await.map(started)
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> Answer<WaitProcessResponse> {
        let ended = self.containers.wait(&request.container_id, &request.exec_id).await;
        let (status, oom_kills) = ended.map_err(answer)?;
        let mut response = exited(status);
        response.oom_kills = oom_kills;
        Ok(response)
    }

    async fn kill_process(&self, _: &TtrpcContext, request: KillProcessRequest) -> Answer<Empty> {
        self.containers
            .kill(&request.container_id, &request.exec_id, request.signal, request.all)
            .map_err(answer)?;
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> Answer<Empty> {
        self.containers
            .resize(&request.container_id, &request.exec_id, request.columns, request.rows)
            .map_err(answer)?;
        Ok(Empty::new())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<ListPidsResponse> {
        let mut response = ListPidsResponse::new();
        response.pids = self.containers.pids(&request.container_id).map_err(answer)?;
        Ok(response)
    }

    async fn read_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<StatsResponse> {
        self.containers.stats(&request.container_id).map_err(answer)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Answer<Empty> {
        self.containers.update(&request.container_id, &request.resources).map_err(answer)?;
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        let containers = self.containers.clone();
        whole(async move { containers.pause(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Answer<Empty> {
        self.containers.resume(&request.container_id).map_err(answer)?;
        Ok(Empty::new())
    }

    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> Answer<WaitOomResponse> {
        let waited = self.containers.wait_oom(&request.container_id, request.oom_kills).await;
        let mut response = WaitOomResponse::new();
        response.oom_kills = waited.map_err(answer)?;
        Ok(response)
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> Answer<WaitProcessResponse> {
        let status = self.containers.delete_exec(&request.container_id, &request.exec_id);
        status.map(exited).map_err(answer)
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Answer<WaitProcessResponse> {
        let containers = self.containers.clone();
        whole(async move { containers.delete(&request.container_id).await }).await.map(exited)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        let containers = self.containers.clone();
        let shutdown = self.shutdown.clone();
        whole(async move {
            containers.end_all().await;
            shutdown.ask();
            Ok(Empty::new())
        })
        .await
    }
}

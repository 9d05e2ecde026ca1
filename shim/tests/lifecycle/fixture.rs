//! A shim's task service with what containerd gives it: bundles, pipes, an events socket.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    task::Poll,
};

use containerd_shim::ExitSignal;
use containerd_shim_protos::{
    api,
    cgroups_v2::metrics::Metrics,
    protobuf::{MessageField, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, SandboxMetricsRequest, SandboxStatusRequest, ShutdownSandboxRequest,
        StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::Sandbox,
    shim_async::Task,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::asynchronous::TtrpcContext;
use vial_shim::{
    config::Config, events::EventSink, plan::Place, pod::Pod, sandbox_service::SandboxService,
    task::TaskService, timeline::Timeline,
};

use crate::events::Topics;

pub(crate) struct Fixture {
    dir: tempfile::TempDir,
    pod: Arc<Pod>,
    service: TaskService,
    sandbox: SandboxService,
    place: Place,
    topics: Topics,
    exit: Arc<ExitSignal>,
    _server: ttrpc::asynchronous::Server,
}

/// A bundle or an exec: its id and its three pipes.
pub(crate) struct Streams {
    id: String,
    dir: PathBuf,
}

impl Streams {
    fn new(id: &str, dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        for name in ["stdin", "stdout", "stderr"] {
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mkfifoat(rustix::fs::CWD, dir.join(name), mode).unwrap();
        }
        Self { id: id.into(), dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    async fn read(&self, name: &str) -> String {
        let path = self.dir.join(name);
        let mut pipe =
            tokio::fs::File::open(path).await.expect("open a pipe that the shim writes to");
        let mut text = String::new();
        pipe.read_to_string(&mut text).await.unwrap();
        text
    }

    pub(crate) async fn output(&self) -> String {
        self.read("stdout").await
    }

    pub(crate) async fn errors(&self) -> String {
        self.read("stderr").await
    }

    pub(crate) async fn input(&self, text: &str) {
        let path = self.dir.join("stdin");
        let mut pipe = tokio::fs::OpenOptions::new().write(true).open(path).await.unwrap();
        pipe.write_all(text.as_bytes()).await.unwrap();
        pipe.flush().await.unwrap();
    }
}

fn context() -> TtrpcContext {
    TtrpcContext::default()
}

fn text(error: ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message,
        error => panic!("an error without a code: {error}"),
    }
}

/// Makes a request and drops it as soon as it has to wait, as the server does with one whose deadline is over.
pub(crate) async fn abandon(request: impl Future) {
    let mut request = std::pin::pin!(request);
    std::future::poll_fn(|context| {
        assert!(request.as_mut().poll(context).is_pending(), "the request was answered at once");
        Poll::Ready(())
    })
    .await;
}

impl Fixture {
    pub(crate) async fn without_sandbox(configuration: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "image"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let me = std::env::current_exe().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let configuration = format!(
            "jail = false\nvmm = {:?}\nkernel = {:?}\nimage = {:?}\nstate_directory = {:?}\n{configuration}",
            me.display().to_string(),
            at("kernel"),
            at("image"),
            at("run")
        );
        let config = Config::parse(&configuration, Path::new("test.toml")).unwrap();
        let socket = dir.path().join("events");
        let (topics, server) = Topics::serve(&socket).await;
        let place = Place {
            namespace: "default".into(),
            id: "demo".into(),
            socket: dir.path().join("socket"),
            config: Ok(config),
            timeline: Arc::new(Timeline::default()),
        };
        let sink = EventSink::new(socket.display().to_string(), "default".into());
        let exit = Arc::new(ExitSignal::default());
        let pod = Arc::new(Pod::new(sink, exit.clone()));
        let sandbox = SandboxService::new(pod.clone(), place.clone());
        let service = TaskService::new(pod.clone());
        Self { service, sandbox, place, pod, dir, topics, exit, _server: server }
    }

    /// With a sandbox that is a container to containerd.
    pub(crate) async fn new(more: &str) -> Self {
        let fixture = Self::without_sandbox(more).await;
        let bundle = fixture.directory("bundle");
        std::fs::write(bundle.join("config.json"), "{}").unwrap();
        let plan = fixture.place.plan_of_bundle(&bundle).unwrap();
        fixture.pod.set_plan(Ok(plan)).unwrap();
        fixture
    }

    pub(crate) async fn create_sandbox(&self, id: &str) -> Result<(), String> {
        let request = CreateSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        self.sandbox.create_sandbox(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn start_sandbox(&self) -> Result<u32, String> {
        let request = StartSandboxRequest { sandbox_id: "demo".into(), ..Default::default() };
        let started = self.sandbox.start_sandbox(&context(), request).await.map_err(text)?;
        assert!(started.created_at.is_some());
        Ok(started.pid)
    }

    pub(crate) async fn stop_sandbox(&self) {
        let request = StopSandboxRequest { sandbox_id: "demo".into(), ..Default::default() };
        self.sandbox.stop_sandbox(&context(), request).await.unwrap();
    }

    pub(crate) async fn wait_sandbox(&self) -> u32 {
        let request = WaitSandboxRequest { sandbox_id: "demo".into(), ..Default::default() };
        self.sandbox.wait_sandbox(&context(), request).await.unwrap().exit_status
    }

    pub(crate) async fn sandbox_state(&self) -> String {
        let request = SandboxStatusRequest { sandbox_id: "demo".into(), ..Default::default() };
        self.sandbox.sandbox_status(&context(), request).await.unwrap().state
    }

    pub(crate) async fn sandbox_memory(&self) -> u64 {
        let request = SandboxMetricsRequest { sandbox_id: "demo".into(), ..Default::default() };
        let response = self.sandbox.sandbox_metrics(&context(), request).await.unwrap();
        let metrics: Metrics = containerd_shim_protos::protobuf::Message::parse_from_bytes(
            &response.metrics.data.value,
        )
        .unwrap();
        metrics.memory.usage
    }

    pub(crate) async fn shut_sandbox_down(&self) {
        let request = ShutdownSandboxRequest { sandbox_id: "demo".into(), ..Default::default() };
        self.sandbox.shutdown_sandbox(&context(), request).await.unwrap();
        self.check_nothing_left();
    }

    pub(crate) async fn start_ahead(&self) {
        self.pod.start_ahead().await;
    }

    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn bundle(&self, id: &str, arguments: &[&str], more: &str) -> Streams {
        let streams = Streams::new(id, self.dir.path().join("bundles").join(id));
        let root = streams.dir.join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("file"), format!("content of {id}\n")).unwrap();
        let spec = format!(
            r#"{{"ociVersion": "1.2.0", {more} "root": {{"path": "root"}},
                "process": {{"args": {arguments:?}}}}}"#
        );
        std::fs::write(streams.dir.join("config.json"), spec).unwrap();
        streams
    }

    pub(crate) async fn create(&self, bundle: &Streams) -> Result<(), String> {
        let request = api::CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.dir.display().to_string(),
            stdin: bundle.path("stdin"),
            stdout: bundle.path("stdout"),
            stderr: bundle.path("stderr"),
            ..Default::default()
        };
        self.service.create(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn exec(&self, id: &str, exec_id: &str, arguments: &[&str]) -> Streams {
        let streams = Streams::new(exec_id, self.dir.path().join("execs").join(exec_id));
        let spec = Any {
            value: format!(r#"{{"args": {arguments:?}}}"#).into_bytes(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdout: streams.path("stdout"),
            stderr: streams.path("stderr"),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.service.exec(&context(), request).await.unwrap();
        streams
    }

    pub(crate) async fn start(&self, id: &str, exec_id: &str) -> Result<(), String> {
        let request =
            api::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.service.start(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn state(&self, id: &str, exec_id: &str) -> State {
        let request =
            api::StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        State(self.service.state(&context(), request).await.unwrap())
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request =
            api::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.service.wait(&context(), request).await.unwrap().exit_status
    }

    /// How it ended, or nothing when it is not there.
    pub(crate) async fn wait_or_absent(&self, id: &str) -> Option<u32> {
        let request = api::WaitRequest { id: id.into(), ..Default::default() };
        self.service.wait(&context(), request).await.ok().map(|ended| ended.exit_status)
    }

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Result<(), String> {
        let request = api::KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.service.kill(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<(), String> {
        let request = api::PauseRequest { id: id.into(), ..Default::default() };
        self.service.pause(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<(), String> {
        let request = api::ResumeRequest { id: id.into(), ..Default::default() };
        self.service.resume(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn update(&self, id: &str, kind: &str, value: &str) -> Result<(), String> {
        let resources = Any { type_url: kind.into(), value: value.into(), ..Default::default() };
        let request = api::UpdateTaskRequest {
            id: id.into(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.service.update(&context(), request).await.map(drop).map_err(text)
    }

    pub(crate) async fn stats(&self, id: &str) -> Metrics {
        let request = api::StatsRequest { id: id.into(), ..Default::default() };
        let any = self.service.stats(&context(), request).await.unwrap().stats.unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        containerd_shim_protos::protobuf::Message::parse_from_bytes(&any.value).unwrap()
    }

    pub(crate) async fn close_stdin(&self, id: &str, exec_id: &str) {
        let request = api::CloseIORequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin: true,
            ..Default::default()
        };
        self.service.close_io(&context(), request).await.unwrap();
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<u32, String> {
        let request =
            api::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        let deleted = self.service.delete(&context(), request).await;
        deleted.map(|deleted| deleted.exit_status).map_err(text)
    }

    pub(crate) async fn kill_vmm(&self, id: &str) {
        let pid = self.state(id, "").await.0.pid.cast_signed();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    pub(crate) async fn shut_down(&self) {
        self.service.shutdown(&context(), api::ShutdownRequest::default()).await.unwrap();
    }

    /// The shim's end, by its own will.
    pub(crate) async fn end(&self) {
        self.exit.wait().await;
    }

    pub(crate) async fn shut_down_and_check(&self) {
        self.shut_down().await;
        self.check_nothing_left();
    }

    pub(crate) fn check_nothing_left(&self) {
        let run = self.dir.path().join("run");
        let left: Vec<_> = std::fs::read_dir(&run)
            .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "left: {left:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let run = run.display().to_string();
        assert!(!mounts.contains(&run), "mounts are left:\n{mounts}");
        let me = std::process::id();
        let children = std::fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap();
        assert_eq!(children.trim(), "", "processes are left");
    }

    pub(crate) fn topics(&self) -> Vec<String> {
        self.topics.all()
    }
}

pub(crate) struct State(api::StateResponse);

impl State {
    pub(crate) fn status(&self) -> api::Status {
        self.0.status.unwrap()
    }
}

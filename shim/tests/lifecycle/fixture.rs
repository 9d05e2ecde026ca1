//! A shim's task service with what containerd gives it: bundles, pipes, an events socket.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim::ExitSignal;
use containerd_shim_protos::{
    api,
    protobuf::{MessageField, well_known_types::any::Any},
    shim_async::Task,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::asynchronous::TtrpcContext;
use vial_shim::{
    config::Config, events::EventSink, pod::Pod, sandbox::Plan, task::TaskService,
    timeline::Timeline,
};

use crate::events::Topics;

pub(crate) struct Fixture {
    dir: tempfile::TempDir,
    pod: Arc<Pod>,
    service: TaskService,
    topics: Topics,
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

impl Fixture {
    pub(crate) async fn new(configuration: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "initrd"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let me = std::env::current_exe().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let configuration = format!(
            "vmm = {:?}\nkernel = {:?}\ninitrd = {:?}\nstate_directory = {:?}\n{configuration}",
            me.display().to_string(),
            at("kernel"),
            at("initrd"),
            at("run")
        );
        let config = Config::parse(&configuration, Path::new("test.toml")).unwrap();
        let socket = dir.path().join("events");
        let (topics, server) = Topics::serve(&socket).await;
        let plan = Plan {
            config,
            namespace: "default".into(),
            id: "demo".into(),
            socket: dir.path().join("socket"),
            network_namespace: None,
            timeline: Arc::new(Timeline::default()),
        };
        let sink = EventSink::new(socket.display().to_string(), "default".into());
        let pod = Arc::new(Pod::new(Ok(plan), sink, Arc::new(ExitSignal::default())));
        Self { service: TaskService::new(pod.clone()), pod, dir, topics, _server: server }
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

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Result<(), String> {
        let request = api::KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.service.kill(&context(), request).await.map(drop).map_err(text)
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

    pub(crate) async fn shut_down_and_check(&self) {
        self.service.shutdown(&context(), api::ShutdownRequest::default()).await.unwrap();
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

//! What containerd's shim protocol wants of a shim: start, serve, delete.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim::{
    Config as ShimConfig, DeleteResponse, Error, ExitSignal, Flags, Shim, StartOpts,
    protos::{protobuf::well_known_types::any::Any, types::introspection::RuntimeInfo},
    publisher::RemotePublisher,
};
use protobuf::MessageField;

use crate::{
    cleanup,
    config::Config,
    events::{EventSink, timestamp},
    pod::Pod,
    process::KILLED,
    sandbox::Plan,
    spec::{Role, Spec},
    task::TaskService,
    timeline::{Timeline, now_ns},
};

/// The name that containerd knows the runtime by.
pub const RUNTIME: &str = "io.containerd.vial.v2";

/// Tells the process that serves when the one that containerd ran began, in nanoseconds of
/// `CLOCK_MONOTONIC`.
const STARTED_VARIABLE: &str = "VIAL_STARTED_NS";

/// How long the last answer may take to reach containerd.
const ANSWER_PATIENCE: Duration = Duration::from_millis(20);

/// One run of the shim's program.
pub struct Runtime {
    namespace: String,
    id: String,
    socket: PathBuf,
    started_ns: u64,
    exit: Arc<ExitSignal>,
}

impl Runtime {
    fn plan(&self, timeline: Arc<Timeline>) -> Result<Plan, Error> {
        // The sandbox's own bundle: that of a member is known to the shim that serves.
        let (_, spec) = Spec::read(&bundle()?).map_err(other)?;
        Ok(Plan {
            config: Config::load().map_err(other)?,
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            socket: self.socket.clone(),
            network_namespace: spec.network_namespace().map(Path::to_path_buf),
            timeline,
        })
    }
}

fn other(error: impl std::fmt::Display) -> Error {
    Error::Other(error.to_string())
}

/// The bundle is where containerd runs the shim.
fn bundle() -> Result<PathBuf, Error> {
    std::env::current_dir().map_err(other)
}

#[async_trait]
impl Shim for Runtime {
    type T = TaskService;

    async fn new(_: &str, flags: &Flags, config: &mut ShimConfig) -> Self {
        // The VMM is waited for by whoever started it, and has no children that outlive it.
        config.no_reaper = true;
        config.no_sub_reaper = true;
        let socket = flags.socket.strip_prefix("unix://").unwrap_or(&flags.socket);
        Self {
            namespace: flags.namespace.clone(),
            id: flags.id.clone(),
            socket: socket.into(),
            started_ns: now_ns(),
            exit: Arc::new(ExitSignal::default()),
        }
    }

    async fn start_shim(&mut self, options: StartOpts) -> Result<String, Error> {
        match start(self.started_ns, options).await {
            Ok(address) => Ok(address),
            // The library would show the error as Rust's debugging sees it. containerd shows
            // what is written here to whoever wanted the container, and nothing was started.
            Err(Error::Other(text)) => {
                eprintln!("{text}");
                std::process::exit(1)
            }
            Err(error) => Err(error),
        }
    }

    async fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        let config = Config::load().map_err(other)?;
        let pid = cleanup::clean(&config, &self.namespace, &self.id, &bundle()?).map_err(other)?;
        Ok(DeleteResponse {
            pid,
            exit_status: KILLED,
            exited_at: MessageField::some(timestamp(SystemTime::now())),
            ..Default::default()
        })
    }

    async fn wait(&mut self) {
        self.exit.wait().await;
        // containerd removes the bundle meanwhile, and with it the file by which the library
        // would find the socket.
        remove_socket(&self.socket);
        tokio::time::sleep(ANSWER_PATIENCE).await;
    }

    async fn create_task_service(&self, publisher: RemotePublisher) -> TaskService {
        let timeline = Arc::new(Timeline::default());
        let started = std::env::var(STARTED_VARIABLE).ok().and_then(|text| text.parse().ok());
        timeline.mark_at("shim exec", started.unwrap_or(self.started_ns));
        timeline.mark("task service ready");
        let plan = self.plan(timeline).map_err(|error| error.to_string());
        // The library's publisher does not keep the order of events when it tries one again, and
        // cannot be waited for. Its address is what is needed.
        let events = EventSink::new(publisher.address, self.namespace.clone());
        let pod = Arc::new(Pod::new(plan, events, self.exit.clone()));
        // containerd asks for a container in any case, so the VM boots while it gets there.
        let ahead = pod.clone();
        tokio::spawn(async move { ahead.start_ahead().await });
        TaskService::new(pod)
    }

    fn runtime_info(runtime_id: &str, _: Option<&Any>) -> Result<RuntimeInfo, Error> {
        let version = containerd_shim::protos::types::introspection::RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        Ok(RuntimeInfo {
            name: runtime_id.into(),
            version: MessageField::some(version),
            ..Default::default()
        })
    }
}

/// Starts the process that serves, or finds the one that serves the sandbox already.
async fn start(started_ns: u64, options: StartOpts) -> Result<String, Error> {
    // What is wrong with these is told now, before anything was started.
    Config::load().map_err(other)?;
    let (_, spec) = Spec::read(&bundle()?).map_err(other)?;
    if let Role::Member(sandbox) = spec.role().map_err(other)? {
        let address = options.socket_address(&sandbox);
        let path = address.strip_prefix("unix://").unwrap_or(&address);
        UnixStream::connect(path).map_err(|error| {
            other(format!("the shim of sandbox '{sandbox}' does not answer: {error}"))
        })?;
        return Ok(address);
    }
    let grouping = options.id.clone();
    let started = started_ns.to_string();
    containerd_shim::spawn(options, &grouping, vec![(STARTED_VARIABLE, &started)]).await
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

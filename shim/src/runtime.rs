//! What containerd's shim protocol wants of a shim: start, serve, delete, info.
//!
//! containerd runs the program with `start` in the bundle of a container or sandbox. That starts
//! the program again, which serves the task and the sandbox API on a socket, and prints where. With
//! `delete` it cleans up after a shim that is gone. The library has the forms of the command line,
//! of the log and of the address; its own server knows only the task API.

use std::{
    io::{IsTerminal, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::MetadataExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim::{
    ExitSignal, Flags, StartOpts,
    bootstrap::{BootstrapParams, BootstrapResult, Extension},
};
use containerd_shim_protos::{
    TASK_API_VERSION,
    api::DeleteResponse,
    protobuf::{Message, well_known_types::any::Any},
    sandbox_async::create_sandbox,
    shim_async::create_task,
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use protobuf::MessageField;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    cleanup::{self, CleanupError},
    config::{Config, ConfigError},
    events::{EventSink, timestamp},
    plan::Place,
    pod::Pod,
    process::KILLED,
    sandbox_service::SandboxService,
    spec::{Role, Spec, SpecError},
    task::TaskService,
    timeline::{Timeline, now_ns},
};

/// The name that containerd knows the runtime by.
pub const RUNTIME: &str = "io.containerd.vial.v2";
/// How containerd calls the OCI's features in what a shim says of itself.
const FEATURES_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// What containerd takes for its program.
pub const PROGRAM: &str = "containerd-shim-vial-v2";

/// Tells the process that serves when the one that containerd ran began, in nanoseconds of
/// `CLOCK_MONOTONIC`.
const STARTED_VARIABLE: &str = "VIAL_STARTED_NS";
/// Where containerd takes events.
const EVENTS_VARIABLE: &str = "TTRPC_ADDRESS";
/// The protocol of the services.
const PROTOCOL: &str = "ttrpc";

/// The most that containerd may write to the standard input.
const MAX_INPUT_BYTES: u64 = 10 << 20;
/// How long the last answer may take to reach containerd.
const ANSWER_PATIENCE: Duration = Duration::from_millis(20);
/// How often a shim that nothing was asked of looks whether its bundle is still there.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a sandbox's shim serves on after it was shut down. To containerd a connection that ends
/// before the answer came is a sandbox that cannot be removed; it closes the connection itself.
const SANDBOX_LINGER: Duration = Duration::from_secs(1);

/// Why the program did not do what containerd ran it for.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// See [`SpecError`].
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// See [`CleanupError`].
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    /// What containerd wrote or is told is not of the form.
    #[error("cannot {action}: {error}")]
    Form {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: containerd_shim_protos::protobuf::Error,
    },
    /// Something of the system failed.
    #[error("cannot {action}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The library failed.
    #[error("cannot {action}: {error}")]
    Shim {
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        error: containerd_shim::Error,
    },
    /// The server failed.
    #[error("cannot serve: {0}")]
    Serve(ttrpc::Error),
    /// The sandbox of a container is gone.
    #[error("the shim of sandbox '{sandbox}' does not answer: {error}")]
    NoSandbox {
        /// Which.
        sandbox: String,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The program that containerd ran was killed before it could tell where this one serves.
    #[error("the program that started this shim is gone, so containerd does not know of it")]
    Unheard,
    /// The command line is not containerd's.
    #[error("{0}")]
    Usage(&'static str),
}

fn io(action: &'static str) -> impl FnOnce(std::io::Error) -> RuntimeError {
    move |error| RuntimeError::Io { action, error }
}

/// Does what the command line says.
///
/// # Errors
/// [`RuntimeError`].
pub async fn run(flags: Flags) -> Result<(), RuntimeError> {
    let started_ns = now_ns();
    let answer = match flags.action.as_str() {
        _ if flags.info => info()?,
        "start" => start(&flags, started_ns).await?,
        "delete" => delete(&flags)?,
        "" => return serve(&flags, started_ns).await,
        _ => return Err(RuntimeError::Usage("the action has to be start or delete")),
    };
    let mut output = std::io::stdout().lock();
    output.write_all(&answer).and_then(|()| output.flush()).map_err(io("answer"))
}

/// The bundle is where containerd runs the shim.
fn bundle() -> Result<PathBuf, RuntimeError> {
    std::env::current_dir().map_err(io("find the bundle"))
}

fn info() -> Result<Vec<u8>, RuntimeError> {
    let version =
        RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features = Any {
        type_url: FEATURES_URL.into(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    };
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    };
    encode(&info)
}

/// What of the OCI specification is there (runtime-spec, features.md), as far as somebody asks: containerd, which offers the
/// kubelet mounts that are read-only with all that is below them when the list has `rro`, and pods with users of their own when
/// there are user namespaces and idmapped mounts.
fn features() -> serde_json::Value {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "bind", "rbind", "ro", "rw", "rro", "nosuid", "nodev", "noexec", "private", "rprivate", "slave",
            "rslave", "shared", "rshared",
        ],
        // containerd 2 ends when there is none of this.
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}

fn encode(message: &impl Message) -> Result<Vec<u8>, RuntimeError> {
    message.write_to_bytes().map_err(|error| RuntimeError::Form { action: "answer", error })
}

/// Starts the process that serves, or finds the one that serves the sandbox already; answers
/// where.
async fn start(flags: &Flags, started_ns: u64) -> Result<Vec<u8>, RuntimeError> {
    let input = read_input()?;
    let (options, answer_form) = start_options(&input, flags);
    // What is wrong with these is told now, before anything was started.
    Config::load()?;
    let address = match role(&bundle()?)? {
        Role::Member(sandbox) => running_shim(&options, sandbox)?,
        Role::Alone | Role::Sandbox => {
            let grouping = options.id.clone();
            let started = started_ns.to_string();
            containerd_shim::spawn(options, &grouping, vec![(STARTED_VARIABLE, &started)])
                .await
                .map_err(|error| RuntimeError::Shim { action: "start the shim", error })?
        }
    };
    let answer = BootstrapResult {
        version: TASK_API_VERSION,
        address,
        protocol: PROTOCOL.into(),
        ..Default::default()
    };
    match answer_form {
        Form::Protobuf => encode(&answer),
        Form::Json => Ok(serde_json::json!({
            "version": answer.version,
            "address": answer.address,
            "protocol": answer.protocol,
        })
        .to_string()
        .into_bytes()),
    }
}

/// What the container in `bundle` is. By the Sandbox API a sandbox is no container, and has none.
fn role(bundle: &Path) -> Result<Role, RuntimeError> {
    if !has_container(bundle) {
        return Ok(Role::Sandbox);
    }
    let (_, spec) = Spec::read(bundle)?;
    let role = spec.role()?;
    if role == Role::Sandbox {
        spec.check_sandbox()?;
    }
    Ok(role)
}

fn has_container(bundle: &Path) -> bool {
    bundle.join("config.json").exists()
}

fn running_shim(options: &StartOpts, sandbox: String) -> Result<String, RuntimeError> {
    let address = options.socket_address(&sandbox);
    match UnixStream::connect(path_of(&address)) {
        Ok(_) => Ok(address),
        Err(error) => Err(RuntimeError::NoSandbox { sandbox, error }),
    }
}

fn path_of(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

fn read_input() -> Result<Vec<u8>, RuntimeError> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let read = stdin.lock().take(MAX_INPUT_BYTES).read_to_end(&mut input);
        read.map_err(io("read what containerd says"))?;
    }
    Ok(input)
}

/// How containerd wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As 2.0 to 2.2 do.
    Json,
    /// As 2.3 and newer do.
    Protobuf,
}

/// What containerd says of the shim to start: newer ones all of it in a message on the standard
/// input, older ones by flags and environment, with the runtime's options on the standard input.
fn start_options(input: &[u8], flags: &Flags) -> (StartOpts, Form) {
    let message = BootstrapParams::parse_from_bytes(input).ok();
    // Options would read as a message, too, but not for this shim.
    let message = message.filter(|message| {
        !message.instance_id.is_empty()
            && (&message.instance_id, &message.namespace) == (&flags.id, &flags.namespace)
    });
    if let Some(message) = message {
        let mut options = StartOpts::from(message);
        options.debug |= flags.debug;
        return (options, Form::Protobuf);
    }
    let variable = |name| std::env::var(name).unwrap_or_default();
    let mut message = BootstrapParams {
        instance_id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        containerd_ttrpc_address: variable(EVENTS_VARIABLE),
        containerd_grpc_address: flags.address.clone(),
        containerd_binary: flags.publish_binary.clone(),
        ..Default::default()
    };
    if message.containerd_grpc_address.is_empty() {
        message.containerd_grpc_address = variable("GRPC_ADDRESS");
    }
    let runtime_options = Any::parse_from_bytes(input).ok();
    if let Some(value) = runtime_options.filter(|any| !any.type_url.is_empty()) {
        let value = MessageField::some(value);
        message.extensions.push(Extension { value, ..Default::default() });
    }
    let mut options = StartOpts::from(message);
    options.debug = flags.debug;
    (options, Form::Json)
}

fn delete(flags: &Flags) -> Result<Vec<u8>, RuntimeError> {
    let config = Config::load()?;
    let bundle = bundle()?;
    let socket = served_socket(flags, &bundle);
    let pid = cleanup::clean(&config, &flags.namespace, &flags.id, &bundle, &socket)?;
    encode(&DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    })
}

/// Where the shim of this very container or sandbox serves, if it has one.
///
/// The name is made of what containerd says of itself, then and now. Newer ones may choose the
/// directory, which they note in the bundle; for a container in a pod they note the pod's socket,
/// which has another name.
fn served_socket(flags: &Flags, bundle: &Path) -> PathBuf {
    #[derive(serde::Deserialize)]
    struct Bootstrap {
        address: String,
    }
    let (options, _) = start_options(&[], flags);
    let usual = path_of(&options.socket_address(&flags.id)).to_path_buf();
    let noted = std::fs::read(bundle.join("bootstrap.json")).ok();
    let noted = noted.and_then(|text| serde_json::from_slice::<Bootstrap>(&text).ok());
    match noted.map(|Bootstrap { address }| path_of(&address).to_path_buf()) {
        Some(noted) if noted.file_name() == usual.file_name() => noted,
        _ => usual,
    }
}

/// Serves until the sandbox is shut down.
async fn serve(flags: &Flags, started_ns: u64) -> Result<(), RuntimeError> {
    if flags.socket.is_empty() {
        return Err(RuntimeError::Usage("there is neither an action nor a socket to serve"));
    }
    open_log(flags)?;
    ignore_signals()?;
    let timeline = Arc::new(Timeline::default());
    let started = std::env::var(STARTED_VARIABLE).ok().and_then(|text| text.parse().ok());
    timeline.mark_at("shim exec", started.unwrap_or(started_ns));
    let (bundle, socket) = (bundle()?, path_of(&flags.socket).to_path_buf());
    let Some(listener) = listen(&socket)? else {
        // Another one serves already: that is the one that containerd was told of.
        return closed_output();
    };

    let events = std::env::var(EVENTS_VARIABLE).unwrap_or_default();
    let events = EventSink::new(events, flags.namespace.clone());
    let exit = Arc::new(ExitSignal::default());
    let pod = Arc::new(Pod::new(events, exit.clone()));
    let place = Place {
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        socket: socket.clone(),
        config: Config::load().map_err(|error| error.to_string()),
        timeline: timeline.clone(),
    };
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_task(Arc::new(TaskService::new(pod.clone()))))
        .register_service(create_sandbox(Arc::new(SandboxService::new(
            pod.clone(),
            place.clone(),
        ))));
    server.start().await.map_err(RuntimeError::Serve)?;
    if has_no_reader(std::io::stdout())? {
        // Whoever was to tell containerd is gone, so nobody will ever ask.
        remove_socket(&socket);
        return Err(RuntimeError::Unheard);
    }
    closed_output()?;
    timeline.mark("services ready");
    if has_container(&bundle) {
        let plan = place.plan_of_bundle(&bundle).map_err(|error| error.to_string());
        // The first one: nobody can have asked for a sandbox yet that is served here.
        if pod.set_plan(plan).is_ok() {
            // containerd asks for a container in any case, so the VM boots while it gets there.
            let ahead = pod.clone();
            tokio::spawn(async move { ahead.start_ahead().await });
        }
    }
    tokio::select! {
        () = exit.wait() => {}
        () = forsaken(&bundle, || pod.was_asked()) => {
            tracing::warn!("containerd has given up on this shim before it asked for anything");
            if let Err(error) = pod.shutdown(true).await {
                tracing::error!("{error}");
            }
        }
    }
    if pod.by_sandbox_api() {
        tokio::time::sleep(SANDBOX_LINGER).await;
    }
    tracing::info!("the shim ends");
    if let Err(error) = server.shutdown().await {
        tracing::debug!("cannot end the server: {error}");
    }
    remove_socket(&socket);
    tokio::time::sleep(ANSWER_PATIENCE).await;
    Ok(())
}

/// containerd reads the log from a FIFO in the bundle.
fn open_log(flags: &Flags) -> Result<(), RuntimeError> {
    // Opening a FIFO that nobody reads any more would last for ever: so somebody does meanwhile.
    let access = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let _reader = rustix::fs::open("log", access, Mode::empty())
        .map_err(|error| RuntimeError::Io { action: "open the log", error: error.into() })?;
    containerd_shim::logger::init(flags.debug, "info", &flags.namespace, &flags.id)
        .map_err(|error| RuntimeError::Shim { action: "open the log", error })
}

/// A shim ends when containerd says so on its socket, and by no signal that asks.
fn ignore_signals() -> Result<(), RuntimeError> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(io("take signals"))?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!("asked to end by a signal, which a shim does not");
            }
        });
    }
    Ok(())
}

/// The socket, or nothing when another shim serves it.
fn listen(path: &Path) -> Result<Option<Listener>, RuntimeError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(io("make the socket's directory"))?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Of a shim that was killed.
            std::fs::remove_file(path).map_err(io("remove an old socket"))?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    let listener = listener.map_err(io("make the socket"))?;
    Listener::try_from(listener).map(Some).map_err(io("listen on the socket"))
}

/// Whoever started this process reads its standard output to the end, which is when it serves.
fn closed_output() -> Result<(), RuntimeError> {
    rustix::stdio::dup2_stdout(std::io::stderr())
        .map_err(|error| RuntimeError::Io { action: "close the output", error: error.into() })
}

/// Ends when containerd has removed the bundle without ever having asked for anything: it does so
/// when the program that it ran, and that started this process, was killed before it could answer.
async fn forsaken(bundle: &Path, was_asked: impl Fn() -> bool) {
    let numbers =
        |path: &Path| std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    // Looked at before anything was asked, so of the bundle that this process was started for: as
    // it runs in there, no later one of the same name gets the same number.
    let own = numbers(bundle);
    while !was_asked() {
        if own.is_none() || numbers(bundle) != own {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    std::future::pending().await
}

/// Whether `output` is a pipe that nobody reads any more.
fn has_no_reader(output: impl AsFd) -> Result<bool, RuntimeError> {
    let mut watched = [PollFd::new(&output, PollFlags::empty())];
    poll(&mut watched, Some(&Timespec::default()))
        .map_err(|error| RuntimeError::Io { action: "look at the output", error: error.into() })?;
    Ok(watched[0].revents().contains(PollFlags::ERR))
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags { id: "demo".into(), namespace: "default".into(), ..Default::default() }
    }

    #[test]
    fn shim_says_what_it_has_of_the_specification() {
        let told = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        assert_eq!(told.name, RUNTIME);
        assert_eq!(told.features.type_url, FEATURES_URL);
        // As containerd reads it.
        let features: serde_json::Value = serde_json::from_slice(&told.features.value).unwrap();
        let options = features["mountOptions"].as_array().unwrap();
        assert!(options.iter().any(|option| option == "rro"));
        let namespaces = features["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.iter().any(|namespace| namespace == "user"));
        let idmap = &features["linux"]["mountExtensions"]["idmap"];
        assert_eq!(idmap["enabled"], true);
    }

    #[test]
    fn message_for_this_shim_is_used_and_answered_alike() {
        let message = BootstrapParams {
            instance_id: "demo".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/events".into(),
            ..Default::default()
        };
        let (options, form) = start_options(&message.write_to_bytes().unwrap(), &flags());
        assert_eq!((options.ttrpc_address.as_str(), form), ("/run/events", Form::Protobuf));
    }

    #[test]
    fn options_on_the_input_are_no_message_for_this_shim() {
        let any = Any { type_url: "a.Options".into(), value: b"x".into(), ..Default::default() };
        for input in [any.write_to_bytes().unwrap(), Vec::new(), b"{}".to_vec()] {
            let flags = Flags { address: "/run/c.sock".into(), debug: true, ..flags() };
            let (options, form) = start_options(&input, &flags);
            assert_eq!((options.id.as_str(), form, options.debug), ("demo", Form::Json, true));
            assert_eq!(options.address, "/run/c.sock");
        }
    }

    #[tokio::test]
    async fn socket_of_a_dead_shim_is_taken_over_and_that_of_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        std::fs::create_dir(dir.path().join("s")).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        let listener = listen(&path).unwrap();
        assert!(listener.is_some());
        assert!(listen(&path).unwrap().is_none());
    }

    #[test]
    fn socket_to_clean_up_is_that_of_the_id_wherever_containerd_put_it() {
        let bundle = tempfile::tempdir().unwrap();
        let usual = served_socket(&flags(), bundle.path());
        assert!(usual.starts_with("/run/containerd/s"), "{usual:?}");
        let name = usual.file_name().unwrap().to_str().unwrap();
        let note = |name: &str| {
            let text = format!(r#"{{"version":3,"address":"unix:///run/other/{name}"}}"#);
            std::fs::write(bundle.path().join("bootstrap.json"), text).unwrap();
            served_socket(&flags(), bundle.path())
        };
        assert_eq!(note(name), Path::new("/run/other").join(name));
        assert_eq!(note("socket-of-the-pod"), usual);
    }

    #[tokio::test]
    async fn shim_is_forsaken_when_its_bundle_goes_before_it_was_asked() {
        let (long, longer) = (LOOK_EVERY * 3, LOOK_EVERY * 100);
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bundle");
        std::fs::create_dir(&bundle).unwrap();
        let lasting = tokio::time::timeout(long, forsaken(&bundle, || false));
        assert!(lasting.await.is_err(), "its bundle is there");
        let gone = forsaken(&bundle, || false);
        let removed = async {
            tokio::time::sleep(long).await;
            std::fs::rename(&bundle, dir.path().join("old")).unwrap();
            std::fs::create_dir(&bundle).unwrap();
        };
        let both = async { tokio::join!(gone, removed) };
        tokio::time::timeout(longer, both).await.expect("another bundle is not its own");
        std::fs::remove_dir(&bundle).unwrap();
        let asked = tokio::time::timeout(long, forsaken(&bundle, || true));
        assert!(asked.await.is_err(), "containerd removes it in its own order then");
    }

    #[test]
    fn only_a_pipe_that_nobody_reads_has_no_reader() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(!has_no_reader(&writer).unwrap());
        drop(reader);
        assert!(has_no_reader(&writer).unwrap());
        assert!(!has_no_reader(tempfile::tempfile().unwrap()).unwrap());
    }

    #[test]
    fn bundle_without_a_container_is_that_of_a_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(role(dir.path()).unwrap(), Role::Sandbox);
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(role(dir.path()).unwrap(), Role::Alone);
    }
}

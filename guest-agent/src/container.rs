//! The containers of the guest: what is known of each, and looking them up.
//!
//! A container is an entry in [`Containers`], a directory below [`Places::containers`] with its
//! config.json, libcontainer's state below [`Places::runtime`] and a cgroup. Making one is in
//! [`create`], everything from its start on in [`run`].

mod create;
pub(crate) mod life;
mod run;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::net::unix::pipe;
use tokio::sync::watch;
use vial_agent_protocol::agent::{HostSocket, SocketPlace};
use vial_agent_protocol::{DATA_LINK, MAX_SPEC_BYTES, is_valid_id};

use crate::cgroup::events::OomWatch;
use crate::cgroup::resources::ResourceError;
use crate::cgroup::{Cgroup, CgroupError};
use crate::copies::{self, CopyError};
use crate::devices::DeviceError;
use crate::functions::FunctionError;
use crate::launch::LaunchError;
use crate::nodes::NodeError;
use crate::pod::{Pod, PodError};
use crate::reaper::{ExitStatus, Reaper};
use crate::served::ServedError;
use crate::share::{Share, ShareError};
use crate::sockets::{Host, SocketError, Sockets};
use crate::spec::SpecError;
use crate::stdio::{Input, StdioError};
use crate::streams::Streams;
use crate::terminal::Terminal;
use crate::workdir::WorkdirError;
pub(crate) use create::{Create, PidNamespace};
use life::{ContainerEvent, ContainerState, ExecState, Refused};
pub(crate) use run::Exec;

/// Containers at one time.
pub(crate) const MAX_CONTAINERS: usize = 128;
/// Added processes of one container that are not deleted yet.
pub(crate) const MAX_EXECS: usize = 256;

/// Why a request about a container is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error("{0:?} is no valid id")]
    Id(String),
    #[error("the spec is {0} bytes long; at most {MAX_SPEC_BYTES} are taken")]
    SpecSize(usize),
    #[error("no container {0}")]
    NoContainer(String),
    #[error("no process {exec} in container {container}")]
    NoExec { container: String, exec: String },
    #[error("container {0} exists already")]
    Exists(String),
    #[error("process {exec} exists already in container {container}")]
    ExecExists { container: String, exec: String },
    #[error("there are {MAX_CONTAINERS} containers already; delete one first")]
    TooMany,
    #[error("there are {MAX_EXECS} added processes already; delete one first")]
    TooManyExecs,
    #[error("cannot {action} {name}: {source}")]
    State { action: &'static str, name: String, source: Refused },
    #[error("process already finished")]
    Finished,
    #[error("{0} is no signal")]
    Signal(u32),
    #[error("all processes can only be signalled through the container's first one")]
    AllOfExec,
    #[error("a terminal is 1 to 65535 columns and rows large, not {columns} by {rows}")]
    Size { columns: u32, rows: u32 },
    #[error("process {0} has no terminal")]
    NoTerminal(String),
    #[error("cannot {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the terminal did not come: {0}")]
    Terminal(io::Error),
    #[error("cannot send the signal: {0}")]
    Kill(io::Error),
    #[error("cannot start container {id}: {reason}")]
    Start { id: String, reason: String },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("mount {index} of container {container} is no copy of a volume")]
    NoCopy { container: String, index: u32 },
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Served(#[from] ServedError),
    #[error(transparent)]
    Function(#[from] FunctionError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Workdir(#[from] WorkdirError),
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error("container {0} has no count of processes that ended for want of memory")]
    NoOomCount(String),
    #[error("the request was broken off inside the agent")]
    BrokenOff,
}

/// Where the agent keeps files of containers.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// A directory a container, with its bundle.
    pub(crate) containers: PathBuf,
    /// libcontainer's state.
    pub(crate) runtime: PathBuf,
    /// Sockets that terminals come by.
    pub(crate) consoles: PathBuf,
    /// The mounted share.
    pub(crate) share: PathBuf,
    /// The pod's shared memory.
    pub(crate) shared_memory: PathBuf,
    /// Sockets in place of the host's, and the volumes that have some.
    pub(crate) sockets: PathBuf,
    /// Nodes of devices, a directory a container.
    pub(crate) nodes: PathBuf,
    /// A sysfs of the pod's, if that has a user namespace.
    pub(crate) sysfs: PathBuf,
}

impl Places {
    /// All below `base`, which is short (a socket's path ends at 107 bytes), except the share.
    pub(crate) fn below(base: &std::path::Path, share: PathBuf) -> Self {
        Places {
            containers: base.join("containers"),
            runtime: base.join("runtime"),
            consoles: base.join("consoles"),
            shared_memory: base.join("shm"),
            sockets: base.join("sockets"),
            nodes: base.join("nodes"),
            sysfs: base.join("sysfs"),
            share,
        }
    }

    /// Makes the directories.
    ///
    /// # Errors
    /// One cannot be made.
    pub(crate) fn prepare(&self) -> Result<(), ContainerError> {
        for path in [&self.containers, &self.runtime, &self.consoles, &self.sockets] {
            fs::create_dir_all(path).map_err(file_error("create directory", path))?;
        }
        Ok(())
    }
}

/// A process that runs or ran.
pub(crate) struct Process {
    pid: i32,
    exit: watch::Receiver<Option<ExitStatus>>,
    terminal: Option<Terminal>,
    _input: Input,
}

impl Process {
    fn exit_status(&self) -> Option<ExitStatus> {
        *self.exit.borrow()
    }
}

struct ExecRecord {
    state: ExecState,
    process: Option<Arc<Process>>,
}

struct Record {
    state: ContainerState,
    init: Option<Arc<Process>>,
    execs: HashMap<String, ExecRecord>,
    /// Says why the first process could not run its program; read once, by the start.
    exec_errors: Option<pipe::Receiver>,
    /// None without a memory controller.
    oom: Option<OomWatch>,
}

/// One container.
pub(crate) struct Container {
    id: String,
    cgroup: Cgroup,
    directory: PathBuf,
    /// Index into the spec's mounts, and the source below the share, of volumes it has a copy of.
    copied: Vec<(u32, String)>,
    /// Indices into the spec's mounts, of volumes in which sockets of the host may be.
    socket_volumes: Vec<u32>,
    record: Mutex<Record>,
}

impl Container {
    /// Where its copy of a volume is.
    fn copy(&self, index: u32) -> PathBuf {
        self.directory.join(format!("copy-{index}"))
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn happens(&self, event: ContainerEvent, action: &'static str) -> Result<(), ContainerError> {
        let mut record = self.record();
        record.state = record.state.next(event).map_err(|source| ContainerError::State {
            action,
            name: format!("container {}", self.id),
            source,
        })?;
        Ok(())
    }

    /// The process: the first one for an empty `exec`.
    fn process(&self, exec: &str) -> Result<Arc<Process>, ContainerError> {
        let record = self.record();
        let process = if exec.is_empty() {
            record.init.clone()
        } else {
            record.execs.get(exec).and_then(|exec| exec.process.clone())
        };
        process.ok_or_else(|| match exec {
            "" => ContainerError::NoContainer(self.id.clone()),
            exec => ContainerError::NoExec { container: self.id.clone(), exec: exec.to_owned() },
        })
    }
}

/// All containers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Containers {
    table: Arc<Mutex<HashMap<String, Arc<Container>>>>,
    places: Arc<Places>,
    share: Share,
    reaper: Reaper,
    streams: Streams,
    counter: Arc<AtomicU64>,
    hugetlb: bool,
    pod: Pod,
    sockets: Sockets,
}

impl Containers {
    /// None yet. `host` is where sockets of the host are reached.
    pub(crate) fn new(places: Places, reaper: Reaper, streams: Streams, host: Host) -> Self {
        let controllers = fs::read_to_string(format!("{}/cgroup.controllers", crate::cgroup::ROOT));
        let controllers = controllers.unwrap_or_default();
        Containers {
            table: Arc::default(),
            share: Share::new(places.share.clone()),
            pod: Pod::new(places.shared_memory.clone()),
            sockets: Sockets::new(places.sockets.clone(), host),
            places: Arc::new(places),
            reaper,
            streams,
            counter: Arc::default(),
            hugetlb: controllers.split_whitespace().any(|name| name == "hugetlb"),
        }
    }

    /// Where files are.
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        check_id(id)?;
        self.table().get(id).cloned().ok_or_else(|| ContainerError::NoContainer(id.to_owned()))
    }

    /// Brings a container's copy of a volume up to date, see [`copies::renew`].
    ///
    /// # Errors
    /// There is no such copy, or it could not be renewed and is as it was.
    pub(crate) fn renew_copy(
        &self,
        id: &str,
        index: u32,
        data: &str,
    ) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        let none = || ContainerError::NoCopy { container: id.to_owned(), index };
        let (_, path) = container.copied.iter().find(|(n, _)| *n == index).ok_or_else(none)?;
        let copy = container.copy(index);
        // It was too large when the container was made, or is not made yet.
        copy.join(DATA_LINK).is_symlink().then_some(()).ok_or_else(none)?;
        Ok(copies::renew(&self.share.resolve(path)?, &copy, data)?)
    }

    /// Puts a socket over one of the host's in a volume of a container, see [`Sockets::add`].
    ///
    /// # Errors
    /// There is no such volume, or [`SocketError`].
    pub(crate) fn add_socket(&self, id: &str, socket: &HostSocket) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        if !container.socket_volumes.contains(&socket.index) || socket.path.is_empty() {
            let container = id.to_owned();
            return Err(SocketError::NoVolume { container, index: socket.index }.into());
        }
        self.sockets.add(id, socket)?;
        Ok(())
    }

    /// Joins what volumes of containers show of one socket, see [`Sockets::join`].
    ///
    /// # Errors
    /// There is no such container or volume, or [`SocketError`].
    pub(crate) fn join_socket(&self, places: &[SocketPlace]) -> Result<(), ContainerError> {
        for place in places {
            if !self.get(&place.container_id)?.socket_volumes.contains(&place.index) {
                let (container, index) = (place.container_id.clone(), place.index);
                return Err(SocketError::NoVolume { container, index }.into());
            }
        }
        Ok(self.sockets.join(places)?)
    }

    /// Takes it away again.
    pub(crate) fn remove_socket(&self, number: u64) {
        self.sockets.remove(number);
    }

    /// A number that no file has in its name yet.
    fn count(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }
}

fn check_id(id: &str) -> Result<(), ContainerError> {
    if is_valid_id(id) {
        return Ok(());
    }
    Err(ContainerError::Id(id.chars().take(80).collect()))
}

fn check_size(spec: &[u8]) -> Result<(), ContainerError> {
    if spec.len() > MAX_SPEC_BYTES {
        return Err(ContainerError::SpecSize(spec.len()));
    }
    Ok(())
}

fn file_error(
    action: &'static str,
    path: &std::path::Path,
) -> impl FnOnce(io::Error) -> ContainerError {
    let path = path.to_owned();
    move |source| ContainerError::File { action, path, source }
}

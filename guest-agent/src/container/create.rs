//! Makes a container, or nothing.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use vial_agent_protocol::agent::{GivenFunction, HostSocket, ServedDevice, SharedMount};

use super::life::{ContainerEvent, ContainerState};
use super::{
    Container, ContainerError, Containers, MAX_CONTAINERS, Process, Record, check_id, check_size,
    file_error,
};
use crate::cgroup::Cgroup;
use crate::cgroup::events::OomWatch;
use crate::copies;
use crate::devices::Program;
use crate::functions::nodes::{self as function_nodes, Node};
use crate::helper::{Order, Task};
use crate::launch;
use crate::nodes;
use crate::pod;
use crate::reaper::Launch;
use crate::served;
use crate::spec::environment::{self, Names};
use crate::spec::{self, Guest};
use crate::stdio::{self, Claimed, Input, StdioIds};
use crate::terminal::{ConsoleSocket, Terminal};
use crate::users;
use crate::workdir;

/// How long a terminal may take to arrive after its process was made.
const TERMINAL_WAIT: Duration = Duration::from_secs(5);

/// What a container is made from.
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) spec: Vec<u8>,
    /// Below the share.
    pub(crate) root: String,
    pub(crate) mounts: Vec<SharedMount>,
    /// Index into the spec's mounts, and the bytes that the pod's shared memory has.
    pub(crate) shared_memory: Vec<(u32, u64)>,
    pub(crate) pid_namespace: PidNamespace,
    pub(crate) stdio: StdioIds,
    /// The VM's functions of the host.
    pub(crate) functions: Names,
    /// Those of them whose device nodes it has.
    pub(crate) given_functions: Vec<GivenFunction>,
    /// The VM's devices that other processes of the host serve.
    pub(crate) served: Vec<ServedDevice>,
    /// Sockets of the host in its volumes.
    pub(crate) sockets: Vec<HostSocket>,
}

/// In place of a PID namespace that the spec joins.
pub(crate) enum PidNamespace {
    /// The spec joins none.
    None,
    /// The pod's.
    Pod,
    /// That of a container.
    Of(String),
}

/// A process that a helper made, not yet known to the reaper.
pub(super) struct Made {
    pub(super) pid: i32,
    pub(super) terminal: Option<Terminal>,
    pub(super) input: Input,
    /// Held until the pid is registered.
    pub(super) _launch: Launch,
}

impl Containers {
    /// Makes a container with its first process before its first instruction; answers its pid.
    ///
    /// # Errors
    /// Nothing is left of it then.
    pub(crate) async fn create(&self, create: Create) -> Result<u32, ContainerError> {
        let container = self.reserve(&create)?;
        let id = create.id.clone();
        match self.make(&container, create).await {
            Ok(pid) => Ok(pid),
            Err(error) => {
                if let Err(left) = self.remove_traces(&container).await {
                    tracing::warn!("after the failed creation of container {id}: {left}");
                }
                self.table().remove(&id);
                Err(error)
            }
        }
    }

    fn reserve(&self, create: &Create) -> Result<Arc<Container>, ContainerError> {
        check_id(&create.id)?;
        check_size(&create.spec)?;
        let mut table = self.table();
        if table.contains_key(&create.id) {
            return Err(ContainerError::Exists(create.id.clone()));
        }
        if table.len() >= MAX_CONTAINERS {
            return Err(ContainerError::TooMany);
        }
        let container = Arc::new(Container {
            id: create.id.clone(),
            cgroup: Cgroup::of_container(&create.id),
            directory: self.places.containers.join(&create.id),
            copied: create
                .mounts
                .iter()
                .filter(|mount| mount.copied)
                .map(|mount| (mount.index, mount.path.clone()))
                .collect(),
            socket_volumes: create
                .mounts
                .iter()
                .filter(|mount| mount.sockets)
                .map(|mount| mount.index)
                .collect(),
            record: Mutex::new(Record {
                state: ContainerState::Creating,
                init: None,
                execs: HashMap::new(),
                exec_errors: None,
                oom: None,
            }),
        });
        table.insert(create.id.clone(), Arc::clone(&container));
        Ok(container)
    }

    async fn make(
        &self,
        container: &Arc<Container>,
        create: Create,
    ) -> Result<u32, ContainerError> {
        let functions = function_nodes::of(&create.given_functions).await?;
        let (devices, user) = self.write_bundle(container, &create, &functions)?;
        let claimed = Claimed::claim(&self.streams, create.stdio, user).await?;
        let (exec_errors, theirs) = stdio::error_pipe()?;
        let task = Task::Create { exec_errors: launch::number(&theirs) };
        let order = self.order(&container.id, &container.directory, task);
        let made = self.launch(order, create.stdio.terminal, claimed, Some(theirs)).await?;
        let pid = made.pid;
        // Its nodes are made, and none of its own code has run yet.
        devices.attach(container.cgroup.path())?;

        let exit = self.reaper.watch(pid);
        let (sender, receiver) = watch::channel(None);
        {
            let mut record = container.record();
            record.exec_errors = Some(exec_errors);
            record.oom = OomWatch::start(container.cgroup.path())
                .inspect_err(|error| tracing::warn!("container {}: {error}", container.id))
                .ok();
            record.init = Some(Arc::new(Process {
                pid,
                exit: receiver,
                terminal: made.terminal,
                _input: made.input,
            }));
        }
        container.happens(ContainerEvent::Made, "create")?;
        let watched = Arc::clone(container);
        tokio::spawn(async move {
            let status = exit.await.unwrap_or(crate::reaper::ExitStatus::LOST);
            // Refused only when it ended while being deleted and forgotten.
            let _ = watched.happens(ContainerEvent::Exited, "end");
            // Without a pid namespace of its own the others would outlive the first process.
            if let Err(error) = watched.cgroup.kill() {
                tracing::warn!("{error}");
            }
            sender.send_replace(Some(status));
        });
        // Linux's pids are positive.
        Ok(pid as u32)
    }

    /// Answers the rules for the container's devices, and its user.
    fn write_bundle(
        &self,
        container: &Container,
        create: &Create,
        functions: &[Node],
    ) -> Result<(Program, u32), ContainerError> {
        let directory = &container.directory;
        fs::create_dir(directory).map_err(file_error("create directory", directory))?;
        let mut sources = BTreeMap::new();
        let mut host_guards = Vec::new();
        for mount in &create.mounts {
            let index = mount.index as usize;
            let shared = self.share.resolve(&mount.path)?;
            let copy = match mount.copied {
                true => copied(&shared, container.copy(mount.index)),
                false => None,
            };
            // The host does not guard a copy.
            if mount.host_guards && copy.is_none() {
                host_guards.push(index);
            }
            let source = match mount.sockets && copy.is_none() {
                true => self.sockets.add_volume(&container.id, mount.index, &shared)?,
                false => copy.unwrap_or(shared),
            };
            sources.insert(index, source);
        }
        self.add_sockets(container, create, &mut sources);
        for (index, bytes) in &create.shared_memory {
            sources.insert(*index as usize, self.pod.shared_memory(*bytes)?);
        }
        let pid_namespace = match &create.pid_namespace {
            PidNamespace::None => None,
            PidNamespace::Pod => Some(self.pod.pid_namespace()?),
            PidNamespace::Of(id) => Some(pod::pid_namespace_of(self.get(id)?.process("")?.pid)),
        };
        let mut spec = spec::parse(&create.spec)?;
        if let Some(process) = spec.process_mut() {
            environment::name_functions(process, &create.functions);
        }
        let devices = match spec::devices::has_any(spec.linux().as_ref()) {
            true => spec::devices::of_guest(),
            false => Vec::new(),
        };
        let guest = Guest {
            root: self.share.resolve(&create.root)?,
            sources,
            host_guards,
            cgroup: Cgroup::spec_path(&container.id),
            terminal: create.stdio.terminal,
            hugetlb: self.hugetlb,
            pid_namespace,
            user_namespace: users::of_pod().map(|namespace| (namespace.path(), namespace.users)),
            devices,
            disks: create.served.iter().map(|device| PathBuf::from(&device.path)).collect(),
        };
        let asked_by = function_nodes::asked_by(&spec, functions);
        let (mut spec, dropped) = spec::rewrite(spec, &guest)?;
        served::add_to(&mut spec, &served::prepare(&create.served)?);
        for path in function_nodes::add_to(&mut spec, functions, &asked_by) {
            let (id, path) = (&container.id, path.display());
            tracing::warn!("container {id} has no {path} of its PCI function, but its spec's own");
        }
        if let Some(pod) = users::of_pod() {
            nodes::bind(&mut spec, &pod.users, &self.places.nodes, &container.id)?;
        }
        if let Some(process) = spec.process() {
            let owner = users::of_pod().map_or((0, 0), users::UserNamespace::root);
            workdir::make(&guest.root, process.cwd(), owner)?;
        }
        for name in dropped {
            tracing::warn!("container {}: {name} of the spec are not run in a guest", container.id);
        }
        write_json(&directory.join("config.json"), &spec)?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        let user = spec.process().as_ref().map_or(0, |process| process.user().uid());
        Ok((Program::new(rules.unwrap_or_default())?, user))
    }

    /// Those that are there before the container is. Without one the container has a socket that
    /// refuses connections.
    fn add_sockets(
        &self,
        container: &Container,
        create: &Create,
        sources: &mut BTreeMap<usize, PathBuf>,
    ) {
        for socket in &create.sockets {
            let index = socket.index as usize;
            let is_volume = container.socket_volumes.contains(&socket.index);
            // It is in a volume, or is one.
            if is_volume == socket.path.is_empty() || !sources.contains_key(&index) {
                tracing::warn!("container {}: mount {index} has no such socket", container.id);
                continue;
            }
            match self.sockets.add(&container.id, socket) {
                Ok(Some(file)) => drop(sources.insert(index, file)),
                Ok(None) => {}
                Err(error) => tracing::warn!("container {}: {error}", container.id),
            }
        }
    }

    /// An order with fresh file names in `directory`, without a terminal.
    pub(super) fn order(&self, id: &str, directory: &Path, task: Task) -> Order {
        let number = self.count();
        Order {
            id: id.to_owned(),
            bundle: directory.to_owned(),
            runtime: self.places.runtime.clone(),
            console: None,
            answer: directory.join(format!("answer-{number}")),
            errors: directory.join(format!("errors-{number}")),
            task,
        }
    }

    /// Runs a helper with its stdio, and starts the copying.
    pub(super) async fn launch(
        &self,
        mut order: Order,
        terminal: bool,
        claimed: Claimed,
        inherited: Option<std::os::fd::OwnedFd>,
    ) -> Result<Made, ContainerError> {
        let launch = self.reaper.launch();
        let errors = RemoveFile(order.errors.clone());
        let made = if terminal {
            let path = self.places.consoles.join(self.count().to_string());
            let socket = ConsoleSocket::bind(path.clone())
                .map_err(file_error("listen on terminal socket", &path))?;
            order.console = Some(path);
            let receiving = tokio::spawn(async move { socket.receive().await });
            let answer = launch::run(&self.reaper, &order, stdio::null(), inherited).await;
            let pid = answer.inspect_err(|_| receiving.abort())?;
            let terminal = match timeout(TERMINAL_WAIT, receiving).await {
                Ok(Ok(received)) => received.map_err(ContainerError::Terminal)?,
                Ok(Err(_)) => return Err(ContainerError::BrokenOff),
                Err(late) => return Err(ContainerError::Terminal(late.into())),
            };
            let input = claimed.copy_terminal(&terminal);
            Made { pid, terminal: Some(terminal), input, _launch: launch }
        } else {
            let (child, pipes) = claimed.pipes()?;
            let pid = launch::run(&self.reaper, &order, child, inherited).await?;
            Made { pid, terminal: None, input: pipes.copy(), _launch: launch }
        };
        drop(errors);
        Ok(made)
    }

    /// Ends what runs and removes what is left of a container besides its entry.
    pub(super) async fn remove_traces(&self, container: &Container) -> Result<(), ContainerError> {
        container.cgroup.kill()?;
        container.cgroup.remove().await?;
        self.sockets.release(&container.id)?;
        let id = &container.id;
        let (runtime, nodes) = (self.places.runtime.join(id), self.places.nodes.join(id));
        for path in [runtime, nodes, container.directory.clone()] {
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(file_error("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The copy of a volume, if there can be one. Without it the container has the volume itself, and
/// inotify tells it nothing.
fn copied(volume: &Path, copy: PathBuf) -> Option<PathBuf> {
    // One that is renewed just now has its valid directory removed under the copying.
    match copies::make(volume, &copy).or_else(|_| copies::make(volume, &copy)) {
        Ok(()) => Some(copy),
        Err(error) => {
            tracing::warn!("inotify does not see renewals of {}: {error}", volume.display());
            None
        }
    }
}

/// Removes a file at the end, however that comes.
struct RemoveFile(PathBuf);

impl Drop for RemoveFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), ContainerError> {
    let json =
        serde_json::to_vec(value).map_err(|error| file_error("write", path)(error.into()))?;
    fs::write(path, json).map_err(file_error("write", path))
}

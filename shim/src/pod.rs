//! The containers of one sandbox, and what is done to them.
//!
//! The sandbox is started ahead of its first container, or with it. Work that changes which containers there
//! are is done one at a time; work on one process is ordered by that process's own lock. What is
//! done to containers while they run is in [`control`].

mod control;
mod guest;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim::ExitSignal;
use containerd_shim_protos::{
    events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskStart},
    types::mount::Mount,
};
use protobuf::MessageField;
use vial_agent_protocol::{MAX_SPEC_BYTES, is_valid_id, users::Users};

use guest::{Wants, explain, forget, make, start_exec, start_init, wait, write_timeline};

use crate::{
    bundles,
    container::Container,
    error::ServiceError,
    events::{EventSink, task_exit, timestamp},
    life::{self, Exit, ProcessState, SandboxEvent, SandboxState},
    pids::{self, Joined},
    process::{KILLED, Process},
    sandbox::{Plan, Sandbox, Shortage},
    spec::{Role, Spec, SpecError},
    stdio::{Places, Streams},
};

/// How long a deletion waits for a process that it had to kill.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long the end of an init process waits for those of its execs, to be told after them.
const EXECS_PATIENCE: Duration = Duration::from_secs(2);
/// How long the shim waits for containerd to take its last events.
const EVENTS_PATIENCE: Duration = Duration::from_secs(5);

/// A container that is to be created.
#[derive(Debug)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The snapshotter's mounts.
    pub root_mounts: Vec<Mount>,
    /// Where its streams go.
    pub places: Places,
    /// A checkpoint to restore from; has to be empty.
    pub checkpoint: String,
}

struct Slot {
    state: SandboxState,
    /// Why it could not be started ahead, for whoever creates the first container.
    failure: Option<ServiceError>,
}

/// The containers of one sandbox.
pub struct Pod {
    plan: OnceLock<Result<Plan, String>>,
    slot: tokio::sync::Mutex<Slot>,
    /// Set once, when it runs: it is not started again. What is done to containers that are there does not wait for one that
    /// is being made.
    sandbox: OnceLock<Arc<Sandbox>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Whether its containers share their process ids.
    shares_pids: AtomicBool,
    /// Whether containerd has ever asked for anything: it knows of this shim then.
    asked: AtomicBool,
    events: EventSink,
    exit: Arc<ExitSignal>,
}

impl Pod {
    /// No containers yet, nor a sandbox until there is a plan ([`Pod::set_plan`]).
    pub fn new(events: EventSink, exit: Arc<ExitSignal>) -> Self {
        let slot = Slot { state: SandboxState::Empty, failure: None };
        Self {
            plan: OnceLock::new(),
            slot: tokio::sync::Mutex::new(slot),
            sandbox: OnceLock::new(),
            containers: Mutex::default(),
            shares_pids: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            events,
            exit,
        }
    }

    fn containers_mut(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether it was asked for by the Sandbox API: then it is for containerd to stop, and does not
    /// go with its containers.
    pub fn by_sandbox_api(&self) -> bool {
        self.plan().is_ok_and(|plan| plan.files.is_some())
    }

    /// How the sandbox is to be. A plan that could not be made is told to whoever wants to create
    /// a container.
    ///
    /// # Errors
    /// [`ServiceError::Exists`] when there is one.
    pub fn set_plan(&self, plan: Result<Plan, String>) -> Result<(), ServiceError> {
        let id = plan.as_ref().map_or_else(|_| String::new(), |plan| plan.id.clone());
        self.plan.set(plan).map_err(|_| ServiceError::Exists { what: "sandbox", id })
    }

    /// Whether containerd has asked for a container or sandbox, so that it knows of this shim.
    pub fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// containerd has asked for a sandbox.
    pub fn mark_asked(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    fn plan(&self) -> Result<&Plan, ServiceError> {
        let plan = self.plan.get().ok_or_else(|| {
            ServiceError::Precondition("no sandbox was created with this shim yet".into())
        })?;
        plan.as_ref().map_err(|text| ServiceError::Precondition(text.clone()))
    }

    /// The container of that id.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        self.containers_mut()
            .get(id)
            .cloned()
            .ok_or_else(|| ServiceError::NotFound { what: "container", id: id.into() })
    }

    /// The process number that stands for every process here, see [`Sandbox::pid`]. 0 without a
    /// VM.
    pub async fn pid(&self) -> u32 {
        self.sandbox().await.map_or(0, |sandbox| sandbox.pid())
    }

    /// The sandbox, whether it has ended or not. Waits for one that is being started.
    ///
    /// # Errors
    /// [`ServiceError::Precondition`] when it was not started.
    pub async fn sandbox(&self) -> Result<Arc<Sandbox>, ServiceError> {
        if self.sandbox.get().is_none() {
            drop(self.slot.lock().await);
        }
        let sandbox = self.sandbox.get().cloned();
        sandbox.ok_or_else(|| ServiceError::Precondition("the sandbox does not run".into()))
    }

    /// Starts the sandbox ahead of the first container's creation, which containerd asks for
    /// once the shim answers. A failure is told then.
    pub async fn start_ahead(&self) {
        let mut slot = self.slot.lock().await;
        let Ok(plan) = self.plan() else { return };
        if slot.state == SandboxState::Empty
            && let Err(error) = self.running(&mut slot, plan).await
        {
            slot.failure = Some(error);
        }
    }

    /// Starts the sandbox if it does not run yet.
    ///
    /// # Errors
    /// [`ServiceError`]; nothing of it is left then.
    pub async fn start_sandbox(&self) -> Result<Arc<Sandbox>, ServiceError> {
        let mut slot = self.slot.lock().await;
        if let Some(error) = slot.failure.take() {
            return Err(error);
        }
        self.running(&mut slot, self.plan()?).await
    }

    /// The sandbox, started if it was not yet.
    async fn running(&self, slot: &mut Slot, plan: &Plan) -> Result<Arc<Sandbox>, ServiceError> {
        if let (SandboxState::Running, Some(sandbox)) = (slot.state, self.sandbox.get()) {
            return match sandbox.end() {
                None => Ok(sandbox.clone()),
                Some(why) => {
                    slot.state = life::sandbox(slot.state, SandboxEvent::VmEnded)?;
                    Err(ServiceError::VmEnded(why))
                }
            };
        }
        slot.state = life::sandbox(slot.state, SandboxEvent::Start)?;
        match Sandbox::start(plan).await {
            Ok(sandbox) => {
                slot.state = life::sandbox(slot.state, SandboxEvent::Started)?;
                let sandbox = self.sandbox.get_or_init(|| Arc::new(sandbox));
                write_timeline(plan, sandbox);
                Ok(sandbox.clone())
            }
            Err(error) => {
                slot.state = life::sandbox(slot.state, SandboxEvent::StartFailed)?;
                Err(error)
            }
        }
    }

    /// Stops the sandbox if it is not stopped yet.
    async fn stop(&self, slot: &mut Slot) -> Result<(), ServiceError> {
        if slot.state == SandboxState::Stopped {
            return Ok(());
        }
        slot.state = life::sandbox(slot.state, SandboxEvent::Stop)?;
        let stopped = match self.sandbox.get() {
            Some(sandbox) => sandbox.stop().await,
            None => Ok(()),
        };
        slot.state = life::sandbox(slot.state, SandboxEvent::Stopped)?;
        stopped
    }

    /// Stops the sandbox, if it is not stopped yet; its containers end with it.
    ///
    /// # Errors
    /// [`ServiceError::Leftover`].
    pub async fn stop_sandbox(&self) -> Result<(), ServiceError> {
        self.stop(&mut *self.slot.lock().await).await
    }

    /// Creates a container, and the sandbox with the first one. Returns [`Pod::pid`].
    ///
    /// # Errors
    /// [`ServiceError`]. Nothing of the container is left then, nor of a sandbox without
    /// containers.
    pub async fn create(self: &Arc<Self>, new: NewContainer) -> Result<u32, ServiceError> {
        self.mark_asked();
        let created = self.create_in_sandbox(new).await;
        if created.is_err() && !self.by_sandbox_api() {
            let mut slot = self.slot.lock().await;
            if self.containers_mut().is_empty()
                && let Err(error) = self.stop(&mut slot).await
            {
                tracing::error!("{error}");
            }
        }
        created
    }

    async fn create_in_sandbox(self: &Arc<Self>, new: NewContainer) -> Result<u32, ServiceError> {
        let plan = self.plan()?;
        plan.timeline.mark(&format!("create request: {}", new.id));
        if !new.checkpoint.is_empty() {
            return Err(ServiceError::Unimplemented("restoring a container from a checkpoint"));
        }
        if !is_valid_id(&new.id) {
            let text = format!("'{}' cannot be the id of a container", new.id.escape_debug());
            return Err(ServiceError::Invalid(text));
        }
        let (bytes, mut spec) = Spec::read(&new.bundle)?;
        let role = spec.role()?;
        let owner = match &role {
            Role::Alone | Role::Sandbox => &new.id,
            Role::Member(sandbox) => sandbox,
        };
        if *owner != plan.id {
            let text = format!("the sandbox here is '{}', not '{owner}'", plan.id);
            return Err(ServiceError::Invalid(text));
        }
        // Held to the end: one container is created at a time.
        let mut slot = self.slot.lock().await;
        if self.containers_mut().contains_key(&new.id) {
            return Err(ServiceError::Exists { what: "container", id: new.id });
        }
        if let Some(error) = slot.failure.take() {
            return Err(error);
        }
        let sandbox = self.running(&mut slot, plan).await?;
        let users = spec.users()?.map(Users::to_wire);
        if users.as_ref() != plan.pod.user_namespace.as_ref() {
            return Err(SpecError::OtherUsers.into());
        }
        let claim = spec.claim()?;
        let devices = spec.wanted_devices(&plan.config.pci_devices)?;
        let disks = spec.wanted_disks()?;
        if !matches!(role, Role::Sandbox) {
            // A function that is in the wrong place is refused before it is touched.
            let functions = sandbox.nodes_of_functions(&devices).await?;
            sandbox.placed.claim(&new.id, claim, functions)?;
        }
        if let Err(error) = sandbox.give_functions(&new.id, &devices).await {
            sandbox.placed.release(&new.id);
            return Err(error);
        }
        let made = match role {
            Role::Sandbox => {
                Ok(Container::new(new.id.clone(), new.bundle.clone(), false, pause(&new)))
            }
            Role::Alone | Role::Member(_) => {
                let pids = spec.joins_pids().then(|| self.joined_pids()).transpose();
                let resources = &spec.linux.resources;
                let room = sandbox.growth.claim(&new.id, resources, Shortage::Borne).await;
                let made = match room.map_err(ServiceError::from).and(pids) {
                    Ok(pids) => {
                        let wants = Wants { pids, disks: &disks, devices: &devices };
                        make(plan, &sandbox, &new, (bytes, &mut spec), wants).await
                    }
                    Err(error) => Err(error),
                };
                if made.is_err() {
                    sandbox.placed.release(&new.id);
                    sandbox.growth.put_back(&new.id, None).await;
                }
                made
            }
        };
        if made.is_err() {
            sandbox.take_functions(&new.id).await;
        }
        let container = Arc::new(made?);
        self.containers_mut().insert(new.id.clone(), container.clone());
        drop(slot);
        let pid = sandbox.pid();
        self.events.publish(created(new, pid)).await;
        if container.in_guest {
            tokio::spawn(self.clone().watch_oom(sandbox.clone(), container.clone()));
        }
        tokio::spawn(self.clone().watch(sandbox, container.clone(), container.init.clone()));
        Ok(pid)
    }

    /// Whose process ids a container has that joins a PID namespace.
    fn joined_pids(&self) -> Result<Joined, ServiceError> {
        let containers = self.containers_mut();
        let others = containers.values().filter(|container| {
            container.in_guest && !matches!(container.init.state(), ProcessState::Stopped(_))
        });
        let others: Vec<String> = others.map(|container| container.id.clone()).collect();
        let joined = pids::joined(self.shares_pids.load(Ordering::Relaxed), &others)?;
        self.shares_pids.fetch_or(joined == Joined::Pod, Ordering::Relaxed);
        Ok(joined)
    }

    /// Starts a container's init process, or an exec. Returns [`Pod::pid`].
    ///
    /// # Errors
    /// [`ServiceError`]. The process counts as ended then, and can be deleted.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, ServiceError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let sandbox = self.sandbox().await?;
        let pid = sandbox.pid();
        let asked = async {
            match (container.in_guest, exec_id.is_empty()) {
                (false, true) => Ok(()),
                (false, false) => {
                    Err(ServiceError::Precondition("a pause container runs no processes".into()))
                }
                (true, true) => start_init(self.plan()?, &sandbox, id).await,
                (true, false) => start_exec(&sandbox, id, &process).await,
            }
        };
        if let Err(error) = process.start_by(asked, self.tell_start(id, exec_id, pid)).await {
            return Err(explain(&sandbox, error).await);
        }
        if !exec_id.is_empty() {
            tokio::spawn(self.clone().watch(sandbox, container, process.clone()));
        }
        Ok(pid)
    }

    /// Tells containerd that a container or an exec runs.
    async fn tell_start(&self, id: &str, exec_id: &str, pid: u32) {
        let container_id = id.into();
        if exec_id.is_empty() {
            self.events.publish(TaskStart { container_id, pid, ..Default::default() }).await;
        } else {
            let exec_id = exec_id.into();
            let event = TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
            self.events.publish(event).await;
        }
    }

    /// Waits for a process's end and tells of it once.
    async fn watch(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        container: Arc<Container>,
        process: Arc<Process>,
    ) {
        let (status, kills) = tokio::select! {
            ended = wait(&sandbox, &container, &process) => ended,
            why = sandbox.wait_end() => {
                tracing::error!("{} {} ended with its VM: {why}", container.id, process.exec_id);
                (KILLED, 0)
            }
            // A pause container is killed here, and a process that did not start has ended.
            exit = process.wait() => (exit.status, 0),
        };
        if process.exec_id.is_empty() {
            let execs = container.execs();
            let running = execs.iter().filter(|exec| exec.state() == ProcessState::Running);
            let ends = all_of(running.map(|exec| exec.wait()));
            let _ = tokio::time::timeout(EXECS_PATIENCE, ends).await;
        }
        // A want of memory is told before the end, whose reason it may be.
        let reason = self.tell_oom(&container, kills);
        process.end_by(status, reason, |exit| self.tell_end(&container, &process, exit)).await;
    }

    /// Tells containerd that a container or an exec has ended.
    async fn tell_end(&self, container: &Container, process: &Process, exit: Exit) {
        let id = if process.exec_id.is_empty() { &container.id } else { &process.exec_id };
        let pid = self.pid().await;
        self.events.publish(task_exit(&container.id, id, pid, exit)).await;
    }

    /// Adds an exec, to be started later.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn add_exec(&self, id: &str, exec: Process) -> Result<(), ServiceError> {
        let container = self.container(id)?;
        if exec.spec.len() > MAX_SPEC_BYTES {
            let text = format!("the process has a spec of more than {MAX_SPEC_BYTES} bytes");
            return Err(ServiceError::Invalid(text));
        }
        let exec_id = exec.exec_id.clone();
        container.add_exec(exec)?;
        let event = TaskExecAdded { container_id: id.into(), exec_id, ..Default::default() };
        self.events.publish(event).await;
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`ServiceError::AlreadyEnded`] and others of [`ServiceError`].
    pub async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ServiceError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        match process.state() {
            ProcessState::Stopped(_) | ProcessState::Deleted => {
                return Err(ServiceError::AlreadyEnded);
            }
            ProcessState::Added => {
                return Err(ServiceError::Precondition("the process was not started yet".into()));
            }
            ProcessState::Created
            | ProcessState::Starting
            | ProcessState::Running
            | ProcessState::Pausing
            | ProcessState::Paused => {}
        }
        if !container.in_guest {
            // As a pause process: it ends by any signal that is one, and by none that asks.
            if signal != 0 {
                let (status, none) = (128 + signal.min(64), std::future::ready(()));
                let tell = |exit| self.tell_end(&container, &process, exit);
                process.end_by(status, none, tell).await;
            }
            return Ok(());
        }
        let sandbox = self.sandbox().await?;
        let killed = sandbox.agent.kill(id, exec_id, signal, all && exec_id.is_empty()).await;
        match killed {
            Ok(()) => Ok(()),
            Err(error) => Err(explain(&sandbox, error.into()).await),
        }
    }

    /// Sets the size of a terminal, in columns and rows.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        size: (u32, u32),
    ) -> Result<(), ServiceError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if !process.places.terminal {
            return Err(ServiceError::Precondition("the process has no terminal".into()));
        }
        let most = u32::from(u16::MAX);
        // A client without a terminal of its own asks for nothing by nothing, as runc has it.
        if size.0 == 0 || size.1 == 0 || !container.in_guest {
            return Ok(());
        }
        if size.0 > most || size.1 > most {
            let text = format!("a terminal has at most {most} columns and rows");
            return Err(ServiceError::Invalid(text));
        }
        let sandbox = self.sandbox().await?;
        Ok(sandbox.agent.resize(id, exec_id, size).await?)
    }

    /// The processes of a container, as the guest numbers them.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>, ServiceError> {
        let container = self.container(id)?;
        let sandbox = self.sandbox().await?;
        if !container.in_guest {
            return Ok(vec![sandbox.pid()]);
        }
        Ok(sandbox.agent.pids(id).await?)
    }

    /// Forgets an ended exec, or removes an ended container. Returns how it ended.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<Exit, ServiceError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let sandbox = self.sandbox().await?;
        if process.state() == ProcessState::Created {
            // runc, too, ends what was never started.
            self.kill(id, exec_id, 9, false).await.or_else(ended_is_fine)?;
            let _ = tokio::time::timeout(KILL_PATIENCE, process.wait()).await;
        }
        let remove = |exit, known| async move {
            if container.in_guest && sandbox.end().is_none() && known {
                forget(&sandbox, id, exec_id).await;
            }
            if exec_id.is_empty() {
                return self.remove(&container, &sandbox, exit).await;
            }
            container.remove_exec(exec_id);
            Ok(())
        };
        process.delete_by(remove).await
    }

    /// Takes back all that a container has that has ended.
    async fn remove(
        &self,
        container: &Container,
        sandbox: &Sandbox,
        exit: Exit,
    ) -> Result<(), ServiceError> {
        for exec in container.execs() {
            exec.finish_streams(Duration::ZERO).await;
        }
        let id = &container.id;
        sandbox.copies.forget(id);
        sandbox.sockets.forget(id);
        sandbox.take_functions(id).await;
        sandbox.take_disks(id).await;
        sandbox.share.remove_container(id)?;
        bundles::forget(&sandbox.dir, id);
        sandbox.placed.release(id);
        sandbox.growth.put_back(id, None).await;
        self.containers_mut().remove(id);
        let event = TaskDelete {
            container_id: id.clone(),
            pid: sandbox.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        };
        self.events.publish(event).await;
        Ok(())
    }

    /// Removes a container of whose creation nobody has heard, and ends the shim if that was the first.
    pub async fn take_back(&self, id: &str) {
        tracing::warn!("nobody waited until {id} was created, so it is removed again");
        if let Err(error) = self.delete(id, "").await {
            tracing::error!("cannot remove {id}: {error}");
        }
        if let Err(error) = self.shutdown(false).await {
            tracing::error!("{error}");
        }
    }

    /// Ends the sandbox and the shim. Unless it is to be `now` it does not while there are
    /// containers, nor while the sandbox is for the Sandbox API to end.
    ///
    /// # Errors
    /// [`ServiceError::Leftover`]; the shim ends nevertheless.
    pub async fn shutdown(&self, now: bool) -> Result<(), ServiceError> {
        let mut slot = self.slot.lock().await;
        if !now && (self.by_sandbox_api() || !self.containers_mut().is_empty()) {
            return Ok(());
        }
        let stopped = self.stop(&mut slot).await;
        self.events.flush(EVENTS_PATIENCE).await;
        self.exit.signal();
        stopped
    }
}

/// A pause container's process: nothing but its state.
fn pause(new: &NewContainer) -> Process {
    Process::init(new.places.clone(), Streams::default())
}

fn ended_is_fine(error: ServiceError) -> Result<(), ServiceError> {
    match error.code() {
        ttrpc::Code::NOT_FOUND => Ok(()),
        _ => Err(error),
    }
}

async fn all_of(ends: impl Iterator<Item = impl Future<Output = Exit>>) {
    for end in ends {
        end.await;
    }
}

fn created(new: NewContainer, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: new.id,
        bundle: new.bundle.display().to_string(),
        rootfs: new.root_mounts,
        io: MessageField::some(TaskIO {
            stdin: new.places.stdin,
            stdout: new.places.stdout,
            stderr: new.places.stderr,
            terminal: new.places.terminal,
            ..Default::default()
        }),
        pid,
        ..Default::default()
    }
}

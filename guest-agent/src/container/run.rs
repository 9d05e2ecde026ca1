//! A container from its start to its deletion.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use libcontainer::container::Container as Runtime;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use vial_agent_protocol::agent::StatsResponse;

use super::create::write_json;
use super::life::{ContainerEvent, ExecEvent, ExecState};
use super::{
    Container, ContainerError, Containers, ExecRecord, MAX_EXECS, Process, check_id, check_size,
};
use crate::cgroup::events::OomWatch;
use crate::cgroup::{resources, stats};
use crate::helper::Task;
use crate::launch::LaunchError;
use crate::marks::Mark;
use crate::reaper::ExitStatus;
use crate::spec;
use crate::spec::environment::{self, Names};
use crate::stdio::{Claimed, StdioIds};
use crate::sys;
use crate::users;

/// How long a deletion waits for processes that are being added, and a shutdown for ended ones.
const SETTLE_TRIES: u32 = 500;
const SETTLE_PAUSE: Duration = Duration::from_millis(10);
/// The longest reason for a program not running, in bytes.
const MAX_REASON: u64 = 4096;

/// What a process is added from.
pub(crate) struct Exec {
    pub(crate) container: String,
    pub(crate) exec: String,
    pub(crate) process: Vec<u8>,
    pub(crate) stdio: StdioIds,
    /// The VM's functions of the host.
    pub(crate) functions: Names,
}

impl Containers {
    /// Lets a created container run; answers its pid and when it was let go.
    ///
    /// # Errors
    /// It is not in that state, or its program cannot be run, which ends it.
    pub(crate) async fn start(&self, id: &str) -> Result<(u32, Mark), ContainerError> {
        let container = self.get(id)?;
        container.happens(ContainerEvent::Start, "start")?;
        let process = container.process("")?;
        match self.let_go(&container).await {
            Ok(mark) => {
                container.happens(ContainerEvent::Started, "start")?;
                Ok((process.pid as u32, mark))
            }
            Err(error) => {
                container.cgroup.kill()?;
                exit_of(&process).await;
                Err(error)
            }
        }
    }

    /// Opens libcontainer's gate, and waits until execve(2) has closed the descriptor for errors.
    async fn let_go(&self, container: &Container) -> Result<Mark, ContainerError> {
        let failed = |reason: String| ContainerError::Start { id: container.id.clone(), reason };
        let errors = container.record().exec_errors.take();
        // Writes to a socket and a file: nothing that needs a process of its own.
        Runtime::load(self.places.runtime.join(&container.id))
            .and_then(|mut runtime| runtime.start())
            .map_err(|error| failed(error.to_string()))?;
        let mark = Mark::now("started");
        let mut reason = String::new();
        if let Some(errors) = errors {
            let read = errors.take(MAX_REASON).read_to_string(&mut reason).await;
            read.map_err(|error| failed(error.to_string()))?;
        }
        if reason.is_empty() {
            return Ok(mark);
        }
        Err(LaunchError::from_text(&reason).into())
    }

    /// Adds a process to a running container; answers its pid and when it was let go.
    ///
    /// # Errors
    /// Nothing is left of it then.
    pub(crate) async fn exec(&self, exec: Exec) -> Result<(u32, Mark), ContainerError> {
        check_id(&exec.exec)?;
        check_size(&exec.process)?;
        let container = self.get(&exec.container)?;
        reserve(&container, &exec.exec)?;
        let id = exec.exec.clone();
        let added = self.add(&container, exec).await;
        if added.is_err() {
            container.record().execs.remove(&id);
        }
        added
    }

    async fn add(
        &self,
        container: &Arc<Container>,
        exec: Exec,
    ) -> Result<(u32, Mark), ContainerError> {
        let mut process = spec::exec_process(&exec.process, exec.stdio.terminal)?;
        environment::name_functions(&mut process, &exec.functions);
        let path = container.directory.join(format!("process-{}.json", self.count()));
        write_json(&path, &process)?;
        let owner = users::outside(process.user().uid());
        let task = Task::Exec { process: path.clone(), owner };
        let order = self.order(&container.id, &container.directory, task);
        let user = process.user().uid();
        let made = match Claimed::claim(&self.streams, exec.stdio, user).await {
            Ok(claimed) => self.launch(order, exec.stdio.terminal, claimed, None).await,
            Err(error) => Err(error.into()),
        };
        let _ = fs::remove_file(path);
        let made = made?;
        let mark = Mark::now("started");

        let exit = self.reaper.watch(made.pid);
        let (sender, receiver) = watch::channel(None);
        if let Some(record) = container.record().execs.get_mut(&exec.exec) {
            record.process = Some(Arc::new(Process {
                pid: made.pid,
                exit: receiver,
                terminal: made.terminal,
                _input: made.input,
            }));
        }
        exec_happens(container, &exec.exec, ExecEvent::Started, "start")?;
        self.sweep(container);
        let watched = Arc::clone(container);
        tokio::spawn(async move {
            let status = exit.await.unwrap_or(ExitStatus::LOST);
            // Refused only when its container was deleted meanwhile.
            let _ = exec_happens(&watched, &exec.exec, ExecEvent::Exited, "end");
            sender.send_replace(Some(status));
        });
        Ok((made.pid as u32, mark))
    }

    /// Removes the sockets that libcontainer leaves behind for each added process.
    fn sweep(&self, container: &Container) {
        let starting = |record: &ExecRecord| record.state == ExecState::Starting;
        if container.record().execs.values().any(starting) {
            return;
        }
        let Ok(entries) = fs::read_dir(self.places.runtime.join(&container.id)) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("tenant-") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// The status of a process, once it has ended; and for a first process, how many of its
    /// container had ended for want of memory.
    ///
    /// # Errors
    /// There is no such process.
    pub(crate) async fn wait(
        &self,
        id: &str,
        exec: &str,
    ) -> Result<(ExitStatus, u64), ContainerError> {
        let container = self.get(id)?;
        let process = container.process(exec)?;
        let status = exit_of(&process).await;
        let kills = match exec {
            "" => container.record().oom.as_ref().map_or(0, OomWatch::count),
            _ => 0,
        };
        Ok((status, kills))
    }

    /// The number of processes that ended for want of memory, once it is above `known`.
    ///
    /// # Errors
    /// There is no such container, or it is deleted meanwhile.
    pub(crate) async fn wait_oom(&self, id: &str, known: u64) -> Result<u64, ContainerError> {
        let none = || ContainerError::NoOomCount(id.to_owned());
        let mut kills = {
            let container = self.get(id)?;
            let record = container.record();
            record.oom.as_ref().ok_or_else(none)?.subscribe()
        };
        let count = kills.wait_for(|count| *count > known).await;
        Ok(*count.map_err(|_| ContainerError::NoContainer(id.to_owned()))?)
    }

    /// Stops every process of a running container.
    ///
    /// # Errors
    /// It does not run, or does not stop; it runs on then.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        container.happens(ContainerEvent::Pause, "pause")?;
        if let Err(error) = container.cgroup.freeze().await {
            // Refused when it has ended meanwhile.
            let _ = container.happens(ContainerEvent::Resume, "resume");
            return Err(error.into());
        }
        Ok(())
    }

    /// Lets a paused container run on.
    ///
    /// # Errors
    /// It is not paused.
    pub(crate) fn resume(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        container.happens(ContainerEvent::Resume, "resume")?;
        Ok(container.cgroup.thaw()?)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// There is no such container, or its cgroup cannot be read.
    pub(crate) fn stats(&self, id: &str) -> Result<StatsResponse, ContainerError> {
        Ok(stats::read(&self.get(id)?.cgroup)?)
    }

    /// Changes the limits of a container to those in `resources`, in JSON.
    ///
    /// # Errors
    /// There is no such container, or a limit cannot be set; all stay as they were then.
    pub(crate) fn update(&self, id: &str, resources: &[u8]) -> Result<(), ContainerError> {
        check_size(resources)?;
        Ok(resources::update(&self.get(id)?.cgroup, resources)?)
    }

    /// Sends a signal (1 to 64) to a process, or to all of a container.
    ///
    /// # Errors
    /// There is no such process or signal, or it has ended.
    pub(crate) fn kill(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        let number = match i32::try_from(signal) {
            Ok(number @ 1..=64) => number,
            _ => return Err(ContainerError::Signal(signal)),
        };
        if all && !exec.is_empty() {
            return Err(ContainerError::AllOfExec);
        }
        if all {
            return Ok(container.cgroup.signal(number)?);
        }
        let process = container.process(exec)?;
        // Until its status is known the pid is taken, if only by a zombie.
        if process.exit_status().is_some() {
            return Err(ContainerError::Finished);
        }
        match sys::kill(process.pid, number) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(ContainerError::Finished)
            }
            other => other.map_err(ContainerError::Kill),
        }
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// There is no such process or size, or no terminal.
    pub(crate) fn resize(
        &self,
        id: &str,
        exec: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), ContainerError> {
        let process = self.get(id)?.process(exec)?;
        let (Ok(columns @ 1..), Ok(rows @ 1..)) = (u16::try_from(columns), u16::try_from(rows))
        else {
            return Err(ContainerError::Size { columns, rows });
        };
        let name = || if exec.is_empty() { id.to_owned() } else { exec.to_owned() };
        let terminal =
            process.terminal.as_ref().ok_or_else(|| ContainerError::NoTerminal(name()))?;
        terminal.resize(columns, rows).map_err(ContainerError::Terminal)
    }

    /// Every process of a container.
    ///
    /// # Errors
    /// There is no such container, or its cgroup cannot be read.
    pub(crate) fn pids(&self, id: &str) -> Result<Vec<u32>, ContainerError> {
        Ok(self.get(id)?.cgroup.pids()?)
    }

    /// Forgets an ended added process.
    ///
    /// # Errors
    /// There is none, or it still runs.
    pub(crate) fn delete_exec(&self, id: &str, exec: &str) -> Result<ExitStatus, ContainerError> {
        let container = self.get(id)?;
        let process = container.process(exec)?;
        exec_happens(&container, exec, ExecEvent::Delete, "delete")?;
        container.record().execs.remove(exec);
        Ok(process.exit_status().unwrap_or(ExitStatus::LOST))
    }

    /// Removes a container that has ended or never ran.
    ///
    /// # Errors
    /// It runs, or something of it cannot be removed; the deletion can be tried again then.
    pub(crate) async fn delete(&self, id: &str) -> Result<ExitStatus, ContainerError> {
        let container = self.get(id)?;
        let process = container.process("")?;
        container.happens(ContainerEvent::Delete, "delete")?;
        let removed = async {
            container.cgroup.kill()?;
            exit_of(&process).await;
            settle(&container).await;
            self.remove_traces(&container).await
        };
        if let Err(error) = removed.await {
            container.happens(ContainerEvent::DeleteFailed, "delete")?;
            return Err(error);
        }
        container.happens(ContainerEvent::Deleted, "delete")?;
        self.table().remove(id);
        Ok(process.exit_status().unwrap_or(ExitStatus::LOST))
    }

    /// Ends every process of every container.
    pub(crate) async fn end_all(&self) {
        let all: Vec<Arc<Container>> = self.table().values().cloned().collect();
        for container in &all {
            if let Err(error) = container.cgroup.kill() {
                tracing::warn!("{error}");
            }
        }
        for _ in 0..SETTLE_TRIES {
            let runs = |container: &Arc<Container>| {
                let init = container.record().init.clone();
                init.is_some_and(|process| process.exit_status().is_none())
            };
            if !all.iter().any(runs) {
                return;
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
        tracing::warn!("containers still run after their end was asked for");
    }
}

/// Waits for processes that are being added: their helpers must not join a removed cgroup.
async fn settle(container: &Container) {
    for _ in 0..SETTLE_TRIES {
        let starting = |record: &ExecRecord| record.state == ExecState::Starting;
        if !container.record().execs.values().any(starting) {
            return;
        }
        let _ = container.cgroup.kill();
        tokio::time::sleep(SETTLE_PAUSE).await;
    }
}

fn reserve(container: &Container, exec: &str) -> Result<(), ContainerError> {
    let mut record = container.record();
    record.state.takes_exec().map_err(|source| ContainerError::State {
        action: "add a process to",
        name: format!("container {}", container.id),
        source,
    })?;
    if record.execs.contains_key(exec) {
        return Err(ContainerError::ExecExists {
            container: container.id.clone(),
            exec: exec.to_owned(),
        });
    }
    if record.execs.len() >= MAX_EXECS {
        return Err(ContainerError::TooManyExecs);
    }
    let fresh = ExecRecord { state: ExecState::Starting, process: None };
    record.execs.insert(exec.to_owned(), fresh);
    Ok(())
}

fn exec_happens(
    container: &Container,
    exec: &str,
    event: ExecEvent,
    action: &'static str,
) -> Result<(), ContainerError> {
    let mut record = container.record();
    let exec_record = record.execs.get_mut(exec).ok_or_else(|| ContainerError::NoExec {
        container: container.id.clone(),
        exec: exec.to_owned(),
    })?;
    exec_record.state = exec_record.state.next(event).map_err(|source| ContainerError::State {
        action,
        name: format!("process {exec}"),
        source,
    })?;
    Ok(())
}

async fn exit_of(process: &Process) -> ExitStatus {
    let mut exit = process.exit.clone();
    match exit.wait_for(Option::is_some).await {
        Ok(status) => status.unwrap_or(ExitStatus::LOST),
        Err(_) => ExitStatus::LOST,
    }
}

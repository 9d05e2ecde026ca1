//! The other half of this program: a single-threaded process that runs libcontainer once.
//!
//! libcontainer clones processes which go on running Rust code, so it must never be called from
//! the server with its runtime. The server starts `/proc/self/exe container ORDER` instead (see
//! [`crate::launch`]); this process makes the container's init process or an added process, which
//! the kernel gives to PID 1 when it ends, and leaves an [`Answer`] in a file.

mod entry;
mod executor;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Process, Spec};
use serde::{Deserialize, Serialize};

use crate::{log, network, sys};
use entry::Entry;
pub(crate) use executor::EXEC_PREFIX;
use executor::{ContainerExecutor, Filter};

/// The word on the command line that makes the program a helper.
pub(crate) const WORD: &str = "container";

/// What a helper is to do: the second word of its command line, in JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The container.
    pub(crate) id: String,
    /// Where config.json lies.
    pub(crate) bundle: PathBuf,
    /// Where libcontainer keeps its state.
    pub(crate) runtime: PathBuf,
    /// Where a pseudo-terminal's master goes; none without a terminal.
    pub(crate) console: Option<PathBuf>,
    /// The file for the [`Answer`].
    pub(crate) answer: PathBuf,
    /// The file for error lines, which exists already.
    pub(crate) errors: PathBuf,
    pub(crate) task: Task,
}

/// What kind of process is to be made.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// A container, stopped before execve(2). When that fails later, the reason is written to
    /// the inherited descriptor; when it succeeds, the descriptor closes.
    Create { exec_errors: RawFd },
    /// Another process in a running container; `process` is the file with its OCI process. `owner` is its user
    /// outside of the pod's user namespace.
    Exec { process: PathBuf, owner: u32 },
}

/// The pid, or one sentence.
pub(crate) type Answer = Result<i32, String>;

/// Runs one order.
pub(crate) fn run(order: &str) -> ExitCode {
    let order: Order = match serde_json::from_str(order) {
        Ok(order) => order,
        Err(error) => {
            eprintln!("vial-agent: no order for a helper: {error}");
            return ExitCode::from(2);
        }
    };
    if let Ok(errors) = OpenOptions::new().append(true).open(&order.errors) {
        log::start_helper(errors);
    }
    let answer: Answer = perform(&order).map_err(|error| describe(error.as_ref()));
    let written = serde_json::to_vec(&answer)
        .map_err(std::io::Error::from)
        .and_then(|json| fs::write(&order.answer, json));
    match (answer, written) {
        (Ok(_), Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn perform(order: &Order) -> Result<i32, Box<dyn Error>> {
    match &order.task {
        Task::Create { exec_errors } => {
            let exec_errors = File::from(sys::inherited_fd(*exec_errors)?);
            create(order, exec_errors)
        }
        Task::Exec { process, owner } => exec(order, process, *owner),
    }
}

fn builder(
    order: &Order,
    executor: ContainerExecutor,
) -> Result<ContainerBuilder, LibcontainerError> {
    Ok(ContainerBuilder::new(order.id.clone(), SyscallType::default())
        .with_executor(executor)
        .with_root_path(&order.runtime)?
        .with_console_socket(order.console.as_ref()))
}

fn create(order: &Order, exec_errors: File) -> Result<i32, Box<dyn Error>> {
    let executor = ContainerExecutor::for_init(Arc::new(exec_errors));
    let container = builder(order, executor)?
        .as_init(&order.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    let pid = container.pid().ok_or("libcontainer made a container without a pid")?.as_raw();
    let spec = Spec::load(order.bundle.join("config.json"))?;
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
    let is_network = |namespace: &LinuxNamespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
    };
    if namespaces.unwrap_or_default().iter().any(is_network) {
        bring_up_loopback_of(pid)?;
    }
    Ok(pid)
}

/// Brings up `lo` of a network namespace that is the container's alone. The helper goes there and
/// ends afterwards.
fn bring_up_loopback_of(pid: i32) -> Result<(), Box<dyn Error>> {
    setns(File::open(format!("/proc/{pid}/ns/net"))?, CloneFlags::CLONE_NEWNET)?;
    Ok(network::bring_up_loopback()?)
}

fn exec(order: &Order, path: &Path, owner: u32) -> Result<i32, Box<dyn Error>> {
    let spec = Spec::load(order.bundle.join("config.json"))?;
    let mut process: Process = serde_json::from_slice(&fs::read(path)?)?;
    let entry = Entry::new(&spec, &mut process, owner)?;
    // libcontainer leaves an added process without the container's filter; it is loaded by the
    // executor, which keeps the capabilities for that until then.
    let filter = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().clone())
        .map(|seccomp| Filter::new(seccomp, &mut process));
    if filter.is_some() || entry.is_some() {
        fs::write(path, serde_json::to_vec(&process)?)?;
    }
    let pid = builder(order, ContainerExecutor::for_exec(entry, filter))?
        .as_tenant()
        .with_detach(true)
        .with_process(Some(path))
        .build()?;
    Ok(pid.as_raw())
}

/// The error with its causes, each said once.
fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_are_said_once() {
        assert_eq!(describe(&Outer(std::io::Error::other("cause"))), "outer: cause");
        assert_eq!(describe(&Outer(std::io::Error::other("outer"))), "outer");
    }

    #[test]
    fn order_survives_its_json() {
        let order = Order {
            id: "a".into(),
            bundle: "/b".into(),
            runtime: "/r".into(),
            console: None,
            answer: "/b/answer".into(),
            errors: "/b/errors".into(),
            task: Task::Create { exec_errors: 7 },
        };
        let json = serde_json::to_string(&order).unwrap();
        let again: Order = serde_json::from_str(&json).unwrap();
        assert!(matches!(again.task, Task::Create { exec_errors: 7 }));
    }
}

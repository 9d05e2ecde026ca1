//! A container and its processes.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, atomic::AtomicU64},
};

use vial_agent_protocol::is_valid_id;

use crate::{error::ServiceError, process::Process};

/// The most execs that a container can have at one time.
pub const MAX_EXECS: usize = 1024;

/// A container of the sandbox.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Whether the guest has it. It has no pause container: the VM is what that stands for.
    pub in_guest: bool,
    /// Its init process.
    pub init: Arc<Process>,
    /// Its processes that ended for want of memory, as far as containerd was told.
    pub oom_kills: AtomicU64,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// A container whose init process is there.
    pub fn new(id: String, bundle: PathBuf, in_guest: bool, init: Process) -> Self {
        Self {
            id,
            bundle,
            in_guest,
            init: Arc::new(init),
            oom_kills: AtomicU64::new(0),
            execs: Mutex::default(),
        }
    }

    fn execs_mut(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The init process for an empty id, else the exec of that id.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, ServiceError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs_mut()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| ServiceError::NotFound { what: "exec", id: exec_id.into() })
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// [`ServiceError::Exists`], [`ServiceError::Invalid`] and [`ServiceError::Precondition`].
    pub fn add_exec(&self, exec: Process) -> Result<(), ServiceError> {
        if !is_valid_id(&exec.exec_id) {
            let text = format!("'{}' cannot be the id of an exec", exec.exec_id.escape_debug());
            return Err(ServiceError::Invalid(text));
        }
        let mut execs = self.execs_mut();
        if execs.contains_key(&exec.exec_id) {
            return Err(ServiceError::Exists { what: "exec", id: exec.exec_id });
        }
        if execs.len() >= MAX_EXECS {
            let text = format!("the container has {MAX_EXECS} execs already; delete some first");
            return Err(ServiceError::Precondition(text));
        }
        execs.insert(exec.exec_id.clone(), Arc::new(exec));
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs_mut().remove(exec_id);
    }

    /// All execs.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.execs_mut().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::{Places, Streams};

    fn container() -> Container {
        let init = Process::init(Places::default(), Streams::default());
        Container::new("demo".into(), "/bundle".into(), true, init)
    }

    fn exec(id: &str) -> Process {
        Process::exec(id.into(), Places::default(), Vec::new())
    }

    #[test]
    fn exec_is_found_once_added_and_until_removed() {
        let container = container();
        assert!(matches!(container.process("a"), Err(ServiceError::NotFound { .. })));
        container.add_exec(exec("a")).unwrap();
        assert!(matches!(container.add_exec(exec("a")), Err(ServiceError::Exists { .. })));
        assert_eq!(container.process("a").unwrap().exec_id, "a");
        container.remove_exec("a");
        assert!(container.process("a").is_err());
        assert!(container.process("").is_ok());
    }

    #[test]
    fn execs_beyond_the_bound_are_refused() {
        let container = container();
        for n in 0..MAX_EXECS {
            container.add_exec(exec(&n.to_string())).unwrap();
        }
        assert!(matches!(container.add_exec(exec("more")), Err(ServiceError::Precondition(_))));
        assert!(matches!(container.add_exec(exec("../x")), Err(ServiceError::Invalid(_))));
    }
}

//! The last steps before a container's own program: finding it and execve(2).
//!
//! Runs inside the container, as its user. The messages are worded as runc's users know them,
//! for Kubernetes and people look for `executable file not found in $PATH`.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::capabilities::drop_privileges;
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::{Capability, LinuxCapabilities, LinuxSeccomp, Process, Spec};

use super::entry::Entry;
use crate::sys;

/// How every message about an executable begins.
pub(crate) const EXEC_PREFIX: &str = "exec: \"";

/// Why the container's program does not run.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("the process has no arguments")]
    NoArguments,
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotFound(String),
    #[error("exec: {name:?}: {reason}")]
    Refused { name: String, reason: String },
    #[error("exec: {0:?}: an argument or variable holds a NUL byte")]
    Nul(String),
    #[error("cannot load the seccomp filter: {0}")]
    Filter(String),
    #[error("cannot enter the user namespace of the container: {0}")]
    Users(std::io::Error),
}

/// The container's seccomp filter for an added process, with the capabilities that loading it
/// takes and that go away afterwards.
#[derive(Clone)]
pub(crate) struct Filter {
    seccomp: LinuxSeccomp,
    capabilities: Option<LinuxCapabilities>,
}

impl Filter {
    /// Without no_new_privs a filter is loaded with CAP_SYS_ADMIN, and the capabilities are
    /// reduced with CAP_SETPCAP: `process` gets both until [`Filter::load`].
    pub(crate) fn new(seccomp: LinuxSeccomp, process: &mut Process) -> Self {
        let wanted = process.capabilities().clone();
        if process.no_new_privileges() == Some(true) {
            return Filter { seccomp, capabilities: None };
        }
        if let Some(mut more) = wanted.clone() {
            let needed = [Capability::SysAdmin, Capability::Setpcap];
            let with = |set: &Option<_>| {
                let mut set: oci_spec::runtime::Capabilities = set.clone().unwrap_or_default();
                set.extend(needed);
                Some(set)
            };
            more.set_bounding(with(more.bounding()));
            more.set_permitted(with(more.permitted()));
            more.set_effective(with(more.effective()));
            process.set_capabilities(Some(more));
        }
        Filter { seccomp, capabilities: wanted }
    }

    fn load(&self) -> Result<(), ExecError> {
        let listener = initialize_seccomp(&self.seccomp)
            .map_err(|error| ExecError::Filter(error.to_string()))?;
        if listener.is_some() {
            let reason = "SCMP_ACT_NOTIFY is not supported for added processes";
            return Err(ExecError::Filter(reason.to_owned()));
        }
        if let Some(capabilities) = &self.capabilities {
            drop_privileges(capabilities, create_syscall().as_ref())
                .map_err(|error| ExecError::Filter(error.to_string()))?;
        }
        Ok(())
    }
}

/// What libcontainer calls in the container's process.
#[derive(Clone)]
pub(crate) struct ContainerExecutor {
    exec_errors: Option<Arc<File>>,
    entry: Option<Entry>,
    filter: Option<Filter>,
}

impl ContainerExecutor {
    /// For a container's first process: a failure of execve(2) goes to `exec_errors`.
    pub(crate) fn for_init(exec_errors: Arc<File>) -> Self {
        ContainerExecutor { exec_errors: Some(exec_errors), entry: None, filter: None }
    }

    /// For an added process, whose failure libcontainer reports itself.
    pub(crate) fn for_exec(entry: Option<Entry>, filter: Option<Filter>) -> Self {
        ContainerExecutor { exec_errors: None, entry, filter }
    }

    /// The last steps of an added process but its program itself.
    fn confine(&self, process: &Process) -> Result<(), ExecError> {
        let load = || self.filter.as_ref().map_or(Ok(()), Filter::load);
        let Some(entry) = &self.entry else { return load() };
        let drop_privileges = || entry.drop_privileges().map_err(ExecError::Users);
        // Without no_new_privs the filter takes capabilities to be loaded.
        match process.no_new_privileges() {
            Some(true) => drop_privileges().and_then(|()| load()),
            _ => load().and_then(|()| drop_privileges()),
        }
    }

    fn execute(&self, spec: &Spec) -> Result<Infallible, ExecError> {
        let process = spec.process().as_ref().ok_or(ExecError::NoArguments)?;
        if let Some(entry) = &self.entry {
            entry.enter().map_err(ExecError::Users)?;
        }
        let (name, path) = find(process)?;
        let nul = |_| ExecError::Nul(name.to_owned());
        let program = CString::new(path.as_os_str().as_encoded_bytes()).map_err(nul)?;
        let arguments = process
            .args()
            .iter()
            .flatten()
            .map(|argument| CString::new(argument.as_str()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(nul)?;
        let environment = std::env::vars_os()
            .map(|(name, value)| {
                let mut variable = name.into_encoded_bytes();
                variable.push(b'=');
                variable.extend_from_slice(value.as_encoded_bytes());
                CString::new(variable)
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(nul)?;
        self.confine(process)?;
        sys::default_signals();
        nix::unistd::execve(&program, &arguments, &environment).map_err(|error| {
            ExecError::Refused { name: name.to_owned(), reason: lower(error.desc()) }
        })
    }
}

impl Executor for ContainerExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let found = spec.process().as_ref().ok_or(ExecError::NoArguments).and_then(find);
        found
            .map(drop)
            .map_err(|error| ExecutorValidationError::ArgValidationError(error.to_string()))
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let error = match self.execute(spec) {
            Ok(never) => match never {},
            Err(error) => error.to_string(),
        };
        if let Some(errors) = &self.exec_errors {
            let _ = (&**errors).write_all(error.as_bytes());
        }
        Err(ExecutorError::Other(error))
    }
}

/// The first argument, and the program that it names.
fn find(process: &Process) -> Result<(&str, PathBuf), ExecError> {
    let name = process
        .args()
        .as_ref()
        .and_then(|arguments| arguments.first())
        .ok_or(ExecError::NoArguments)?;
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok((name, PathBuf::from(name))),
            Err(reason) => Err(ExecError::Refused { name: name.clone(), reason }),
        };
    }
    let mut denied = None;
    for directory in search_path(process).split(':') {
        // An empty entry is the working directory.
        let directory = if directory.is_empty() { "." } else { directory };
        let path = Path::new(directory).join(name);
        match executable(&path) {
            Ok(()) => return Ok((name, path)),
            Err(reason) if path.is_file() => denied = Some(reason),
            Err(_) => {}
        }
    }
    match denied {
        Some(reason) => Err(ExecError::Refused { name: name.clone(), reason }),
        None => Err(ExecError::NotFound(name.clone())),
    }
}

fn search_path(process: &Process) -> &str {
    let variables = process.env().as_deref().unwrap_or_default();
    // The last one counts, as in the environment that the process gets.
    variables.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or("")
}

fn executable(path: &Path) -> Result<(), String> {
    let metadata = path
        .metadata()
        .map_err(|error| format!("stat {}: {}", path.display(), lower(&reason(&error))))?;
    if metadata.is_dir() {
        return Err("is a directory".to_owned());
    }
    // Root may access what no one may execute.
    let may = rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 || !may {
        return Err("permission denied".to_owned());
    }
    Ok(())
}

fn reason(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    }
}

fn lower(text: &str) -> String {
    text.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(name: &str, path: Option<&str>) -> Process {
        let mut process = Process::default();
        process.set_args(Some(vec![name.to_owned()]));
        process.set_env(path.map(|path| vec![format!("PATH={path}")]));
        process
    }

    fn message(name: &str, path: Option<&str>) -> String {
        find(&process(name, path)).unwrap_err().to_string()
    }

    #[test]
    fn executables_are_found_as_a_shell_finds_them() {
        let found = process("sh", Some("/nowhere:/bin"));
        assert_eq!(find(&found).unwrap().1, Path::new("/bin/sh"));
        assert_eq!(find(&process("/bin/sh", None)).unwrap().1, Path::new("/bin/sh"));
    }

    #[test]
    fn what_cannot_run_is_said_as_runc_says_it() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("plain"), "").unwrap();
        let here = directory.path().to_str().unwrap();
        assert_eq!(
            message("foo", Some("/bin")),
            "exec: \"foo\": executable file not found in $PATH"
        );
        assert_eq!(message("sh", None), "exec: \"sh\": executable file not found in $PATH");
        assert_eq!(
            message("/no/foo", None),
            "exec: \"/no/foo\": stat /no/foo: no such file or directory"
        );
        assert_eq!(message("/", None), "exec: \"/\": is a directory");
        assert_eq!(message("plain", Some(here)), "exec: \"plain\": permission denied");
        assert!(message("x", None).starts_with(EXEC_PREFIX));
    }

    #[test]
    fn filter_without_no_new_privs_borrows_capabilities() {
        let mut asked = process("sh", None);
        asked.set_no_new_privileges(None);
        let mut none = LinuxCapabilities::default();
        none.set_permitted(Some(Default::default()));
        asked.set_capabilities(Some(none.clone()));
        let seccomp: LinuxSeccomp =
            serde_json::from_str(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap();
        let filter = Filter::new(seccomp.clone(), &mut asked);
        let more = asked.capabilities().clone().unwrap();
        assert!(more.permitted().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert_eq!(filter.capabilities, Some(none.clone()));

        asked.set_no_new_privileges(Some(true));
        asked.set_capabilities(Some(none.clone()));
        let filter = Filter::new(seccomp, &mut asked);
        assert_eq!(asked.capabilities(), &Some(none));
        assert!(filter.capabilities.is_none());
    }
}

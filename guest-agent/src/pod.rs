//! What the containers of the pod share: the guest's name and kernel parameters, the memory in
//! /dev/shm, and, when they share process ids, an init for those.
//!
//! The network, IPC and UTS namespaces of the pod are the guest's own and need nothing, unless the pod has a
//! user namespace ([`users`]).

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, mount};
use vial_agent_protocol::MAX_SYSCTLS;
use vial_agent_protocol::agent::ConfigurePodRequest;
use vial_agent_protocol::users::Users;

use crate::container::Places;
use crate::sys;
use crate::users::{self, UserNamespaceError};

/// The words on the command line that make the program the maker of a PID namespace, and its init.
pub(crate) const MAKER_WORD: &str = "pid-namespace";
pub(crate) const INIT_WORD: &str = "pid-namespace-init";

/// The longest host name (HOST_NAME_MAX of Linux).
const MAX_HOSTNAME_BYTES: usize = 64;
/// The longest value of a kernel parameter, in bytes.
const MAX_SYSCTL_BYTES: usize = 4096;
/// Where kernel parameters are.
const SYSCTLS: &str = "/proc/sys";

/// Why something of the pod is not as it is asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    #[error("the host name has {0} bytes, more than the {MAX_HOSTNAME_BYTES} that it can have")]
    HostnameLength(usize),
    #[error("cannot set the host name: {0}")]
    Hostname(io::Error),
    #[error("the pod sets {0} kernel parameters, more than {MAX_SYSCTLS}")]
    TooManySysctls(usize),
    #[error("'{0}' is no kernel parameter of a guest")]
    UnknownSysctl(String),
    #[error("cannot set the kernel parameter {name} to {value:?}: {source}")]
    Sysctl { name: String, value: String, source: io::Error },
    #[error("cannot make the pod's shared memory at {path}: {source}")]
    SharedMemory { path: PathBuf, source: io::Error },
    #[error("cannot start the init of the pod's process ids: {0}")]
    Init(io::Error),
    #[error(transparent)]
    Users(#[from] UserNamespaceError),
}

impl PodError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        match self {
            PodError::HostnameLength(_)
            | PodError::TooManySysctls(_)
            | PodError::UnknownSysctl(_) => true,
            PodError::Sysctl { source, .. } => source.kind() == io::ErrorKind::InvalidInput,
            PodError::Users(error) => error.is_of_the_request(),
            _ => false,
        }
    }
}

/// Makes the pod's namespaces, if it has some, and sets the name and the kernel parameters.
///
/// # Errors
/// One cannot be set; those before it are.
pub(crate) fn configure(request: &ConfigurePodRequest, places: &Places) -> Result<(), PodError> {
    let sysctls = request.sysctls.len();
    if sysctls > MAX_SYSCTLS {
        return Err(PodError::TooManySysctls(sysctls));
    }
    let name = request.hostname.as_bytes();
    if name.len() > MAX_HOSTNAME_BYTES {
        return Err(PodError::HostnameLength(name.len()));
    }
    if let Some(users) = request.user_namespace.as_ref() {
        let users = Users::of_wire(users).map_err(UserNamespaceError::from)?;
        users::enter(users, places.sysfs.clone())?;
    }
    if !name.is_empty() {
        rustix::system::sethostname(name).map_err(|error| PodError::Hostname(error.into()))?;
    }
    for (name, value) in &request.sysctls {
        set_sysctl(Path::new(SYSCTLS), name, value)?;
    }
    Ok(())
}

fn set_sysctl(root: &Path, name: &str, value: &str) -> Result<(), PodError> {
    let unknown = || PodError::UnknownSysctl(name.chars().take(80).collect());
    if value.len() > MAX_SYSCTL_BYTES {
        return Err(unknown());
    }
    let path = root.join(sysctl_path(name).ok_or_else(unknown)?);
    if !path.is_file() {
        return Err(unknown());
    }
    // Those of IPC ask who is writing, and the others for capabilities.
    let written = match fs::write(&path, value) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            users::as_root_of_pod(|| fs::write(&path, value))
        }
        written => written,
    };
    written.map_err(|source| PodError::Sysctl {
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// The file of a kernel parameter, below /proc/sys. As in sysctl(8) the first separator of a name
/// tells which of `.` and `/` separates; the other one is part of a word then.
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let separator = name.chars().find(|c| matches!(c, '.' | '/'))?;
    let path: String = name
        .chars()
        .map(|c| match (c, separator) {
            ('.', '.') => '/',
            ('/', '.') => '.',
            (c, _) => c,
        })
        .collect();
    let word = |word: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.:@".contains(c);
        !word.is_empty() && word != "." && word != ".." && word.chars().all(allowed)
    };
    path.split('/').all(word).then(|| path.into())
}

/// What is made for the pod when a container first asks for it. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pod {
    shared_memory: PathBuf,
    made: Arc<Mutex<Made>>,
}

#[derive(Default)]
struct Made {
    shared_memory: bool,
    /// The pid of the init of the pod's process ids.
    init: Option<i32>,
}

impl Pod {
    /// Nothing yet; its shared memory will be at `shared_memory`.
    pub(crate) fn new(shared_memory: PathBuf) -> Self {
        Pod { shared_memory, made: Arc::default() }
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Where the pod's shared memory is; made with `bytes` of room the first time.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub(crate) fn shared_memory(&self, bytes: u64) -> Result<PathBuf, PodError> {
        let mut made = self.made();
        let path = &self.shared_memory;
        if !made.shared_memory {
            let failed = |source| PodError::SharedMemory { path: path.clone(), source };
            DirBuilder::new().recursive(true).mode(0o1777).create(path).map_err(failed)?;
            let options = format!("mode=1777,size={bytes}");
            // No text of digits holds a NUL.
            let options = std::ffi::CString::new(options).map_err(|error| failed(error.into()))?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            mount("shm", path, "tmpfs", flags, options.as_c_str())
                .map_err(|error| failed(error.into()))?;
            made.shared_memory = true;
        }
        Ok(path.clone())
    }

    /// The PID namespace of the pod, for setns(2); its init is started the first time.
    ///
    /// # Errors
    /// That cannot be done.
    pub(crate) fn pid_namespace(&self) -> Result<PathBuf, PodError> {
        let mut made = self.made();
        let pid = match made.init {
            Some(pid) => pid,
            None => start_init().map_err(PodError::Init)?,
        };
        made.init = Some(pid);
        Ok(pid_namespace_of(pid))
    }
}

/// The PID namespace that a process is in.
pub(crate) fn pid_namespace_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/pid"))
}

/// unshare(2) gives a new PID namespace to the children of the process that calls it, and there
/// is no way back; so a process that ends then makes it. Its child, the init, is an orphan then,
/// and the agent's.
fn start_init() -> io::Result<i32> {
    let mut maker = Command::new("/proc/self/exe")
        .arg(MAKER_WORD)
        .args(users::of_pod().map(|namespace| namespace.path()))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut pid = String::new();
    if let Some(output) = maker.stdout.take() {
        output.take(16).read_to_string(&mut pid)?;
    }
    pid.trim().parse().map_err(|_| io::Error::other("it did not start; see the kernel's log"))
}

/// Makes a PID namespace with an init, and prints the pid of that. It belongs to the user namespace `users`.
pub(crate) fn make_pid_namespace(users: Option<&Path>) -> ExitCode {
    let made = || -> io::Result<u32> {
        users.map_or(Ok(()), users::become_root_in)?;
        unshare(CloneFlags::CLONE_NEWPID)?;
        let init = Command::new("/proc/self/exe")
            .arg(INIT_WORD)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(init.id())
    };
    match made() {
        Ok(pid) => {
            println!("{pid}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vial-agent: cannot make a PID namespace: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The init of a PID namespace: collects orphans, and ends with the guest.
pub(crate) fn be_pid_namespace_init() -> ! {
    sys::collect_children_unseen();
    // Containers see this process; with its files hidden it shows them nothing of the guest's root.
    sys::hide_from_others();
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sysctls_are_files_below_their_root() {
        let path = |name| sysctl_path(name).map(|path| path.display().to_string());
        assert_eq!(path("net.core.somaxconn").unwrap(), "net/core/somaxconn");
        assert_eq!(
            path("net/ipv4/conf/eth0.1/rp_filter").unwrap(),
            "net/ipv4/conf/eth0.1/rp_filter"
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.rp_filter").unwrap(),
            "net/ipv4/conf/eth0.1/rp_filter"
        );
        for wrong in ["", "kernel", "a..b", "a/../b", "/a/b", "a.b\0", "a/b c", ".a"] {
            assert_eq!(path(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn sysctl_is_written_and_an_unknown_one_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("kernel")).unwrap();
        let file = root.path().join("kernel/shmmni");
        fs::write(&file, "1").unwrap();
        set_sysctl(root.path(), "kernel.shmmni", "77").unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), "77");
        for (name, value) in [("kernel.none", "1".into()), ("kernel.shmmni", "1".repeat(5000))] {
            let error = set_sysctl(root.path(), name, &value).unwrap_err();
            assert!(error.is_of_the_request() && error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn requests_beyond_the_bounds_are_refused() {
        let places = Places::below("/nowhere".as_ref(), PathBuf::new());
        let mut request = ConfigurePodRequest::new();
        request.hostname = "h".repeat(MAX_HOSTNAME_BYTES + 1);
        assert!(matches!(configure(&request, &places), Err(PodError::HostnameLength(65))));
        let mut request = ConfigurePodRequest::new();
        request.sysctls = (0..=MAX_SYSCTLS).map(|n| (format!("a.{n}"), String::new())).collect();
        assert!(matches!(configure(&request, &places), Err(PodError::TooManySysctls(257))));
    }

    proptest! {
        #[test]
        fn sysctl_never_leaves_its_root(name in "[a-z./]{0,16}") {
            if let Some(path) = sysctl_path(&name) {
                prop_assert!(path.is_relative());
                let mut parts = path.components();
                let normal = parts.all(|part| matches!(part, std::path::Component::Normal(_)));
                prop_assert!(normal);
            }
        }
    }
}

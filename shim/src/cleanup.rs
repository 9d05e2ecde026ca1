//! Removing what a shim left that is no longer there.
//!
//! containerd runs `containerd-shim-vial-v2 delete` when it finds a shim dead or cannot reach it.
//! Everything is found by the state directory, whichever step the start had come to.

use std::{
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal},
};

use crate::{
    bundles::{self, BundleError},
    config::Config,
    devices::{DeviceError, binding, pci::Sysfs},
    jail::{self, cgroup::Cgroup},
    network, share,
    spec::{Role, Spec},
    state_dir::{ProcessIdentity, State, StateDir, StateDirError},
};

/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long a shim may still be asked for containers that its VM took along.
const DELETE_PATIENCE: Duration = Duration::from_secs(2);
/// How long between two looks at whether they are gone.
const DELETE_PAUSE: Duration = Duration::from_millis(20);

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// See [`StateDirError`].
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// See [`share::ShareError`].
    #[error(transparent)]
    Share(#[from] share::ShareError),
    /// See [`network::NetworkError`].
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    /// See [`DeviceError`].
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// See [`jail::RecordError`].
    #[error(transparent)]
    Jail(#[from] jail::RecordError),
    /// See [`BundleError`].
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A process cannot be ended.
    #[error("cannot end the {what} (process {pid}): {error}")]
    Kill {
        /// Which one.
        what: &'static str,
        /// Its number.
        pid: u32,
        /// What went wrong.
        error: std::io::Error,
    },
}

/// Removes all that is left of the container `id`, and of its sandbox if that is the same, whose
/// shim serves, or served, `socket`. Returns the process number of the VMM that there was, or 0.
///
/// # Errors
/// [`CleanupError`]; what could be removed is removed.
pub fn clean(
    config: &Config,
    namespace: &str,
    id: &str,
    bundle: &Path,
    socket: &Path,
) -> Result<u32, CleanupError> {
    // A bundle that cannot be read does not keep the sandbox of that name from going.
    let role = Spec::read(bundle).ok().and_then(|(_, spec)| spec.role().ok());
    if let Some(Role::Member(sandbox)) = role {
        StateDir::new(&config.state_directory, namespace, id)?;
        let dir = StateDir::new(&config.state_directory, namespace, &sandbox)?;
        dir.share().remove_container(id)?;
        return Ok(0);
    }
    let dir = StateDir::new(&config.state_directory, namespace, id)?;
    let state = dir.read_state().unwrap_or_else(|error| {
        eprintln!("{error}");
        None
    });
    let vmm = state.as_ref().and_then(|state| state.vmm);
    let killed = match &state {
        Some(state) => {
            let_containers_go(state, &dir.share().containers, DELETE_PATIENCE);
            kill_both(state)
        }
        // It had not come to write anything down, or still is about to.
        None => server_of(socket).map_or(Ok(()), |shim| kill("shim", shim)),
    };
    // Before the network: what CNI had moved there goes there again.
    let given_back = match &state {
        Some(state) => binding::give_back(&Sysfs::default(), &state.devices),
        None => Ok(()),
    };
    let detached = match state.as_ref().and_then(|state| state.network.as_ref()) {
        Some(attachment) => network::detach(attachment),
        None => Ok(()),
    };
    share::unmount_below(dir.path())?;
    let removed = remove_container_cgroups(&dir);
    let released = match state.as_ref().and_then(|state| state.jail.as_ref()) {
        Some(record) => jail::release(&config.state_directory, namespace, id, record),
        None => jail::release_unrecorded(&config.state_directory, namespace, id),
    };
    // While something of it may run, they are in use.
    let forgotten = match &killed {
        Ok(()) => bundles::remove_all(&dir, id),
        Err(_) => Ok(()),
    };
    dir.remove()?;
    // They may have gone with their shim. An older shim may have had another.
    let _ = std::fs::remove_file(socket);
    if let Some(state) = state {
        let _ = std::fs::remove_file(state.socket);
    }
    killed?;
    removed?;
    detached?;
    given_back?;
    released?;
    forgotten?;
    Ok(vmm.map_or(0, |vmm| vmm.pid))
}

/// Waits while containerd deletes the containers of a VM that has ended, as long as the shim is there to answer.
///
/// containerd deletes a sandbox as soon as it hears of its end, and has its remains taken away, whatever containers there are. Of
/// one for which it is about to ask then, it says that there is none when the shim is gone, and leaves its bundle.
fn let_containers_go(state: &State, containers: &Path, patience: Duration) {
    let start = Instant::now();
    let has_ended = |process: ProcessIdentity| !process.is_alive();
    while state.vmm.is_none_or(has_ended)
        && state.shim.is_alive()
        && has_containers(containers)
        && start.elapsed() < patience
    {
        std::thread::sleep(DELETE_PAUSE);
    }
}

/// Whether a container is there that was not deleted ([`share`]).
fn has_containers(containers: &Path) -> bool {
    let entries = std::fs::read_dir(containers).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.path().join("rootfs").exists())
}

/// Removes the cgroups in which something connected to sockets of the host for a container. It has
/// ended with the shim, or ends by this.
fn remove_container_cgroups(dir: &StateDir) -> Result<(), CleanupError> {
    let made = dir.read_container_cgroups().unwrap_or_else(|error| {
        eprintln!("{error}");
        Vec::new()
    });
    let removed = made.iter().map(|path| Cgroup::new(path).remove());
    // All are tried.
    let removed: Vec<_> = removed.collect();
    removed.into_iter().collect::<Result<(), _>>().map_err(jail::RecordError::from)?;
    Ok(())
}

/// The process that listens on a socket.
fn server_of(socket: &Path) -> Option<ProcessIdentity> {
    let connection = UnixStream::connect(socket).ok()?;
    // Those of whoever called listen(2), see unix(7).
    let credentials = rustix::net::sockopt::socket_peercred(&connection).ok()?;
    ProcessIdentity::of(credentials.pid.as_raw_nonzero().get().try_into().ok()?)
}

fn kill_both(state: &State) -> Result<(), CleanupError> {
    // The shim first, lest it makes anew what is removed here.
    kill("shim", state.shim)?;
    state.vmm.map_or(Ok(()), |vmm| kill("VMM", vmm))
}

/// Kills a process, if it still is the one that was meant, and waits until it is gone.
fn kill(what: &'static str, process: ProcessIdentity) -> Result<(), CleanupError> {
    if process.pid == std::process::id() {
        return Ok(());
    }
    let failed = |error: rustix::io::Errno| CleanupError::Kill {
        what,
        pid: process.pid,
        error: error.into(),
    };
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    // Asked after opening: the descriptor stays with the process that is checked now.
    if !process.is_alive() {
        return Ok(());
    }
    match rustix::process::pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    let patience =
        Timespec { tv_sec: KILL_PATIENCE.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
    match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)) {
        Ok(0) => Err(failed(rustix::io::Errno::TIMEDOUT)),
        Ok(_) => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::state_dir::STATE_VERSION;

    fn config(root: &Path) -> Config {
        let text = format!("state_directory = {:?}", root.display().to_string());
        Config::parse(&text, Path::new("test.toml")).unwrap()
    }

    fn state(shim: Option<ProcessIdentity>, vmm: Option<ProcessIdentity>) -> State {
        State {
            version: STATE_VERSION,
            namespace: "default".into(),
            id: "demo".into(),
            shim: shim.unwrap_or(ProcessIdentity { pid: 1, start_ticks: u64::MAX }),
            vmm,
            network: None,
            devices: Vec::new(),
            jail: None,
            socket: "/nowhere".into(),
            vcpus: 1,
            memory_mib: 128,
            created_unix_seconds: 0,
        }
    }

    #[test]
    fn shim_has_the_time_in_which_its_last_containers_are_deleted() {
        let containers = tempfile::tempdir().unwrap();
        let (of, here) = (ProcessIdentity::of, containers.path());
        let alive = of(std::process::id());
        std::fs::create_dir_all(here.join("one/rootfs")).unwrap();
        std::fs::create_dir(here.join("volume")).unwrap();
        let waits = |state: &State, patience: Duration| {
            let start = Instant::now();
            let_containers_go(state, here, patience);
            start.elapsed()
        };
        let (long, short) = (Duration::from_secs(60), Duration::from_millis(100));
        // Nobody could answer, or nothing has ended.
        for state in [state(None, None), state(alive, alive)] {
            assert!(waits(&state, long) < long);
        }
        let ended = state(alive, Some(ProcessIdentity { pid: 1, start_ticks: u64::MAX }));
        assert!(waits(&ended, short) >= short);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(short);
                std::fs::remove_dir_all(here.join("one")).unwrap();
            });
            let waited = waits(&ended, long);
            assert!((short / 2..long).contains(&waited), "{waited:?}");
        });
    }

    #[test]
    fn recorded_processes_are_killed_and_files_removed() {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path());
        let dir = StateDir::new(root.path(), "default", "demo").unwrap();
        dir.create().unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let socket = root.path().join("socket");
        let claims = jail::user_ids::Claims::new(root.path());
        let range = jail::user_ids::Range { base: 70_000, count: 1 };
        let user_id = claims.claim(range, "default/demo").unwrap();
        std::fs::write(&socket, "").unwrap();
        dir.write_state(&State {
            jail: Some(jail::Record { user_id, cgroup: "vial-test/absent".into() }),
            socket: socket.clone(),
            ..state(None, ProcessIdentity::of(child.id()))
        })
        .unwrap();
        let nowhere = Path::new("/nowhere");
        let pid = clean(&config, "default", "demo", nowhere, nowhere).unwrap();
        assert_eq!(pid, child.id());
        assert!(!child.wait().unwrap().success());
        assert!(!dir.path().exists() && !socket.exists());
        assert_eq!(claims.claim(range, "default/other").unwrap(), user_id);
        // Once more, and for a start that came to nothing.
        assert_eq!(clean(&config, "default", "demo", nowhere, nowhere).unwrap(), 0);
    }

    #[test]
    fn damaged_state_does_not_keep_the_directory() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), "default", "demo").unwrap();
        dir.create().unwrap();
        std::fs::write(dir.path().join("state.json"), "{").unwrap();
        let claims = jail::user_ids::Claims::new(root.path());
        let range = jail::user_ids::Range { base: 70_000, count: 1 };
        claims.claim(range, "default/demo").unwrap();
        let nowhere = Path::new("/nowhere");
        clean(&config(root.path()), "default", "demo", nowhere, nowhere).unwrap();
        assert!(!dir.path().exists());
        claims.claim(range, "default/other").unwrap();
    }

    #[test]
    fn shim_that_wrote_nothing_down_is_found_by_its_socket() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let own = ProcessIdentity::of(std::process::id()).unwrap();
        assert_eq!(server_of(&socket), Some(own));
        drop(listener);
        assert_eq!(server_of(&socket), None);
        clean(&config(root.path()), "default", "demo", Path::new("/nowhere"), &socket).unwrap();
        assert!(!socket.exists());
    }
}

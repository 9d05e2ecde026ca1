//! One connection of the guest's to a socket of the host, from its number to its end.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::UnixStream,
    sync::watch,
};
use vial_agent_protocol::SOCKET_REACHED;

use super::{
    Common,
    connector::{ConnectError, Connector, User, make_cgroup},
    lock,
};
use crate::{
    jail::cgroup::{self, Cgroup},
    spec::Spec,
};

/// How long the guest may take to name a socket.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How often, and how long, it is tried anew while a server's queue is full.
const FULL_PAUSE: Duration = Duration::from_millis(10);
const FULL_PATIENCE: Duration = Duration::from_secs(30);

/// Who connects for a container.
#[derive(Debug)]
pub(super) struct Caller {
    container: String,
    user: User,
    /// As containerd names it.
    cgroup: Option<String>,
    /// There with the first connection.
    connector: tokio::sync::Mutex<Option<Connector>>,
    /// The cgroup that was made, below the root of the hierarchy.
    made: Mutex<Option<PathBuf>>,
    /// Changes when the container has gone.
    gone: watch::Receiver<()>,
}

impl Caller {
    pub(super) fn new(spec: &Spec, container: &str, gone: watch::Receiver<()>) -> Self {
        Self {
            container: container.into(),
            user: spec.user(),
            cgroup: spec.linux.cgroups_path.clone(),
            connector: tokio::sync::Mutex::default(),
            made: Mutex::default(),
            gone,
        }
    }

    /// Has that one connect, as if it had been started.
    #[cfg(test)]
    pub(super) async fn use_connector(&self, connector: Connector) {
        *self.connector.lock().await = Some(connector);
    }

    /// The directory of the cgroup in which a host's container would be. By it those who listen
    /// recognise a pod's container.
    fn enter_cgroup(&self, common: &Common) -> Result<PathBuf, ConnectError> {
        let own = match self.cgroup.as_deref().filter(|word| !word.is_empty()) {
            Some(word) => cgroup::path_of(word)?,
            None => Path::new("vial").join("containers").join(&self.container),
        };
        if common.pod_cgroup.as_ref() != Some(&own) {
            // Written down first, to be removed after a crash.
            *lock(&self.made) = Some(own.clone());
            common.write_cgroups();
        }
        make_cgroup(&own)
    }

    /// Connects, as soon as there is room among those that wait for the server.
    async fn connect(
        &self,
        common: &Common,
        base: &OwnedFd,
        path: &Path,
    ) -> Result<OwnedFd, ConnectError> {
        let asked = Instant::now();
        loop {
            match self.try_connect(common, base, path).await {
                Err(ConnectError::Refused(Errno::AGAIN)) if asked.elapsed() < FULL_PATIENCE => {
                    tokio::time::sleep(FULL_PAUSE).await;
                }
                tried => return tried,
            }
        }
    }

    async fn try_connect(
        &self,
        common: &Common,
        base: &OwnedFd,
        path: &Path,
    ) -> Result<OwnedFd, ConnectError> {
        let mut connector = self.connector.lock().await;
        if self.gone.has_changed().is_err() {
            return Err(ConnectError::Refused(Errno::CONNREFUSED));
        }
        let running = match connector.take() {
            Some(running) => running,
            None => Connector::start(&self.user, &self.enter_cgroup(common)?)?,
        };
        let connected = running.connect(base, path).await;
        // One that has failed is started anew for the next.
        if !matches!(connected, Err(ConnectError::Process { .. })) {
            *connector = Some(running);
        }
        connected
    }

    /// Ends the process, if there is one, and removes its cgroup. The container is not among the
    /// others any more.
    pub(super) fn end(&self, common: &Common) {
        // One that is asked just now goes with the connection that asks, and with its cgroup.
        if let Ok(mut connector) = self.connector.try_lock() {
            connector.take();
        }
        let Some(made) = lock(&self.made).take() else { return };
        if let Err(error) = Cgroup::new(&made).remove() {
            tracing::warn!("{}: {error}", self.container);
        }
        common.write_cgroups();
    }
}

impl Common {
    fn write_cgroups(&self) {
        let made: Vec<PathBuf> = {
            let containers = lock(&self.containers);
            containers.values().filter_map(|followed| lock(&followed.caller.made).clone()).collect()
        };
        // Without the directory the sandbox has gone, and all that is written down with it.
        if self.dir.path().exists()
            && let Err(error) = self.dir.write_container_cgroups(&made)
        {
            tracing::warn!("{error}");
        }
    }
}

/// Carries a connection, if it names a socket that there is.
pub(super) async fn carry(common: &Common, connection: OwnedFd) {
    let taken = || -> std::io::Result<UnixStream> {
        let connection = std::os::unix::net::UnixStream::from(connection);
        connection.set_nonblocking(true)?;
        UnixStream::from_std(connection)
    };
    let Ok(mut guest) = taken() else { return };
    let Ok(Ok(number)) = tokio::time::timeout(PATIENCE, guest.read_u64_le()).await else { return };
    let Some((volume, path, caller)) = common.target(number) else {
        tracing::warn!("the guest connected to a socket that it was not told of");
        return;
    };
    let mut gone = caller.gone.clone();
    let carried = async {
        let connected = caller.connect(common, &volume.base, &path).await;
        match connected.and_then(stream) {
            Ok(mut server) => {
                guest.write_u8(SOCKET_REACHED).await?;
                // An end of either side that is no good one ends both.
                copy_bidirectional(&mut guest, &mut server).await.map(drop)
            }
            Err(error) => {
                tracing::info!("{}: {}: {error}", caller.container, path.display());
                // Nobody may be there any more: the guest is told then.
                common.changed.notify_one();
                Ok(())
            }
        }
    };
    tokio::select! {
        _ = carried => {}
        _ = gone.changed() => {}
    }
}

fn stream(server: OwnedFd) -> Result<UnixStream, ConnectError> {
    // The connector has made it so that it does not block.
    UnixStream::from_std(server.into())
        .map_err(|error| ConnectError::Process { action: "take a connection of", error })
}

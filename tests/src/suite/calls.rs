//! Unix sockets: a server that echoes, and a caller, each for a host or for a case to run in a container.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use rustix::net::sockopt::socket_peercred;

/// Who has called, and whether the connection has ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) cgroup: String,
    pub(crate) has_ended: bool,
}

/// A server until it is dropped; its socket's file stays then.
pub(crate) struct Server {
    peers: Arc<Mutex<Vec<Peer>>>,
    listener: UnixListener,
}

fn lock(peers: &Mutex<Vec<Peer>>) -> MutexGuard<'_, Vec<Peer>> {
    peers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Server {
    /// Echoes what comes to a socket at `path`, and says how much it was when it has ended.
    pub(crate) fn start(path: &Path, mode: u32) -> Result<Self> {
        let listen = || -> io::Result<UnixListener> {
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
            Ok(listener)
        };
        let listener = listen().with_context(|| format!("listen on {}", path.display()))?;
        let peers = Arc::new(Mutex::new(Vec::new()));
        let (taking, known) = (listener.try_clone()?, peers.clone());
        std::thread::spawn(move || serve(&taking, &known));
        Ok(Self { peers, listener })
    }

    /// All who have called, in order.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        lock(&self.peers).clone()
    }

    /// Serves here and for ever, for a container.
    pub(crate) fn run(path: &Path) -> Result<()> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
        println!("listening");
        serve(&listener, &Arc::default());
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ends accept(2), and with it the thread.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

fn serve(listener: &UnixListener, peers: &Arc<Mutex<Vec<Peer>>>) {
    while let Ok((connection, _)) = listener.accept() {
        let peers = Arc::clone(peers);
        let number = {
            let mut peers = lock(&peers);
            peers.push(peer(&connection));
            peers.len() - 1
        };
        std::thread::spawn(move || {
            let _ = echo(connection);
            if let Some(peer) = lock(&peers).get_mut(number) {
                peer.has_ended = true;
            }
        });
    }
}

/// Who is at the other end, as the kernel says.
fn peer(connection: &UnixStream) -> Peer {
    let Ok(credentials) = socket_peercred(connection) else { return Peer::default() };
    let cgroup = format!("/proc/{}/cgroup", credentials.pid.as_raw_nonzero());
    Peer {
        uid: credentials.uid.as_raw(),
        gid: credentials.gid.as_raw(),
        cgroup: fs::read_to_string(cgroup).unwrap_or_default(),
        has_ended: false,
    }
}

fn echo(mut connection: UnixStream) -> io::Result<()> {
    let mut back = connection.try_clone()?;
    let bytes = io::copy(&mut connection, &mut back)?;
    // The other end can still listen.
    writeln!(back, "{bytes} bytes")?;
    back.shutdown(Shutdown::Both)
}

/// Sends the standard input to a socket, to its end, and prints all that comes back.
pub(crate) fn call(path: &Path) -> Result<()> {
    let mut connection =
        UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
    let mut sends = connection.try_clone()?;
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut sends);
        let _ = sends.shutdown(Shutdown::Write);
    });
    let mut text = Vec::new();
    connection.read_to_end(&mut text)?;
    anyhow::ensure!(!text.is_empty(), "the connection ended without a word");
    Ok(io::stdout().lock().write_all(&text)?)
}

//! Listens for control and stream connections and says when it does.
//!
//! In the guest that is vsock, where only the host (CID 2) is let in: a process of a container
//! can reach these ports, too. For a test it is a directory with Unix sockets of the same names.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, Stream as FuturesStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use ttrpc::r#async::transport::Listener as TtrpcListener;
use vial_agent_protocol::{AGENT_PORT, FORWARD_PORT, READY_PORT, STREAM_PORT, agent_ttrpc};

use crate::adopt::{self, Adoption};
use crate::boot;
use crate::container::{ContainerError, Containers, Places};
use crate::forward::Forwards;
use crate::marks::Mark;
use crate::reaper::Reaper;
use crate::service::AgentService;
use crate::shutdown::Shutdown;
use crate::sockets::Host;
use crate::streams::{Stream, Streams};

/// Control connections at one time: the shim needs one, a tool beside it another.
const MAX_CONTROL_CONNECTIONS: usize = 16;
/// The pause after accept(2) failed, for lack of descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the agent does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("cannot listen on {name}: {source}")]
    Listen { name: String, source: io::Error },
    #[error("cannot tell the host on vsock port {READY_PORT} that the agent is ready: {0}")]
    Ready(io::Error),
    #[error("cannot serve ttrpc: {0}")]
    Serve(ttrpc::Error),
    #[error("cannot collect ended processes: {0}")]
    Reap(io::Error),
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error(transparent)]
    Container(#[from] ContainerError),
}

/// Where connections come from.
pub(crate) enum Endpoint {
    Vsock,
    /// `agent.sock`, `stream.sock` and `forward.sock` in this directory, which exists. `host.sock` is
    /// where the host's sockets are reached.
    Directory(PathBuf),
}

enum Listener {
    Vsock(VsockListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(endpoint: &Endpoint, port: u32, file: &str) -> Result<Self, ServerError> {
        match endpoint {
            Endpoint::Vsock => VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
                .map(Listener::Vsock)
                .map_err(|source| ServerError::Listen {
                    name: format!("vsock port {port} (is there a virtio-vsock device?)"),
                    source,
                }),
            Endpoint::Directory(directory) => {
                let path = directory.join(file);
                UnixListener::bind(&path).map(Listener::Unix).map_err(|source| {
                    ServerError::Listen { name: path.display().to_string(), source }
                })
            }
        }
    }

    /// The next connection of the host.
    async fn accept(&self) -> Stream {
        loop {
            let accepted: io::Result<Option<Stream>> = match self {
                Listener::Vsock(listener) => listener.accept().await.map(|(stream, peer)| {
                    (peer.cid() == VMADDR_CID_HOST).then(|| Box::new(stream) as Stream)
                }),
                Listener::Unix(listener) => {
                    listener.accept().await.map(|(stream, _)| Some(Box::new(stream) as Stream))
                }
            };
            match accepted {
                Ok(Some(stream)) => return stream,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// A control connection, with its place among the few there may be.
struct Control {
    stream: Stream,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Control {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Control {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

fn control_connections(listener: Listener) -> impl FuturesStream<Item = io::Result<Control>> {
    let places = Arc::new(Semaphore::new(MAX_CONTROL_CONNECTIONS));
    stream::unfold((listener, places), |(listener, places)| async move {
        let control = loop {
            let stream = listener.accept().await;
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => break Control { stream, _place: place },
                Err(_) => tracing::warn!(
                    "control connection refused: there are {MAX_CONTROL_CONNECTIONS} already"
                ),
            }
        };
        Some((Ok(control), (listener, places)))
    })
}

/// Serves each connection in a task of its own.
async fn serve_each<F>(listener: Listener, serve: impl Fn(Stream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        tokio::spawn(serve(listener.accept().await));
    }
}

/// Serves until someone asks for the end.
///
/// # Errors
/// It cannot listen, or the host does not take the word that it does.
pub(crate) fn serve(
    endpoint: &Endpoint,
    places: Places,
    marks: Vec<Mark>,
) -> Result<(), ServerError> {
    // One thread: helpers are started without any other thread holding a lock or a descriptor.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ServerError::Runtime)?;
    runtime.block_on(serve_async(endpoint, places, marks))
}

async fn serve_async(
    endpoint: &Endpoint,
    places: Places,
    mut marks: Vec<Mark>,
) -> Result<(), ServerError> {
    places.prepare()?;
    let reaper = Reaper::default();
    let streams = Streams::new();
    let host = match endpoint {
        Endpoint::Vsock => Host::Vsock,
        Endpoint::Directory(directory) => Host::Unix(directory.join("host.sock")),
    };
    let containers = Containers::new(places, reaper.clone(), streams.clone(), host);
    let shutdown = Shutdown::default();

    // Who can ask can also open streams.
    let forwarded = Listener::bind(endpoint, FORWARD_PORT, "forward.sock")?;
    let stdio = Listener::bind(endpoint, STREAM_PORT, "stream.sock")?;
    let control = Listener::bind(endpoint, AGENT_PORT, "agent.sock")?;
    let reaping = tokio::spawn(reaper.run());
    tokio::spawn(serve_each(stdio, move |stream| {
        let streams = streams.clone();
        async move { streams.accept(stream).await }
    }));
    let forwards = Forwards::new();
    tokio::spawn(serve_each(forwarded, move |stream| {
        let forwards = forwards.clone();
        async move { forwards.serve(stream).await }
    }));
    marks.push(Mark::now("listening"));
    let is_template = matches!(endpoint, Endpoint::Vsock) && boot::is_template();
    let adoption = Arc::new(match is_template {
        true => {
            if let Err(error) = adopt::allocate_ahead() {
                tracing::warn!("every pod of this template will take more memory: {error}");
            }
            Adoption::of_nobody()
        }
        false => Adoption::of_pod(None),
    });
    let service =
        AgentService { containers, marks, shutdown: shutdown.clone(), adoption: adoption.clone() };
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(TtrpcListener::new(control_connections(control)))
        .register_service(agent_ttrpc::create_agent(Arc::new(service)));
    server.start().await.map_err(ServerError::Serve)?;
    if matches!(endpoint, Endpoint::Vsock) {
        let ready = adopt::connect_ready().await.map_err(ServerError::Ready)?;
        if !is_template {
            adoption.set_ready(Some(ready));
        }
    }

    tokio::select! {
        () = shutdown.asked() => Ok(()),
        ended = reaping => match ended {
            Ok(Err(error)) => Err(ServerError::Reap(error)),
            // It only comes back with an error.
            _ => Err(ServerError::Reap(io::Error::other("the reaper ended"))),
        },
    }
}

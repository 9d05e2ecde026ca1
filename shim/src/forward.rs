//! Forwarded ports: connections to the loopback of the pod's network namespace, led into the guest.
//!
//! `kubectl port-forward` ends in containerd, which enters the pod's network namespace and connects
//! to 127.0.0.1 there. With a container of the host's a process of the pod would listen; here the
//! shim does, on every port at once ([`network::take_loopback`]), and the agent connects to the
//! same port in the guest.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use vial_agent_protocol::{FORWARD_PORT, FORWARDED, MAX_FORWARDS};

use crate::{network, vmm_client::VmmClient};

/// The pause after accept(2) failed, for lack of descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the guest may take to reach its own port.
const PATIENCE: Duration = Duration::from_secs(10);

/// Leads connections into the guest until it is dropped. A pod whose ports cannot be forwarded runs
/// all the same.
pub(crate) async fn run(namespace: PathBuf, vmm: Arc<VmmClient>) {
    let taken = tokio::task::spawn_blocking(move || network::take_loopback(&namespace)).await;
    let loopback = match taken {
        Ok(Ok(loopback)) => loopback,
        Ok(Err(error)) => {
            tracing::warn!(
                "ports of the pod cannot be forwarded: {error}; that needs Linux 5.9 and bpf(2)"
            );
            return;
        }
        Err(error) => {
            tracing::error!("ports of the pod cannot be forwarded: {error}");
            return;
        }
    };
    let listener = loopback.listener;
    let listening = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
    match listening {
        Ok(listener) => accept(&listener, &vmm).await,
        Err(error) => tracing::error!("ports of the pod cannot be forwarded: {error}"),
    }
}

async fn accept(listener: &TcpListener, vmm: &Arc<VmmClient>) {
    let room = Arc::new(Semaphore::new(MAX_FORWARDS));
    loop {
        // Those beyond wait where the kernel keeps them.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let vmm = vmm.clone();
                tokio::spawn(async move {
                    forward(client, &vmm).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection for a forwarded port: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn forward(mut client: TcpStream, vmm: &VmmClient) {
    let reached = async {
        let refused = std::io::ErrorKind::ConnectionRefused;
        let port = client.local_addr()?.port();
        let mut guest = vmm.connect(FORWARD_PORT).await.map_err(std::io::Error::other)?;
        guest.write_u16_le(port).await?;
        match guest.read_u8().await {
            Ok(FORWARDED) => Ok(guest),
            Ok(_) | Err(_) => Err(std::io::Error::from(refused)),
        }
    };
    let reached = tokio::time::timeout(PATIENCE, reached).await;
    match reached.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
        Ok(mut guest) => {
            // An end of either side that is no good one ends both.
            let _ = copy_bidirectional(&mut client, &mut guest).await;
        }
        Err(error) => {
            tracing::info!("a port cannot be forwarded: {error}");
            // Reset, as nearly refused as a connection can be that was taken.
            let _ = client.set_zero_linger();
        }
    }
}

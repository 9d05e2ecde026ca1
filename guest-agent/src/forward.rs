//! Connections of the host to TCP ports of the guest's loopback, for forwarded ports.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use vial_agent_protocol::{FORWARDED, MAX_FORWARDS, STREAM_WAIT_SECONDS};

use crate::streams::Stream;

/// Leads each connection to its port. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Forwards {
    room: Arc<Semaphore>,
    patience: Duration,
}

impl Forwards {
    /// With the protocol's bound.
    pub(crate) fn new() -> Self {
        Self::with_patience(Duration::from_secs(STREAM_WAIT_SECONDS))
    }

    /// `patience` is how long the host may take to name a port.
    fn with_patience(patience: Duration) -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_FORWARDS)), patience }
    }

    /// Serves one connection to its end. Closes it when there are too many, when it names no port
    /// in time, or when nothing listens there.
    pub(crate) async fn serve(&self, mut host: Stream) {
        let Ok(_room) = Arc::clone(&self.room).try_acquire_owned() else {
            tracing::warn!("a forwarded port is refused: there are {MAX_FORWARDS} connections");
            return;
        };
        let Ok(Ok(port)) = timeout(self.patience, host.read_u16_le()).await else { return };
        let mut inside = match connect(port).await {
            Ok(inside) => inside,
            Err(error) => {
                tracing::info!("port {port} cannot be forwarded: {error}");
                return;
            }
        };
        if host.write_u8(FORWARDED).await.is_ok() {
            // An end of either side that is no good one ends both.
            let _ = copy_bidirectional(&mut host, &mut inside).await;
        }
    }
}

/// Whoever listens on either loopback.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => Ok(stream),
        Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;
    use tokio::net::TcpListener;

    use super::*;

    fn open(forwards: &Forwards) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64);
        let forwards = forwards.clone();
        tokio::spawn(async move { forwards.serve(Box::new(far)).await });
        near
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_ends_are_told() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let mut host = open(&Forwards::new());
            host.write_u16_le(listener.local_addr().unwrap().port()).await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            assert_eq!(host.read_u8().await.unwrap(), FORWARDED);
            host.write_all(b"asked").await.unwrap();
            host.shutdown().await.unwrap();
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "asked");
            server.write_all(b"told").await.unwrap();
            drop(server);
            text.clear();
            host.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "told");
        }
    }

    #[tokio::test]
    async fn port_where_nothing_listens_closes_the_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let mut host = open(&Forwards::new());
        host.write_u16_le(port).await.unwrap();
        assert!(host.read_u8().await.is_err());
    }

    #[tokio::test]
    async fn connections_beyond_the_bound_and_without_a_port_are_closed() {
        let forwards = Forwards::with_patience(Duration::from_millis(500));
        let waiting: Vec<_> = (0..MAX_FORWARDS).map(|_| open(&forwards)).collect();
        while forwards.room.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(open(&forwards).read_u8().await.is_err());
        assert_eq!(forwards.room.available_permits(), 0, "they have not named a port yet");
        for mut host in waiting {
            assert!(host.read_u8().await.is_err());
        }
        assert_eq!(forwards.room.available_permits(), MAX_FORWARDS);
    }
}

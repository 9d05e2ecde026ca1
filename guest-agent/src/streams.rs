//! Stdio streams on their way between their connection and the request that names them.
//!
//! A stream may come before or after its request. [`Streams`] brings both together, keeps at most
//! [`MAX_WAITING_STREAMS`] connections that nobody asked for yet, and none longer than
//! [`STREAM_WAIT_SECONDS`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;
use vial_agent_protocol::{MAX_WAITING_STREAMS, STREAM_WAIT_SECONDS, stream_id};

/// A connection with both directions.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Duplex for T {}

/// A stdio stream's connection, its header read.
pub(crate) type Stream = Box<dyn Duplex>;

/// Why a request does not get the stream it names.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum StreamError {
    /// Two requests name it.
    #[error("stream {0} is named by another request already")]
    Taken(u64),
    /// Nobody opened it.
    #[error("stream {0} was not opened within {STREAM_WAIT_SECONDS} seconds")]
    Missing(u64),
}

struct Arrived {
    stream: Stream,
    // Given back when the stream leaves the table.
    _room: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Table {
    arrived: HashMap<u64, Arrived>,
    wanted: HashMap<u64, oneshot::Sender<Stream>>,
}

/// Where streams and requests meet. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Streams {
    table: Arc<Mutex<Table>>,
    room: Arc<Semaphore>,
    wait: Duration,
}

impl Streams {
    /// With the protocol's bounds.
    pub(crate) fn new() -> Self {
        Self::with_wait(Duration::from_secs(STREAM_WAIT_SECONDS))
    }

    fn with_wait(wait: Duration) -> Self {
        Streams { table: Arc::default(), room: Arc::new(Semaphore::new(MAX_WAITING_STREAMS)), wait }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes a fresh connection: reads its header and keeps it for its request. Closes it when
    /// there are too many, when it says no id in time or when nobody asks for it in time.
    pub(crate) async fn accept(&self, mut stream: Stream) {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            tracing::warn!("stream refused: {MAX_WAITING_STREAMS} wait for their request already");
            return;
        };
        let mut header = [0; 8];
        let id = match timeout(self.wait, stream.read_exact(&mut header)).await {
            Ok(Ok(_)) => stream_id(header),
            Ok(Err(_)) | Err(_) => return,
        };
        if self.arrive(id, stream, room) {
            tokio::time::sleep(self.wait).await;
            if self.table().arrived.remove(&id).is_some() {
                tracing::warn!("stream {id} closed: no request named it");
            }
        }
    }

    /// Whether the stream has to wait for its request.
    fn arrive(&self, id: u64, stream: Stream, room: OwnedSemaphorePermit) -> bool {
        let mut table = self.table();
        if let Some(request) = table.wanted.remove(&id) {
            // A request that gave up in this instant lets go of the stream, too.
            let _ = request.send(stream);
            return false;
        }
        if id == 0 || table.arrived.contains_key(&id) {
            tracing::warn!("stream {id} refused: the id is in use");
            return false;
        }
        table.arrived.insert(id, Arrived { stream, _room: room });
        true
    }

    /// The stream `id`, waited for when it has not come yet; none for id 0.
    ///
    /// # Errors
    /// It does not come in time, or another request has named it.
    pub(crate) async fn claim(&self, id: u64) -> Result<Option<Stream>, StreamError> {
        if id == 0 {
            return Ok(None);
        }
        let stream = {
            let mut table = self.table();
            if let Some(arrived) = table.arrived.remove(&id) {
                return Ok(Some(arrived.stream));
            }
            if table.wanted.contains_key(&id) {
                return Err(StreamError::Taken(id));
            }
            let (sender, receiver) = oneshot::channel();
            table.wanted.insert(id, sender);
            receiver
        };
        match timeout(self.wait, stream).await {
            Ok(Ok(stream)) => Ok(Some(stream)),
            Ok(Err(_)) | Err(_) => {
                self.table().wanted.remove(&id);
                Err(StreamError::Missing(id))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use vial_agent_protocol::stream_header;

    use super::*;

    fn streams() -> Streams {
        Streams::with_wait(Duration::from_millis(100))
    }

    fn open(streams: &Streams, id: u64) -> tokio::io::DuplexStream {
        let (mut near, far) = tokio::io::duplex(64);
        let streams = streams.clone();
        tokio::spawn(async move { streams.accept(Box::new(far)).await });
        tokio::spawn(async move {
            near.write_all(&stream_header(id)).await.unwrap();
            near
        });
        tokio::io::duplex(1).0
    }

    #[tokio::test]
    async fn claim_before_the_stream_gets_it() {
        let streams = streams();
        let claim = tokio::spawn({
            let streams = streams.clone();
            async move { streams.claim(7).await }
        });
        tokio::task::yield_now().await;
        open(&streams, 7);
        assert!(claim.await.unwrap().unwrap().is_some());
    }

    #[tokio::test]
    async fn claim_after_the_stream_gets_it_once() {
        let streams = streams();
        open(&streams, 7);
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(streams.claim(7).await.unwrap().is_some());
        assert_eq!(streams.claim(7).await.err(), Some(StreamError::Missing(7)));
    }

    #[tokio::test]
    async fn claim_of_zero_is_no_stream() {
        assert!(streams().claim(0).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn second_claim_of_one_id_is_refused() {
        let streams = streams();
        let first = streams.claim(7);
        let second = async {
            tokio::task::yield_now().await;
            streams.claim(7).await
        };
        let (first, second) = tokio::join!(first, second);
        assert_eq!(first.err(), Some(StreamError::Missing(7)));
        assert_eq!(second.err(), Some(StreamError::Taken(7)));
    }

    #[tokio::test]
    async fn streams_beyond_the_bound_are_closed_and_the_rest_expires() {
        let streams = streams();
        for id in 1..=MAX_WAITING_STREAMS as u64 {
            open(&streams, id);
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(streams.table().arrived.len(), MAX_WAITING_STREAMS);
        let (mut near, far) = tokio::io::duplex(64);
        streams.accept(Box::new(far)).await;
        assert_eq!(near.read(&mut [0; 1]).await.unwrap(), 0);
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert!(streams.table().arrived.is_empty());
        assert_eq!(streams.room.available_permits(), MAX_WAITING_STREAMS);
    }
}

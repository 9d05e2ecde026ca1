//! A process's streams, copied between containerd's pipes and the guest.
//!
//! Each stream is a vsock connection of its own. Nothing is kept but one buffer a stream, and that
//! only while something is in it: whoever does not read makes whoever writes wait, as with a pipe.
//!
//! Where a stream goes is a URI of containerd's: a path or `fifo://` for a named pipe (or a
//! regular file), `file://` for a log file, nothing for `/dev/null`.

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    task::JoinHandle,
};
use vial_agent_protocol::{STREAM_PORT, agent, stream_header};

use crate::vmm_client::{VmmClient, VmmError};

/// Bytes that are on their way in one stream.
const BUFFER_BYTES: usize = 64 << 10;
/// How often a named pipe is tried that nobody reads yet.
const READER_POLL: Duration = Duration::from_millis(10);

/// What failed with a stream.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The place cannot be opened.
    #[error("cannot open {path} for the container's {stream}: {error}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// The file or pipe.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// The kind of place is not one that is supported.
    #[error("the container's {stream} cannot go to '{uri}': only pipes and file:// are supported")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// What was asked for.
        uri: String,
    },
    /// The stream to the guest cannot be opened.
    #[error("cannot connect the container's {stream} to the guest: {error}")]
    Connect {
        /// Which stream.
        stream: &'static str,
        /// What went wrong.
        error: VmmError,
    },
    /// The stream to the guest ended at once.
    #[error("cannot name the container's {stream} to the guest: {error}")]
    Header {
        /// Which stream.
        stream: &'static str,
        /// What went wrong.
        error: io::Error,
    },
}

/// Where containerd wants a process's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// One terminal instead of separate output and errors.
    pub terminal: bool,
    /// A URI, empty for none.
    pub stdin: String,
    /// A URI, empty for none.
    pub stdout: String,
    /// A URI, empty for none.
    pub stderr: String,
}

/// The parsed form of a URI.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Null,
    Pipe(PathBuf),
    File(PathBuf),
}

fn place(stream: &'static str, uri: &str) -> Result<Place, StdioError> {
    let (kind, path) = uri.split_once("://").unwrap_or(("fifo", uri));
    // A query (`file:///log?maxsize=…`) is for the logger of containerd, which is not this.
    let path = path.split('?').next().unwrap_or_default();
    match kind {
        "fifo" if path.is_empty() => Ok(Place::Null),
        "fifo" => Ok(Place::Pipe(path.into())),
        "file" if path.starts_with('/') => Ok(Place::File(path.into())),
        _ => Err(StdioError::Scheme { stream, uri: uri.chars().take(200).collect() }),
    }
}

/// The running streams of a process.
#[derive(Debug, Default)]
pub struct Streams {
    /// A writing end of stdin's pipe. While it is held, clients can come and go without the
    /// container seeing the end of its input.
    stdin: Mutex<Option<pipe::Sender>>,
    input: Mutex<Option<JoinHandle<()>>>,
    outputs: tokio::sync::Mutex<Vec<JoinHandle<()>>>,
    copied: Arc<AtomicU64>,
}

impl Streams {
    /// Opens a process's streams and begins to copy. `next_id` gives each its number in the
    /// sandbox, by which the request to the agent names it.
    ///
    /// # Errors
    /// [`StdioError`]. Streams that were opened until then end.
    pub async fn open(
        places: &Places,
        vmm: &VmmClient,
        next_id: &AtomicU64,
    ) -> Result<(Self, agent::Stdio), StdioError> {
        let streams = Self::default();
        let mut stdio = agent::Stdio { terminal: places.terminal, ..Default::default() };
        stdio.stdin = streams.input(&places.stdin, vmm, next_id).await?;
        stdio.stdout = streams.output("stdout", &places.stdout, vmm, next_id).await?;
        if !places.terminal {
            stdio.stderr = streams.output("stderr", &places.stderr, vmm, next_id).await?;
        }
        Ok((streams, stdio))
    }

    async fn input(
        &self,
        uri: &str,
        vmm: &VmmClient,
        next_id: &AtomicU64,
    ) -> Result<u64, StdioError> {
        let stream = "stdin";
        let path = match place(stream, uri)? {
            Place::Null => return Ok(0),
            Place::Pipe(path) => path,
            Place::File(_) => return Err(StdioError::Scheme { stream, uri: uri.into() }),
        };
        let open = |error| StdioError::Open { stream, path: path.clone(), error };
        let source = pipe::OpenOptions::new().open_receiver(&path).map_err(open)?;
        let held = pipe::OpenOptions::new().open_sender(&path).map_err(open)?;
        let (id, guest) = connect(stream, vmm, next_id).await?;
        let task = tokio::spawn(async move {
            if let Err(error) = copy_in(source, guest).await {
                tracing::debug!("the container's stdin broke: {error}");
            }
        });
        *lock(&self.stdin) = Some(held);
        *lock(&self.input) = Some(task);
        Ok(id)
    }

    async fn output(
        &self,
        stream: &'static str,
        uri: &str,
        vmm: &VmmClient,
        next_id: &AtomicU64,
    ) -> Result<u64, StdioError> {
        let open = |path: &Path, error| StdioError::Open { stream, path: path.into(), error };
        let (path, is_pipe) = match place(stream, uri)? {
            Place::Null => return Ok(0),
            Place::Pipe(path) => {
                let kind = std::fs::metadata(&path).map_err(|error| open(&path, error))?;
                let is_pipe = kind.file_type().is_fifo();
                (path, is_pipe)
            }
            Place::File(path) => (path, false),
        };
        let file = if is_pipe {
            None
        } else {
            Some(open_log(&path).await.map_err(|error| open(&path, error))?)
        };
        let (id, guest) = connect(stream, vmm, next_id).await?;
        let copied = self.copied.clone();
        let task = tokio::spawn(async move {
            let result = match file {
                Some(file) => copy_out(guest, file, &copied).await,
                None => copy_to_pipe(guest, &path, &copied).await,
            };
            if let Err(error) = result {
                tracing::warn!("the container's {stream} broke: {error}");
            }
        });
        self.outputs.lock().await.push(task);
        Ok(id)
    }

    /// Lets the process's stdin end when the last client has closed it.
    pub fn close_stdin(&self) {
        lock(&self.stdin).take();
    }

    /// Waits until all output has been written, then ends the streams. Output that has not moved
    /// for `patience` is given up: nobody reads it, or a process that was left behind holds it.
    pub async fn finish(&self, patience: Duration) {
        self.close_stdin();
        if let Some(input) = lock(&self.input).take() {
            input.abort();
        }
        let mut outputs = self.outputs.lock().await;
        for output in outputs.iter_mut() {
            loop {
                let before = self.copied.load(Ordering::Relaxed);
                if tokio::time::timeout(patience, &mut *output).await.is_ok() {
                    break;
                }
                if before == self.copied.load(Ordering::Relaxed) {
                    output.abort();
                    break;
                }
            }
        }
        outputs.clear();
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if let Some(input) = lock(&self.input).take() {
            input.abort();
        }
        for output in self.outputs.get_mut() {
            output.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

async fn connect(
    stream: &'static str,
    vmm: &VmmClient,
    next_id: &AtomicU64,
) -> Result<(u64, UnixStream), StdioError> {
    let id = next_id.fetch_add(1, Ordering::Relaxed);
    let mut guest =
        vmm.connect(STREAM_PORT).await.map_err(|error| StdioError::Connect { stream, error })?;
    guest
        .write_all(&stream_header(id))
        .await
        .map_err(|error| StdioError::Header { stream, error })?;
    Ok((id, guest))
}

async fn open_log(path: &Path) -> io::Result<tokio::fs::File> {
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await?;
    }
    tokio::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path).await
}

/// What can be read without waiting.
trait Ready {
    /// Waits for bytes or the end.
    async fn ready(&self) -> io::Result<()>;
    /// Takes what is there; nothing is the end.
    fn take(&self, buffer: &mut Vec<u8>) -> io::Result<usize>;
}

impl Ready for pipe::Receiver {
    async fn ready(&self) -> io::Result<()> {
        self.readable().await
    }

    fn take(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.try_read_buf(buffer)
    }
}

impl Ready for UnixStream {
    async fn ready(&self) -> io::Result<()> {
        self.readable().await
    }

    fn take(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.try_read_buf(buffer)
    }
}

/// The next bytes, with a buffer of their own: most streams are silent for most of a pod's life,
/// and none holds memory while it is. Nothing is the end.
async fn next(source: &impl Ready) -> io::Result<Vec<u8>> {
    loop {
        source.ready().await?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        match source.take(&mut buffer) {
            Ok(_) => return Ok(buffer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn copy_in(source: pipe::Receiver, mut guest: UnixStream) -> io::Result<()> {
    loop {
        let bytes = next(&source).await?;
        if bytes.is_empty() {
            break;
        }
        guest.write_all(&bytes).await?;
    }
    // The half-close is the end of the container's input. The rest of the connection stays until
    // the guest has taken all and closes it.
    guest.shutdown().await?;
    while guest.read(&mut [0; 16]).await? > 0 {}
    Ok(())
}

async fn copy_out(
    guest: UnixStream,
    mut sink: impl AsyncWrite + Unpin,
    copied: &AtomicU64,
) -> io::Result<()> {
    loop {
        let bytes = match next(&guest).await {
            Ok(bytes) if bytes.is_empty() => break,
            Ok(bytes) => bytes,
            // The VM is gone; what it said before has been read.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error),
        };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let written = sink.write(rest).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = &rest[written..];
            copied.fetch_add(written as u64, Ordering::Relaxed);
        }
    }
    sink.flush().await
}

/// Waits for somebody to read the pipe, then copies. The pipe's end is seen there only after all
/// that came before it.
async fn copy_to_pipe(guest: UnixStream, path: &Path, copied: &AtomicU64) -> io::Result<()> {
    let sink = loop {
        match pipe::OpenOptions::new().open_sender(path) {
            Ok(sink) => break sink,
            // A pipe that nobody reads cannot be opened for writing without waiting. Waiting for
            // that in a thread could never be ended.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
                tokio::time::sleep(READER_POLL).await;
            }
            Err(error) => return Err(error),
        }
    };
    // While this is held, clients can come and go without the container being told.
    let _held = pipe::OpenOptions::new().open_receiver(path)?;
    copy_out(guest, sink, copied).await
}

#[cfg(test)]
#[path = "stdio_tests.rs"]
mod tests;

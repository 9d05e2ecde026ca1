//! The file system device (virtio 1.2, 5.11): a directory of the host, served by virtiofsd's
//! library on a thread of its own.
//!
//! Nothing is opened by an absolute path. The library opens its root as `.`, so the working
//! directory of the process is set to the shared directory before it does; nothing else in the
//! VMM uses a relative path. It opens what it holds again through a directory like
//! `/proc/self/fd`, which the caller passes as a descriptor when the VMM has no `/proc`.
//!
//! Requests are served one after the other by one thread, since the library changes the thread's
//! effective user, and the process's umask, for requests that make files. A slow host file system
//! therefore delays the other requests of this guest. Locks never wait here: the guest's kernel
//! keeps them to itself.

mod confined;
mod view;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::process::{Resource, fchdir, getrlimit};
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};
use virtiofsd::server::Server;

use self::confined::Confined;
use self::view::View;
use crate::virtio::queue::Chain;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, Fault,
    QueueError, VirtioDevice, Worker, WorkerThread,
};

const DEVICE: &str = "fs";

/// The size of the tag in configuration space (virtio 1.2, 5.11.4).
const TAG_BYTES: usize = 36;
/// A `fuse_out_header`, which every reply begins with.
const REPLY_HEADER_BYTES: usize = 16;
/// Of the file descriptors that the process may have, those that the guest cannot use up.
const RESERVED_DESCRIPTORS: u64 = 192;
/// The fewest that a guest needs to start a container.
const MIN_GUEST_DESCRIPTORS: u64 = 64;
/// The most requests of one queue in one wake-up.
const REQUESTS_PER_WAKE: usize = 64;

/// How long the guest may keep names and attributes without asking again. What the host changes
/// in a name that the guest has seen shows after this time at the latest; a name that was not
/// there is never kept, so what the host adds shows at once.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("share a directory as {tag:?}: a tag has 1 to {TAG_BYTES} bytes and no NUL")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// The limit on open files leaves the guest too few.
    #[error(
        "share a directory as {tag:?}: the limit of {limit} open files is too low, \
         raise it to {} or more", RESERVED_DESCRIPTORS + MIN_GUEST_DESCRIPTORS
    )]
    Limit {
        /// The tag.
        tag: String,
        /// RLIMIT_NOFILE.
        limit: u64,
    },
    /// The root cannot be entered.
    #[error("share a directory as {tag:?}: enter it: {source}; it has to be a directory")]
    Root {
        /// The tag.
        tag: String,
        /// What the host said.
        source: io::Error,
    },
    /// The library refused to serve.
    #[error("share a directory as {tag:?}: {source}")]
    Serve {
        /// The tag.
        tag: String,
        /// What was refused.
        source: io::Error,
    },
}

/// The device.
pub struct Fs {
    /// The tag and the number of request queues (virtio 1.2, 5.11.4).
    config: [u8; TAG_BYTES + 4],
    share: Share,
    /// The server for the next activation, when it was made already.
    prepared: Option<PassthroughFs>,
}

/// What is shared, and how.
struct Share {
    tag: String,
    root: OwnedFd,
    proc_fd: Option<OwnedFd>,
    guest_descriptors: u64,
}

impl Fs {
    /// A device that shares the directory `root` as `tag`. `proc_fd` is a directory like
    /// `/proc/self/fd`; without it that one is opened. Sets the process's working directory.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(tag: &str, root: OwnedFd, proc_fd: Option<OwnedFd>) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_BYTES || tag.contains('\0') {
            return Err(FsError::Tag { tag: tag.to_owned() });
        }
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let guest_descriptors = limit.saturating_sub(RESERVED_DESCRIPTORS);
        if guest_descriptors < MIN_GUEST_DESCRIPTORS {
            return Err(FsError::Limit { tag: tag.to_owned(), limit });
        }
        let mut config = [0; TAG_BYTES + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_BYTES..].copy_from_slice(&1_u32.to_le_bytes());
        let share = Share { tag: tag.to_owned(), root, proc_fd, guest_descriptors };
        let prepared = Some(share.file_server()?);
        Ok(Self { config, share, prepared })
    }
}

impl Share {
    fn try_clone(&self) -> io::Result<Self> {
        let proc_fd = self.proc_fd.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { tag: self.tag.clone(), root: self.root.try_clone()?, proc_fd, ..*self })
    }

    /// Goes where the library takes its root from.
    fn enter(&self) -> Result<(), FsError> {
        fchdir(&self.root)
            .map_err(|error| FsError::Root { tag: self.tag.clone(), source: error.into() })
    }

    /// A server that has nothing open yet but the directories that it starts from.
    fn file_server(&self) -> Result<PassthroughFs, FsError> {
        self.enter()?;
        let serve = |source| FsError::Serve { tag: self.tag.clone(), source };
        let proc_fd = self.proc_fd.as_ref().map(OwnedFd::try_clone).transpose().map_err(serve)?;
        PassthroughFs::new(Config {
            root_dir: ".".into(),
            proc_sfd_rawfd: proc_fd.map(File::from),
            entry_timeout: KEPT_FOR,
            attr_timeout: KEPT_FOR,
            // Close-to-open: what the host writes shows when the guest opens the file again.
            cache_policy: CachePolicy::Auto,
            writeback: false,
            xattr: true,
            readdirplus: true,
            allow_direct_io: true,
            killpriv_v2: true,
            posix_acl: NegotiationMode::Auto,
            // Volumes and container roots are mounts of their own below the root: without this
            // the inode numbers of two of them would collide in the guest.
            announce_submounts: true,
            // Handles would need CAP_DAC_READ_SEARCH, which reaches out of the shared directory.
            inode_file_handles: InodeFileHandlesMode::Never,
            guest_fd_limit: self.guest_descriptors,
            ..Config::default()
        })
        .map_err(serve)
    }
}

impl VirtioDevice for Fs {
    fn id(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_FS
    }

    /// High priority, request (virtio 1.2, 5.11.2). A request of 1 MiB takes 260 descriptors.
    fn queue_sizes(&self) -> &[u16] {
        &[128, 1024]
    }

    fn features(&self) -> u64 {
        FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn config_is_as_saved(&self) -> bool {
        true
    }

    fn worker_thread(&self) -> WorkerThread {
        WorkerThread::FileServer
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        let refused = |reason: String| ActivateError { device: DEVICE, reason };
        let queues = [activation.take_queue(DEVICE, 0)?, activation.take_queue(DEVICE, 1)?];
        let share = self.share.try_clone().map_err(|error| refused(error.to_string()))?;
        let view = View::new(&activation.ram).map_err(|error| refused(error.to_string()))?;
        Ok(Box::new(FsWorker {
            server: self.prepared.take().map(serve),
            view,
            share,
            queues,
            fault: activation.fault,
            broken: false,
        }))
    }
}

fn serve(files: PassthroughFs) -> Server<Confined> {
    Server::new(Confined(files))
}

/// Serves the queues. What the guest had open is closed when this is dropped.
struct FsWorker {
    /// After a reset it is made anew, on the worker's thread: the vCPU's opens no files.
    server: Option<Server<Confined>>,
    view: View,
    share: Share,
    queues: [ActiveQueue; 2],
    fault: Fault,
    broken: bool,
}

impl FsWorker {
    fn serve(&mut self, index: usize) -> Result<(), QueueError> {
        // The library opens its root as `.` when the guest mounts, and there may be several
        // shares in the process.
        self.share.enter().map_err(|error| QueueError::Chain(error.to_string()))?;
        let Some(server) = &self.server else { return Ok(()) };
        let queue = &mut self.queues[index];
        queue.disable_kicks()?;
        for _ in 0..REQUESTS_PER_WAKE {
            match queue.pop()? {
                Some(chain) => {
                    let head = chain.head_index();
                    let written = answer(server, &self.view, chain)?;
                    queue.complete(head, written)?;
                    // One by one: the next request may take long.
                    queue.notify()?;
                }
                None if queue.enable_kicks()? => {}
                None => return Ok(()),
            }
        }
        // More is there: come back after the other queue had its turn.
        let _ = queue.kick_event().write(1);
        Ok(())
    }

    fn fail(&mut self, what: &dyn std::fmt::Display) {
        self.fault.report(DEVICE, what);
        self.broken = true;
    }
}

/// Answers one request; returns how many bytes of the reply are in guest memory.
fn answer(server: &Server<Confined>, view: &View, chain: Chain) -> Result<u32, QueueError> {
    let wrong = |error: virtiofsd::descriptor_utils::Error| QueueError::Chain(error.to_string());
    let reader = view.reader(chain.clone()).map_err(wrong)?;
    let writer = view.writer(chain).map_err(wrong)?;
    // Some requests have no reply (FORGET), and so no room for one. For the others the library
    // takes for granted that there is room for a header.
    let replies = writer.available_bytes() >= REPLY_HEADER_BYTES;
    let writer = if replies { writer } else { view.scratch_writer().map_err(wrong)? };
    match server.handle_message(reader, writer, None::<&mut ()>) {
        Ok(written) if replies => Ok(u32::try_from(written).unwrap_or(u32::MAX)),
        Ok(_) => Ok(0),
        Err(error) => {
            // The guest's driver makes an I/O error of an empty reply.
            tracing::debug!(%error, "the guest sent a file system request that cannot be read");
            Ok(0)
        }
    }
}

impl MutEventSubscriber for FsWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if self.server.is_none() {
            match self.share.file_server() {
                Ok(files) => self.server = Some(serve(files)),
                Err(error) => return self.fail(&error),
            }
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let events = Events::with_data(queue.kick_event(), index as u32, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "the fs device cannot listen to its queues");
                return self.fail(&error);
            }
            // The driver may have kicked before the worker listened.
            let _ = queue.kick_event().write(1);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let index = events.data() as usize;
        self.queues[index].acknowledge_kick();
        if self.broken {
            return;
        }
        if let Err(error) = self.serve(index) {
            self.fail(&error);
        }
    }
}

#[cfg(test)]
mod tests;

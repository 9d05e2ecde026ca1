//! A guest that is a template, and one that goes on from it.
//!
//! A template is a guest that was saved when its agent could serve. It belongs to no pod: nothing
//! of a host is mounted, and no connection is open. Every guest that goes on from it begins with
//! the same memory, so what has to be a pod's own is made so when the shim asks for it, before
//! anything else: random numbers, the time of day, devices, the share.
//!
//! What the kernel takes for the first container that it runs, a template has already
//! ([`allocate_ahead`]): pages that no guest writes are then one for all of them on the host.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::sync::watch;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use vial_agent_protocol::agent::{AdoptRequest, ResizeRequest};
use vial_agent_protocol::{READY_PORT, SEED_BYTES};

use crate::boot::{self, BootError};
use crate::cgroup;
use crate::devices::{DeviceError, Program};
use crate::fit::{self, Size};
use crate::functions::{self, FunctionError};
use crate::sys;

/// Why the guest does not become a pod's own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdoptError {
    #[error("this guest is no template, or was adopted before")]
    NotATemplate,
    #[error("the seed has {0} bytes, not {least} to {most}", least = SEED_BYTES.start(), most = SEED_BYTES.end())]
    Seed(usize),
    #[error("{0} ns since 1970 is no time of day")]
    Time(u64),
    #[error("cannot seed the kernel's random numbers: {0}")]
    Random(io::Error),
    #[error("cannot set the time of day: {0}")]
    Clock(io::Error),
    #[error(transparent)]
    Devices(#[from] FunctionError),
    #[error(transparent)]
    Share(#[from] BootError),
    #[error("{0} processors are not {least} to {most}", least = VCPUS.start(), most = VCPUS.end())]
    Vcpus(u32),
    #[error("the guest of the pod is not as large as its VM: {0}")]
    Size(String),
    #[error("cannot tell the host on vsock port {READY_PORT} that the agent is ready: {0}")]
    Ready(io::Error),
}

impl AdoptError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        matches!(self, Self::NotATemplate | Self::Seed(_) | Self::Time(_) | Self::Vcpus(_))
    }
}

/// Why a template has no cgroup to show what containers take.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AheadError {
    #[error("cannot make cgroup {path}: {source}")]
    Cgroup { path: String, source: io::Error },
    #[error(transparent)]
    Devices(#[from] DeviceError),
}

/// How many processors a guest can be asked to have: no more than its kernel knows (NR_CPUS).
const VCPUS: std::ops::RangeInclusive<u32> = 1..=64;

/// Below the root, for nobody: nothing is ever in it.
const AHEAD: &str = "/vial-template";

/// Makes a cgroup with device rules, as each container has, which stays.
///
/// With the first the kernel takes 2 MiB for BPF programs, which it fills to the end, and, when
/// what it began with is used up, another chunk of per-CPU memory with all that describes it. Both
/// are for many, and go only when nobody uses them.
///
/// # Errors
/// [`AheadError`]. Containers run without it, and take it themselves.
pub(crate) fn allocate_ahead() -> Result<(), AheadError> {
    let path = format!("{}{AHEAD}", cgroup::ROOT);
    fs::create_dir_all(&path)
        .map_err(|source| AheadError::Cgroup { path: path.clone(), source })?;
    Ok(Program::new(&[])?.attach(Path::new(&path))?)
}

/// Whom the guest belongs to.
#[derive(Debug)]
enum Owner {
    /// Nobody yet.
    Nobody,
    /// A pod. By the end of the connection the host learns of the agent's end.
    Pod { _ready: Option<VsockStream> },
}

/// Whether the guest has what its VM has.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Growth {
    Done,
    Pending,
    Failed(String),
}

/// Whom the guest belongs to, which changes at most once, and how far it has grown.
#[derive(Debug)]
pub(crate) struct Adoption {
    owner: Mutex<Owner>,
    /// Memory of a template, in bytes.
    memory_bytes: u64,
    /// The most memory that it has had, in bytes. One at a time changes the guest's size.
    raised_for: tokio::sync::Mutex<u64>,
    growth: watch::Sender<Growth>,
}

impl Adoption {
    /// A guest that was booted for a pod, with its connection to the host's ready port.
    pub(crate) fn of_pod(ready: Option<VsockStream>) -> Self {
        Self::new(Owner::Pod { _ready: ready })
    }

    /// A template.
    pub(crate) fn of_nobody() -> Self {
        Self::new(Owner::Nobody)
    }

    fn new(owner: Owner) -> Self {
        let growth = watch::Sender::new(Growth::Done);
        let memory_bytes = fit::memory_bytes();
        Self { owner: Mutex::new(owner), memory_bytes, raised_for: memory_bytes.into(), growth }
    }

    fn owner(&self) -> MutexGuard<'_, Owner> {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets who holds the connection to the ready port, when the agent has it.
    pub(crate) fn set_ready(&self, ready: Option<VsockStream>) {
        *self.owner() = Owner::Pod { _ready: ready };
    }

    /// Makes the guest that of the pod that asks. What it is to have more than the template may come
    /// later.
    ///
    /// # Errors
    /// [`AdoptError`]. A guest that is half of the way belongs to the pod, and is of no use.
    pub(crate) async fn adopt(&self, request: &AdoptRequest) -> Result<(), AdoptError> {
        let time = check(request)?;
        {
            let mut owner = self.owner();
            if !matches!(*owner, Owner::Nobody) {
                return Err(AdoptError::NotATemplate);
            }
            *owner = Owner::Pod { _ready: None };
        }
        // First: whatever follows may draw some.
        sys::seed_random(&request.seed).map_err(AdoptError::Random)?;
        clock_settime(ClockId::Realtime, time).map_err(|error| AdoptError::Clock(error.into()))?;
        self.grow(request);
        if request.new_devices {
            functions::rescan()?;
        }
        boot::mount_share()?;
        let ready = connect_ready().await.map_err(AdoptError::Ready)?;
        self.set_ready(Some(ready));
        Ok(())
    }

    /// Begins to make the guest as large as its VM.
    fn grow(&self, request: &AdoptRequest) {
        let size = Size {
            vcpus: request.vcpus,
            memory: self.memory_bytes.saturating_add(u64::from(request.more_memory_mib) << 20),
            raised_for: self.memory_bytes,
        };
        self.growth.send_replace(Growth::Pending);
        // Nobody else asks before the guest is adopted.
        if let Ok(mut raised_for) = self.raised_for.try_lock() {
            *raised_for = size.memory;
        }
        let growth = self.growth.clone();
        tokio::spawn(async move {
            growth.send_replace(match fit::grow(size).await {
                Ok(()) => Growth::Done,
                Err(error) => {
                    tracing::error!("{error}");
                    Growth::Failed(error.to_string())
                }
            });
        });
    }

    /// Makes the guest as large as its VM has become.
    ///
    /// # Errors
    /// [`AdoptError::Size`] says what it has not, and whoever asks then makes it as it was.
    pub(crate) async fn resize(&self, request: &ResizeRequest) -> Result<(), AdoptError> {
        if !VCPUS.contains(&request.vcpus) {
            return Err(AdoptError::Vcpus(request.vcpus));
        }
        self.grown().await?;
        let mut raised_for = self.raised_for.lock().await;
        let more = u64::from(request.more_memory_mib) << 20;
        let memory = self.memory_bytes.saturating_add(more);
        let size = Size { vcpus: request.vcpus, memory, raised_for: *raised_for };
        fit::grow(size).await.map_err(|error| AdoptError::Size(error.to_string()))?;
        *raised_for = memory.max(*raised_for);
        fit::shrink(request.vcpus).await;
        Ok(())
    }

    /// Waits until the guest is as large as its VM.
    ///
    /// # Errors
    /// [`AdoptError::Size`] says what it has not.
    pub(crate) async fn grown(&self) -> Result<(), AdoptError> {
        let mut growth = self.growth.subscribe();
        let now = growth.wait_for(|growth| *growth != Growth::Pending).await;
        match now.as_deref() {
            Ok(Growth::Failed(what)) => Err(AdoptError::Size(what.clone())),
            // The other end is this.
            _ => Ok(()),
        }
    }
}

/// Connects to the host's ready port.
///
/// # Errors
/// Nobody listens there.
pub(crate) async fn connect_ready() -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await
}

fn check(request: &AdoptRequest) -> Result<Timespec, AdoptError> {
    if !SEED_BYTES.contains(&request.seed.len()) {
        return Err(AdoptError::Seed(request.seed.len()));
    }
    const SECOND_NS: u64 = 1_000_000_000;
    let seconds = i64::try_from(request.realtime_ns / SECOND_NS);
    match (request.realtime_ns, seconds) {
        (1.., Ok(tv_sec)) => {
            Ok(Timespec { tv_sec, tv_nsec: (request.realtime_ns % SECOND_NS).cast_signed() })
        }
        _ => Err(AdoptError::Time(request.realtime_ns)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> AdoptRequest {
        let mut request = AdoptRequest::new();
        request.realtime_ns = 1_700_000_000_123_456_789;
        request.seed = vec![7; *SEED_BYTES.start()];
        request
    }

    #[test]
    fn request_is_checked_before_anything_is_changed() {
        let time = check(&request()).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_000, 123_456_789));
        for bytes in [0, SEED_BYTES.start() - 1, SEED_BYTES.end() + 1] {
            let mut request = request();
            request.seed = vec![0; bytes];
            assert!(matches!(check(&request), Err(AdoptError::Seed(found)) if found == bytes));
        }
        let mut request = request();
        request.realtime_ns = 0;
        assert!(matches!(check(&request), Err(AdoptError::Time(0))));
    }

    #[tokio::test]
    async fn guest_that_does_not_grow_says_what_it_has_not() {
        let adoption = Adoption::of_nobody();
        adoption.grown().await.unwrap();
        // Nothing more than the template has.
        adoption.grow(&request());
        assert_eq!(*adoption.growth.borrow(), Growth::Pending);
        adoption.grown().await.unwrap();
        adoption.growth.send_replace(Growth::Failed("no memory".into()));
        let error = adoption.grown().await.unwrap_err();
        assert!(error.to_string().contains("no memory") && !error.is_of_the_request(), "{error}");
    }

    #[tokio::test]
    async fn size_is_checked_before_anything_is_changed() {
        let adoption = Adoption::of_nobody();
        for vcpus in [0, VCPUS.end() + 1, u32::MAX] {
            let request = ResizeRequest { vcpus, ..Default::default() };
            let error = adoption.resize(&request).await.unwrap_err();
            assert!(matches!(error, AdoptError::Vcpus(found) if found == vcpus), "{error}");
            assert!(error.is_of_the_request());
        }
    }

    #[tokio::test]
    async fn guest_of_a_pod_is_not_adopted() {
        let adoption = Adoption::of_pod(None);
        let error = adoption.adopt(&request()).await.unwrap_err();
        assert!(matches!(error, AdoptError::NotATemplate), "{error}");
        assert!(error.is_of_the_request());
    }
}

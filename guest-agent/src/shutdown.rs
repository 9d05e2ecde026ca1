//! The end: file systems written back, the guest powered off.

use std::sync::Arc;
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use rustix::system::{RebootCommand, reboot};
use tokio::sync::Notify;

/// Time for the answer to the request, and for the last output, to leave the guest.
const GRACE: Duration = Duration::from_millis(20);

/// By which a request asks the program to end. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Shutdown(Arc<Notify>);

impl Shutdown {
    /// The server is to end.
    pub(crate) fn ask(&self) {
        self.0.notify_one();
    }

    /// Comes back a moment after someone asked.
    pub(crate) async fn asked(&self) {
        self.0.notified().await;
        tokio::time::sleep(GRACE).await;
    }
}

/// Writes everything back and powers the guest off. Comes back only when that is refused.
pub(crate) fn power_off(share: &std::path::Path) -> rustix::io::Errno {
    rustix::fs::sync();
    // Detached, for open files of a process that does not end must not hold up the end.
    if let Err(error) = unmount(share, UnmountFlags::DETACH) {
        tracing::warn!("cannot unmount the share: {error}");
    }
    match reboot(RebootCommand::PowerOff) {
        Ok(()) => rustix::io::Errno::INVAL,
        Err(error) => error,
    }
}

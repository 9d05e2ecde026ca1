//! The moments of the boot that the shim asks for.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A named moment on CLOCK_MONOTONIC.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    pub(crate) name: &'static str,
    pub(crate) at_ns: u64,
}

impl Mark {
    /// This moment.
    pub(crate) fn now(name: &'static str) -> Self {
        Mark { name, at_ns: now_ns() }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The monotonic clock never is negative, and 64 bits of nanoseconds last 584 years.
    let since_boot = Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
    since_boot.as_nanos() as u64
}

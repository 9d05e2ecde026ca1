//! Keeps what is not of a pod off the cores that the pod runs on, while it does.
//!
//! Threads of one core share caches and buffers, by which one can learn what the other works on.
//! With a cookie of its own (Linux, Documentation/admin-guide/hw-vuln/core-scheduling.rst) a VMM
//! shares a core at one time with its own threads and with nobody else's.

use std::{collections::HashMap, io};

use rustix::{
    io::Errno,
    process::Pid,
    thread::{CoreSchedulingScope, create_core_scheduling_cookie},
};

use crate::spec::start_of;

/// The annotation of a pod that asks for it. A pod cannot be without what the operator wants.
pub const ANNOTATION: &str = "io.vial/core-scheduling";

/// Where the kernel says it.
const SMT: &str = "/sys/devices/system/cpu/smt/active";

/// Why a pod shares cores though it should not.
#[derive(Debug, thiserror::Error)]
pub enum CoreSchedulingError {
    /// The annotation says something else.
    #[error("the annotation {ANNOTATION} is '{0}'; it can be true or false")]
    Annotation(String),
    /// The kernel cannot.
    #[error(
        "the pod is to have its cores to itself, and the host's kernel has no core scheduling; \
         use one with CONFIG_SCHED_CORE, or switch off SMT (`nosmt`)"
    )]
    Unsupported,
    /// The kernel refuses.
    #[error("cannot keep other processes off the cores of the VMM (process {pid}): {error}")]
    Refused {
        /// The VMM.
        pid: u32,
        /// What the kernel said.
        error: io::Error,
    },
}

/// What a pod's annotations say, if anything.
///
/// # Errors
/// [`CoreSchedulingError::Annotation`].
pub fn wanted(annotations: &HashMap<String, String>) -> Result<bool, CoreSchedulingError> {
    match annotations.get(ANNOTATION).map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(CoreSchedulingError::Annotation(start_of(other))),
    }
}

/// Gives a process a cookie of its own, and all threads that it makes from then on. Returns whether
/// it needs one: where no core has two threads, there is nothing to share.
///
/// # Errors
/// [`CoreSchedulingError`].
pub fn set_apart(pid: u32) -> Result<bool, CoreSchedulingError> {
    let refused = |error: io::Error| CoreSchedulingError::Refused { pid, error };
    let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Err(refused(Errno::SRCH.into()));
    };
    match create_core_scheduling_cookie(process, CoreSchedulingScope::ThreadGroup) {
        Ok(()) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        // A kernel without it does not say whether it would have been needed.
        Err(Errno::INVAL) if !shares_cores() => Ok(false),
        Err(Errno::INVAL) => Err(CoreSchedulingError::Unsupported),
        Err(error) => Err(refused(error.into())),
    }
}

/// Whether a core of this host has two threads (Linux, Documentation/ABI/testing/
/// sysfs-devices-system-cpu). It has when nobody says.
fn shares_cores() -> bool {
    std::fs::read_to_string(SMT).map_or(true, |text| text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotation_is_true_or_false() {
        let said = |value: &str| wanted(&HashMap::from([(ANNOTATION.into(), value.into())]));
        assert!(!wanted(&HashMap::new()).unwrap());
        assert!(said("true").unwrap() && !said("false").unwrap());
        for wrong in ["", "yes", "True", &"x".repeat(1000)] {
            let error = said(wrong).unwrap_err().to_string();
            assert!(error.contains(ANNOTATION) && error.len() < 200, "{error}");
        }
    }

    #[test]
    fn process_that_is_not_there_is_named() {
        let error = set_apart(0).unwrap_err().to_string();
        assert!(error.contains("process 0"), "{error}");
    }
}

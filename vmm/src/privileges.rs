//! What a thread may do on the host, and how it gives that up.
//!
//! The jail gives the process what its file server needs, and nothing more: a user that owns
//! nothing, and the capabilities to keep files' owners and modes as the guest sets them. Only the
//! file server's thread keeps those.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capabilities_secure_bits,
    set_capabilities, set_capabilities_secure_bits, set_name, set_thread_res_gid,
    set_thread_res_uid,
};

/// Why privileges could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {error}")]
pub struct PrivilegeError {
    action: &'static str,
    error: Errno,
}

fn failed(action: &'static str) -> impl FnOnce(Errno) -> PrivilegeError {
    move |error| PrivilegeError { action, error }
}

/// What the file server uses: owners, modes, set-id bits, file capabilities.
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP);

/// Prepares the process: nobody can look into its memory, and it has its name also when it was
/// executed by a descriptor.
///
/// # Errors
/// The kernel refuses.
pub fn prepare_process() -> Result<(), PrivilegeError> {
    set_name(c"vial-vmm").map_err(failed("name the process"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("shut the process's memory"))
}

/// Takes all capabilities from the calling thread, for good.
///
/// # Errors
/// The kernel refuses.
pub fn give_up_capabilities() -> Result<(), PrivilegeError> {
    keep(CapabilitySet::empty())
}

/// Leaves the calling thread what a file server needs. It acts as root from here on: that is who
/// files belong to that the guest's root makes. The library then takes on other users for theirs, and
/// keeps its capabilities: whether a process may make a file, its guest's kernel has checked, and one
/// with `CAP_DAC_OVERRIDE` may where the directory's mode does not let its user.
///
/// Without the right to do so, as when a user runs this program, all files are that user's.
///
/// # Errors
/// The kernel refuses.
pub fn become_file_server() -> Result<(), PrivilegeError> {
    let has = capabilities(None).map_err(failed("look at the thread's capabilities"))?.permitted;
    // A jail has set that before it took away the right to.
    if has.contains(CapabilitySet::SETPCAP) {
        let bits = capabilities_secure_bits().map_err(failed("look at the thread's rules"))?;
        set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)
            .map_err(failed("keep capabilities as another user"))?;
    }
    if has.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) {
        let (user, group) = (Uid::ROOT, Gid::ROOT);
        set_thread_res_gid(group, group, group).map_err(failed("take on the root group"))?;
        set_thread_res_uid(user, user, user).map_err(failed("take on the root user"))?;
    }
    keep(has & FILE_SERVER)
}

/// Keeps `set`, and nothing that a program would inherit.
fn keep(set: CapabilitySet) -> Result<(), PrivilegeError> {
    let sets =
        CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("give up capabilities"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_without_capabilities_stays_so() {
        let left = std::thread::spawn(|| {
            give_up_capabilities().unwrap();
            become_file_server().unwrap();
            capabilities(None).unwrap()
        });
        let left = left.join().unwrap();
        assert!(left.permitted.is_empty() && left.effective.is_empty(), "{left:?}");
        assert!(left.inheritable.is_empty());
    }

    #[test]
    fn file_server_keeps_no_more_than_it_needs() {
        let kept = std::thread::spawn(|| {
            become_file_server().unwrap();
            capabilities(None).unwrap()
        });
        let kept = kept.join().unwrap();
        assert!(FILE_SERVER.contains(kept.permitted), "{kept:?}");
        assert_eq!(kept.permitted, kept.effective);
    }
}

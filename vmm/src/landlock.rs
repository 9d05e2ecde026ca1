//! The second lock on the VMM's door: Landlock, on top of its jail and its system call filters.
//!
//! The jail decides which files there are. This decides what may be done with them at all, in the
//! jail and without one: no file is executed, no device node is made or controlled, no TCP socket
//! is bound or connected, nothing outside is signalled. Descriptors that the shim opened stay as
//! they are. (Kernel documentation, `userspace-api/landlock.rst`.)

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest interface whose rights are known here: Linux 6.12. An older kernel keeps to those
/// that it has.
const KNOWN: ABI = ABI::V6;

/// Why the process could not be restricted.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel refused the rules.
    #[error(
        "restrict the process by Landlock: {0}; the kernel refuses rules of its own interface, please report that"
    )]
    Rules(#[from] RulesetError),
    /// The root directory could not be named.
    #[error("open the root directory for Landlock: {0}")]
    Root(#[from] landlock::PathFdError),
}

/// Restricts the calling thread and those that it starts, for good: to be called before there are
/// others. Answers whether the kernel has Landlock, in part at least.
///
/// # Errors
/// [`LandlockError`].
pub fn restrict() -> Result<bool, LandlockError> {
    let files = AccessFs::from_all(KNOWN)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let restricted = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, files))?
        .restrict_self()?;
    Ok(restricted.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::process::Command;

    use super::*;

    const CHILD: &str = "VIAL_TEST_LANDLOCK";

    fn kind<T>(result: std::io::Result<T>) -> Option<ErrorKind> {
        result.err().map(|error| error.kind())
    }

    /// Not a test by itself: what a restricted process can and cannot do.
    #[test]
    fn child() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        assert!(restrict().unwrap(), "the kernel of this machine has no Landlock");

        std::fs::write(&file, "as before").unwrap();
        std::fs::rename(&file, directory.path().join("other")).unwrap();
        std::os::unix::fs::symlink("other", &file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "as before");

        let denied = Some(ErrorKind::PermissionDenied);
        assert_eq!(kind(Command::new("/bin/true").status()), denied);
        assert_eq!(kind(TcpListener::bind("127.0.0.1:0")), denied);
        let node = rustix::fs::mknodat(
            rustix::fs::CWD,
            directory.path().join("null"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::RUSR,
            rustix::fs::makedev(1, 3),
        );
        assert_eq!(node.map_err(|error| std::io::Error::from(error).kind()).err(), denied);
    }

    #[test]
    fn restricted_process_uses_files_and_neither_programs_nor_networks() {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "landlock::tests::child", "--test-threads", "1"])
            .env(CHILD, "yes")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    }
}

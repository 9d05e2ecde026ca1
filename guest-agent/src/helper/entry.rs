//! The way of an added process into the user namespace of its container, which libcontainer knows for first
//! processes alone.
//!
//! libcontainer makes it with all capabilities of the guest's root, so that it may go there as the last step before
//! its program runs. It is not to be seen or traced by the container's processes until then: what it has in
//! memory came from another user namespace.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use libcontainer::capabilities::{drop_privileges, reset_effective};
use libcontainer::syscall::syscall::create_syscall;
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxCapabilities, LinuxNamespaceType, Process, Spec, User};
use rustix::fs::{Uid as FileOwner, fchown};
use rustix::termios::isatty;
use rustix::thread::{
    Gid, Uid, set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// What a process becomes in its user namespace.
#[derive(Clone)]
pub(crate) struct Entry {
    namespace: Arc<File>,
    user: User,
    /// Who the user is outside.
    owner: u32,
    capabilities: Option<LinuxCapabilities>,
}

impl Entry {
    /// For a process of the container with that spec, if it is in a user namespace. `process` keeps all
    /// capabilities until [`Entry::enter`] and [`Entry::drop_privileges`]. `owner` is its user outside.
    ///
    /// # Errors
    /// The namespace is not where the spec says.
    pub(crate) fn new(spec: &Spec, process: &mut Process, owner: u32) -> io::Result<Option<Self>> {
        let Some(path) = user_namespace(spec) else { return Ok(None) };
        let namespace = Arc::new(File::open(path)?);
        let capabilities = process.capabilities().clone();
        process.set_capabilities(None);
        Ok(Some(Self { namespace, user: process.user().clone(), owner, capabilities }))
    }

    /// Makes this process, which has one thread, the user in the namespace. It has all capabilities there.
    ///
    /// # Errors
    /// The namespace does not have the user.
    pub(crate) fn enter(&self) -> io::Result<()> {
        // With a terminal, all streams are that.
        let stream = io::stdin();
        if isatty(&stream) {
            fchown(&stream, Some(FileOwner::from_raw(self.owner)), None)?;
        }
        setns(&*self.namespace, CloneFlags::CLONE_NEWUSER)?;
        set_keep_capabilities(true)?;
        let groups = self.user.additional_gids().iter().flatten();
        let groups: Vec<Gid> = groups.map(|id| Gid::from_raw(*id)).collect();
        set_thread_groups(&groups)?;
        let (uid, gid) = (Uid::from_raw(self.user.uid()), Gid::from_raw(self.user.gid()));
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        set_keep_capabilities(false)?;
        reset_effective(create_syscall().as_ref()).map_err(io::Error::other)
    }

    /// Leaves it the capabilities that it is to have.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn drop_privileges(&self) -> io::Result<()> {
        let Some(capabilities) = &self.capabilities else { return Ok(()) };
        drop_privileges(capabilities, create_syscall().as_ref()).map_err(io::Error::other)
    }
}

fn user_namespace(spec: &Spec) -> Option<&Path> {
    let linux = spec.linux().as_ref()?;
    let mut namespaces = linux.namespaces().iter().flatten();
    let users = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User)?;
    users.path().as_deref()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn process_keeps_its_capabilities_for_later_where_there_is_a_user_namespace() {
        let process = json!({"user": {"uid": 7, "gid": 8}, "cwd": "/", "args": ["x"],
            "capabilities": {"permitted": ["CAP_KILL"]}});
        let of = |namespaces| -> Spec {
            let spec = json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces}});
            serde_json::from_value(spec).unwrap()
        };
        let mut asked: Process = serde_json::from_value(process).unwrap();
        let before = asked.clone();
        assert!(Entry::new(&of(json!([{"type": "pid"}])), &mut asked, 7).unwrap().is_none());
        assert_eq!(asked, before);
        let there = of(json!([{"type": "user", "path": "/proc/self/ns/user"}]));
        let entry = Entry::new(&there, &mut asked, 7).unwrap().unwrap();
        assert_eq!((&entry.capabilities, asked.capabilities()), (before.capabilities(), &None));
        let nowhere = of(json!([{"type": "user", "path": "/proc/nowhere"}]));
        Entry::new(&nowhere, &mut asked, 7).err().unwrap();
    }
}

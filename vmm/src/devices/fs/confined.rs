//! The library's file system, for names that are names only.
//!
//! The library passes the guest's names on to `mkdirat`, `unlinkat`, `renameat` and the like as
//! they are. A guest's kernel never sends one with a slash; a hostile guest would leave the shared
//! directory with `../../etc`. Such names are refused here, so that the share is confined whatever
//! the process's root directory is.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use rustix::process::{getegid, geteuid};
use rustix::thread::{Gid, Uid, set_thread_res_gid, set_thread_res_uid};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::soft_idmap::Id;

/// `NAME_MAX` of Linux.
const MAX_NAME_BYTES: usize = 255;

/// Refuses what is not the name of an entry of a directory.
fn checked(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.len() > MAX_NAME_BYTES => {
            Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG))
        }
        _ => Ok(name),
    }
}

/// A [`PassthroughFs`] that takes entries' names only.
pub(super) struct Confined(pub(super) PassthroughFs);

impl Confined {
    /// Does what makes a name in the directory `parent`, as its owner if it has to be somebody who exists there.
    ///
    /// In an idmapped mount nobody else can make one, whatever they may do: Linux refuses it with EOVERFLOW
    /// (`may_create`). Who asks is in no request but those that make files. The guest's kernel has checked whether they
    /// may, and no file comes to belong to anybody by it.
    fn as_owner<T>(
        &self,
        context: Context,
        parent: Node,
        request: impl Fn() -> io::Result<T>,
    ) -> io::Result<T> {
        match request() {
            Err(error) if error.raw_os_error() == Some(libc::EOVERFLOW) => {}
            done => return done,
        }
        let (attributes, _) = self.0.getattr(context, parent, None)?;
        let _owner = Owner::become_one(attributes.uid.into_inner(), attributes.gid.into_inner())?;
        request()
    }
}

/// This thread is somebody else until this is dropped, with the capabilities that it has.
struct Owner {
    uid: Uid,
    gid: Gid,
}

impl Owner {
    fn become_one(uid: u32, gid: u32) -> io::Result<Self> {
        let before = Self { uid: geteuid(), gid: getegid() };
        set_thread_res_gid(None, Gid::from_raw(gid), None)?;
        // Dropped, and so taken back, if it fails.
        set_thread_res_uid(None, Uid::from_raw(uid), None)?;
        Ok(before)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // To what its real and saved ids still are, which is always allowed.
        let back = set_thread_res_uid(None, self.uid, None)
            .and_then(|()| set_thread_res_gid(None, self.gid, None));
        if let Err(error) = back {
            // Whatever it did next it would do as somebody of the guest's choice.
            panic!("cannot become the file server again: {error}");
        }
    }
}

type Node = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;
type Opened = (Option<Handle>, OpenOptions);

/// Passes requests that have no name of an entry on as they are.
macro_rules! pass_on {
    ($($request:ident($($argument:ident: $kind:ty),*) -> $reply:ty;)*) => {
        $(fn $request(&self, $($argument: $kind),*) -> $reply {
            self.0.$request($($argument),*)
        })*
    };
}

impl FileSystem for Confined {
    type Inode = Node;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    pass_on! {
        init(capable: FsOptions) -> io::Result<FsOptions>;
        destroy() -> ();
        forget(context: Context, node: Node, count: u64) -> ();
        batch_forget(context: Context, requests: Vec<(Node, u64)>) -> ();
        getattr(context: Context, node: Node, handle: Option<Handle>)
            -> io::Result<(Attr, Duration)>;
        setattr(context: Context, node: Node, attributes: SetattrIn, handle: Option<Handle>,
            valid: SetattrValid) -> io::Result<(Attr, Duration)>;
        readlink(context: Context, node: Node) -> io::Result<Vec<u8>>;
        open(context: Context, node: Node, kill_privileges: bool, flags: u32)
            -> io::Result<Opened>;
        flush(context: Context, node: Node, handle: Handle, owner: u64) -> io::Result<()>;
        fsync(context: Context, node: Node, data: bool, handle: Handle) -> io::Result<()>;
        fallocate(context: Context, node: Node, handle: Handle, mode: u32, offset: u64,
            bytes: u64) -> io::Result<()>;
        release(context: Context, node: Node, flags: u32, handle: Handle, flush: bool,
            unlock: bool, owner: Option<u64>) -> io::Result<()>;
        statfs(context: Context, node: Node) -> io::Result<libc::statvfs64>;
        setxattr(context: Context, node: Node, name: &CStr, value: &[u8], flags: u32,
            extra: SetxattrFlags) -> io::Result<()>;
        getxattr(context: Context, node: Node, name: &CStr, size: u32)
            -> io::Result<GetxattrReply>;
        listxattr(context: Context, node: Node, size: u32) -> io::Result<ListxattrReply>;
        removexattr(context: Context, node: Node, name: &CStr) -> io::Result<()>;
        opendir(context: Context, node: Node, flags: u32) -> io::Result<Opened>;
        readdir(context: Context, node: Node, handle: Handle, size: u32, offset: u64)
            -> io::Result<Self::DirIter>;
        fsyncdir(context: Context, node: Node, data: bool, handle: Handle) -> io::Result<()>;
        releasedir(context: Context, node: Node, flags: u32, handle: Handle) -> io::Result<()>;
        access(context: Context, node: Node, mask: u32) -> io::Result<()>;
        lseek(context: Context, node: Node, handle: Handle, offset: u64, whence: u32)
            -> io::Result<u64>;
        copyfilerange(context: Context, from: Node, from_handle: Handle, from_offset: u64,
            to: Node, to_handle: Handle, to_offset: u64, bytes: u64, flags: u64)
            -> io::Result<usize>;
        syncfs(context: Context, node: Node) -> io::Result<()>;
    }

    fn lookup(&self, context: Context, parent: Node, name: &CStr) -> io::Result<Entry> {
        self.0.lookup(context, parent, checked(name)?)
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: Node,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.0.symlink(context, target, parent, checked(name)?, extensions)
    }

    fn mknod(
        &self,
        context: Context,
        parent: Node,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.0.mknod(context, parent, checked(name)?, mode, device, umask, extensions)
    }

    fn mkdir(
        &self,
        context: Context,
        parent: Node,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.0.mkdir(context, parent, checked(name)?, mode, umask, extensions)
    }

    fn unlink(&self, context: Context, parent: Node, name: &CStr) -> io::Result<()> {
        self.0.unlink(context, parent, checked(name)?)
    }

    fn rmdir(&self, context: Context, parent: Node, name: &CStr) -> io::Result<()> {
        self.0.rmdir(context, parent, checked(name)?)
    }

    fn rename(
        &self,
        context: Context,
        from: Node,
        from_name: &CStr,
        to: Node,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (from_name, to_name) = (checked(from_name)?, checked(to_name)?);
        self.as_owner(context, to, || self.0.rename(context, from, from_name, to, to_name, flags))
    }

    fn link(&self, context: Context, node: Node, parent: Node, name: &CStr) -> io::Result<Entry> {
        let name = checked(name)?;
        self.as_owner(context, parent, || self.0.link(context, node, parent, name))
    }

    fn create(
        &self,
        context: Context,
        parent: Node,
        name: &CStr,
        mode: u32,
        kill_privileges: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        let name = checked(name)?;
        self.0.create(context, parent, name, mode, kill_privileges, flags, umask, extensions)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        context: Context,
        node: Node,
        handle: Handle,
        writer: W,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.0.read(context, node, handle, writer, size, offset, owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        context: Context,
        node: Node,
        handle: Handle,
        reader: R,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        delayed: bool,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<usize> {
        self.0.write(
            context,
            node,
            handle,
            reader,
            size,
            offset,
            owner,
            delayed,
            kill_privileges,
            flags,
        )
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", "/", "a/b", "../etc", "/etc", "a/"] {
            assert!(checked(&CString::new(name).unwrap()).is_err(), "{name}");
        }
        for name in ["a", "...", ".hidden", "..a", "a\\b", "a b"] {
            assert!(checked(&CString::new(name).unwrap()).is_ok(), "{name}");
        }
    }

    #[test]
    fn name_beyond_the_longest_is_refused() {
        assert!(checked(&CString::new("x".repeat(255)).unwrap()).is_ok());
        let error = checked(&CString::new("x".repeat(256)).unwrap()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    }
}

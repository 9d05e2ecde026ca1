//! How a jailed VMM comes to rings of io_uring for its disks, without being able to make one.
//!
//! A ring cannot be sent over a socket, and one that the jail let the VMM make could be any: no filter looks into what it
//! does. So a filter below the base filter holds the VMM's request for a ring ([`vial_ring::REQUEST`], arguments of
//! io_uring_setup(2) that the kernel itself refuses) until the shim answers it (seccomp_unotify(2)), which it does when it
//! gives the VM a disk: with a ring for that disk, restricted before the VMM has it. Whoever asks when there is no disk, waits;
//! whoever asks otherwise, is refused by the base filter, which comes first.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use seccompiler::{BpfProgram, sock_filter};
use tokio::io::{Interest, unix::AsyncFd};
use vial_ring::REQUEST;

// Requests of a filter's listener: `_IOWR('!', number, size)` (linux/seccomp.h).
const RECEIVE: libc::Ioctl = request(3, size_of::<libc::seccomp_notif>(), 0);
const SEND: libc::Ioctl = request(3, size_of::<libc::seccomp_notif_resp>(), 1);
const ADD_DESCRIPTOR: libc::Ioctl = request(1, size_of::<libc::seccomp_notif_addfd>(), 3);
/// The descriptor's number is what the call returns (Linux 5.14).
const ADD_AND_SEND: u32 = 1 << 1;

const fn request(direction: u64, size: usize, number: u64) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | (b'!' as u64) << 8 | number) as libc::Ioctl
}

// Linux include/uapi/linux/bpf_common.h, and where `struct seccomp_data` has what is asked.
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const NUMBER: u32 = 0;
const ARGUMENTS: [u32; 4] = [16, 20, 24, 28];

/// The filter that holds requests for rings, and lets all else through. What calls by another architecture's numbers is the
/// base filter's to kill.
pub(super) fn filter() -> BpfProgram {
    let step = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    let (entries, address) = REQUEST;
    let mut wanted = vec![(NUMBER, libc::SYS_io_uring_setup as u32)];
    wanted.extend(ARGUMENTS.into_iter().zip([entries, 0, address, 0]));
    // The upper half of a number of 32 bits is not looked at by the kernel either.
    wanted.retain(|(at, _)| *at != ARGUMENTS[1]);
    let checks = wanted.len();
    let mut program = Vec::new();
    for (index, (at, value)) in wanted.into_iter().enumerate() {
        // Over the checks that follow and the answer to them.
        let over = (2 * (checks - index - 1) + 1) as u8;
        program.extend([step(LOAD_WORD, 0, at), step(JUMP_IF_EQUAL, over, value)]);
    }
    program.extend([
        step(RETURN, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ]);
    program
}

/// Installs the filter in the calling process and sends its listener over a socket. Where the kernel gives no listener, as in a
/// container that has one already, there are no rings. System calls only: the caller is a child that has yet to exec.
pub(super) fn install(filter: &BpfProgram, socket: RawFd) {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        // The kernel only reads it.
        filter: filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the program is as long as it says, and its instructions have the kernel's layout; a message of one byte and one
    // descriptor is put together in live variables, the control data in an array with room and alignment for it.
    unsafe {
        let listener = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        ) as RawFd;
        if listener < 0 {
            return;
        }
        let mut byte = 0u8;
        let mut vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut control = [0u64; 4];
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(listener);
        // Without it, a request for a ring fails as for a call that there is not.
        libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL);
        libc::close(listener);
    }
}

/// The socket that a listener comes over: the shim's end, and the child's.
pub(super) fn way() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Takes the listener of a child that has become its program.
pub(super) fn take(way: &OwnedFd) -> io::Result<Option<Rings>> {
    let mut byte = [0u8];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(way, &mut [io::IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let listener = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    listener.map(Rings::new).transpose()
}

/// What a VMM waits at for rings.
#[derive(Debug)]
pub struct Rings {
    listener: AsyncFd<OwnedFd>,
    /// Whether a VMM that was promised a ring has not answered: it may ask for that one yet, and what it asks does not say
    /// for which disk.
    unanswered: AtomicBool,
}

/// A ring for the disk that the VMM is asked to add. Unless that was [`answered`](Promise::answered), the VMM gets this ring
/// whenever it asks, and no other from then on.
#[derive(Debug)]
pub struct Promise {
    rings: Arc<Rings>,
    ring: Option<OwnedFd>,
}

impl Promise {
    /// Gives the VMM the ring when it asks for it.
    ///
    /// # Errors
    /// As [`Rings::hand_over`].
    pub async fn keep(&self) -> io::Result<()> {
        match &self.ring {
            Some(ring) => self.rings.hand_over(ring.as_fd()).await,
            None => Ok(()),
        }
    }

    /// The VMM has answered, and does not ask any more.
    pub fn answered(mut self) {
        self.ring = None;
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let Some(ring) = self.ring.take() else { return };
        self.rings.unanswered.store(true, Ordering::Relaxed);
        // Without a runtime the shim ends, and the VMM with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let rings = self.rings.clone();
            runtime.spawn(async move {
                if let Err(error) = rings.hand_over(ring.as_fd()).await {
                    tracing::debug!("the VMM never asked for the ring of a disk: {error}");
                }
            });
        }
    }
}

impl Rings {
    fn new(listener: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open, and its owner moves into what watches it.
        let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE)? };
        Ok(Self { listener, unanswered: AtomicBool::new(false) })
    }

    /// Whether a disk that comes can have a ring.
    pub fn can_promise(&self) -> bool {
        !self.unanswered.load(Ordering::Relaxed)
    }

    /// Promises a ring, before the VMM is asked to add its disk.
    pub fn promise(self: &Arc<Self>, ring: OwnedFd) -> Promise {
        Promise { rings: self.clone(), ring: Some(ring) }
    }

    /// Gives the VMM a ring when it asks for one.
    ///
    /// # Errors
    /// It has ended, or the kernel does not let it have the ring; then it knows.
    async fn hand_over(&self, ring: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            let mut ready = self.listener.readable().await?;
            // What is readable no more is told only when it is asked for, and receiving would wait.
            if !self.is_asked()? {
                ready.clear_ready();
                continue;
            }
            let Some(asked) = self.receive()? else { continue };
            let added = libc::seccomp_notif_addfd {
                id: asked,
                flags: ADD_AND_SEND,
                srcfd: ring.as_raw_fd().cast_unsigned(),
                newfd: 0,
                newfd_flags: libc::O_CLOEXEC.cast_unsigned(),
            };
            // SAFETY: the structure is live and of the size that the request says; the kernel only reads it.
            let result =
                unsafe { libc::ioctl(self.listener.as_raw_fd(), ADD_DESCRIPTOR, &raw const added) };
            return match result {
                0.. => Ok(()),
                _ => {
                    let error = io::Error::last_os_error();
                    self.refuse(asked);
                    Err(error)
                }
            };
        }
    }

    /// Whether a request waits.
    fn is_asked(&self) -> io::Result<bool> {
        let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&rustix::time::Timespec::default()))?;
        let found = polled[0].revents();
        match found.contains(PollFlags::IN) {
            // Nobody is left who could ask.
            false if found.contains(PollFlags::HUP) => Err(io::ErrorKind::BrokenPipe.into()),
            is_asked => Ok(is_asked),
        }
    }

    /// A request that waits, by its number. The filter holds nothing else.
    fn receive(&self) -> io::Result<Option<u64>> {
        // SAFETY: all zeros are a valid structure, as the kernel wants it; it is live and of the size that the request says.
        let (result, asked) = unsafe {
            let mut asked: libc::seccomp_notif = std::mem::zeroed();
            let result = libc::ioctl(self.listener.as_raw_fd(), RECEIVE, &raw mut asked);
            (result, asked)
        };
        let error = io::Error::last_os_error();
        match (result, error.raw_os_error()) {
            (0.., _) => Ok(Some(asked.id)),
            // Whoever has asked is gone.
            (_, Some(libc::ENOENT | libc::EINTR)) => Ok(None),
            _ => Err(error),
        }
    }

    fn refuse(&self, asked: u64) {
        let answer = libc::seccomp_notif_resp { id: asked, val: 0, error: -libc::EPERM, flags: 0 };
        // SAFETY: the structure is live and of the size that the request says. Who is gone needs no answer.
        unsafe { libc::ioctl(self.listener.as_raw_fd(), SEND, &raw const answer) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child with the filter does what `act` says and ends with what that returns. System calls only.
    fn child(act: fn() -> i32) -> (Option<Rings>, rustix::process::Pid) {
        let (ours, theirs) = way().unwrap();
        let filter = filter();
        // SAFETY: the child makes system calls only, and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: no pointers.
            unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            install(&filter, theirs.as_raw_fd());
            // SAFETY: ends the process without running anything of the test's.
            unsafe { libc::_exit(act()) };
        }
        drop(theirs);
        let poll = PollFd::new(&ours, PollFlags::IN);
        rustix::event::poll(&mut [poll], None).unwrap();
        (take(&ours).unwrap(), rustix::process::Pid::from_raw(pid).unwrap())
    }

    fn status(pid: rustix::process::Pid) -> i32 {
        let ended = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        ended.unwrap().unwrap().1.exit_status().unwrap()
    }

    #[tokio::test]
    async fn process_that_asks_gets_the_ring_of_the_disk() {
        let (rings, pid) = child(|| match vial_ring::request() {
            // A ring can be asked for its kind by entering it: with nothing to do, nothing is done.
            Ok(ring) => {
                let fd = ring.as_raw_fd();
                // SAFETY: no pointers.
                i32::from(
                    unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, 0, 0, 0, 0, 0) } != 0,
                )
            }
            Err(_) => 2,
        });
        let disk = tempfile::tempfile().unwrap();
        let (ring, _) = vial_ring::make(disk.as_fd(), true).unwrap();
        rings.unwrap().hand_over(ring.as_fd()).await.unwrap();
        assert_eq!(status(pid), 0);
    }

    /// The shim does other things until the next request comes, and gives up one that never does.
    #[tokio::test]
    async fn requests_are_waited_for_one_after_the_other() {
        let (rings, pid) = child(|| {
            let first = vial_ring::request().is_ok();
            let pause = libc::timespec { tv_sec: 0, tv_nsec: 400_000_000 };
            // SAFETY: the time is a live structure, and nothing is asked for in return.
            unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
            i32::from(!first || vial_ring::request().is_err())
        });
        let disk = tempfile::tempfile().unwrap();
        let (ring, _) = vial_ring::make(disk.as_fd(), true).unwrap();
        let rings = rings.unwrap();
        rings.hand_over(ring.as_fd()).await.unwrap();
        let early = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(early, rings.hand_over(ring.as_fd())).await.is_err());
        rings.hand_over(ring.as_fd()).await.unwrap();
        assert_eq!(status(pid), 0);
        assert!(rings.hand_over(ring.as_fd()).await.is_err());
    }

    #[tokio::test]
    async fn all_other_calls_go_their_way() {
        // Without entries, which the kernel refuses; and with some, which only the base filter does.
        let (_rings, pid) = child(|| {
            let mut words = [0u32; 30];
            // SAFETY: the words have the layout that the kernel writes.
            unsafe {
                let none = libc::syscall(libc::SYS_io_uring_setup, 0, &raw mut words);
                let high =
                    libc::syscall(libc::SYS_io_uring_setup, 0, 1u64 << 32 | u64::from(REQUEST.1));
                let some = libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut words);
                i32::from(none >= 0 || high >= 0 || some < 0 || libc::getpid() <= 0)
            }
        });
        assert_eq!(status(pid), 0);
    }

    #[tokio::test]
    async fn process_whose_shim_has_gone_gets_none() {
        let (rings, pid) = child(|| match vial_ring::request() {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => 0,
            _ => 1,
        });
        drop(rings);
        assert_eq!(status(pid), 0);
    }

    /// A VMM that is late with one disk must not get the ring of the next for it.
    #[tokio::test]
    async fn ring_of_a_disk_that_was_not_answered_is_the_last() {
        let (rings, pid) = child(|| match vial_ring::request() {
            Ok(_) => 0,
            Err(_) => 1,
        });
        let rings = Arc::new(rings.unwrap());
        let disk = tempfile::tempfile().unwrap();
        let ring = || vial_ring::make(disk.as_fd(), false).unwrap().0;
        rings.promise(ring()).answered();
        assert!(rings.can_promise());
        drop(rings.promise(ring()));
        assert!(!rings.can_promise());
        // It is handed over all the same.
        let ended = tokio::task::spawn_blocking(move || status(pid));
        assert_eq!(ended.await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_is_no_descriptor_of_the_shims_is_not_handed_over() {
        let (rings, pid) = child(|| match vial_ring::request() {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => 0,
            _ => 1,
        });
        // SAFETY: nothing is done by the number, which is no open descriptor's.
        let closed = unsafe { BorrowedFd::borrow_raw(1 << 20) };
        let error = rings.unwrap().hand_over(closed).await.unwrap_err();
        assert_eq!((error.raw_os_error(), status(pid)), (Some(libc::EBADF), 0));
    }
}

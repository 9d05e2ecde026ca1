//! A guest that goes on from a template grows to the size of its pod: processors that the template
//! had not brought up, memory that its VM had not.
//!
//! The kernel takes the memory by itself (its virtio-mem driver) and tells of each block that is
//! there by a uevent (Linux drivers/base/memory.c, `memory_subsys_online`), and of those that it gave
//! back in part and takes again, nothing. What it allows by how
//! much memory it found when it booted is raised in the same measure.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::unix::AsyncFd;

use crate::network::channels;
use crate::sys;
use crate::users::in_first_network;

const PROCESSORS: &str = "/sys/devices/system/cpu";
/// How long the kernel may take: it writes 16 MiB for each GiB.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the guest is looked at meanwhile whatever is told: of a block that was there in part,
/// nothing is when the rest of it comes back.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The kernel's own uevents, not those that a udev passes on.
const KERNEL_UEVENTS: u32 = 1;
/// More than a uevent has (Linux include/linux/kobject.h, UEVENT_BUFFER_SIZE).
const UEVENT_BYTES: usize = 4096;

/// What the kernel derives from its memory when it boots, below /proc/sys.
const DERIVED: &[&str] = &[
    "fs/epoll/max_user_watches",
    "fs/file-max",
    "fs/inotify/max_user_watches",
    "kernel/threads-max",
    "net/ipv4/tcp_mem",
    "net/ipv4/udp_mem",
    "net/netfilter/nf_conntrack_max",
    "user/max_cgroup_namespaces",
    "user/max_ipc_namespaces",
    "user/max_mnt_namespaces",
    "user/max_net_namespaces",
    "user/max_pid_namespaces",
    "user/max_time_namespaces",
    "user/max_user_namespaces",
    "user/max_uts_namespaces",
];
/// The same, of processes: all inherit the agent's.
const DERIVED_LIMITS: [Resource; 2] = [Resource::Nproc, Resource::Sigpending];

/// Why the guest does not have what its VM has.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FitError {
    #[error("cannot bring processor {cpu} online: {source}")]
    Processor { cpu: u32, source: io::Error },
    #[error("cannot wait for memory: {0}")]
    Wait(io::Error),
    #[error(
        "the guest has {has_mib} MiB of memory after {PATIENCE:?}, and not the {wanted_mib} that \
         its VM has"
    )]
    Memory { wanted_mib: u64, has_mib: u64 },
}

/// What the guest is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Processors that are online then.
    pub(crate) vcpus: u32,
    /// Bytes of memory, or more.
    pub(crate) memory: u64,
    /// Bytes of memory that what the kernel allows was raised for.
    pub(crate) raised_for: u64,
}

/// Takes processors behind the first `count` offline. One that the kernel needs stays.
pub(crate) async fn shrink(count: u32) {
    take_offline(PROCESSORS.as_ref(), count).await;
}

async fn take_offline(processors: &Path, count: u32) {
    // The kernel was told of all that there can be; behind the last there is no directory.
    let there = (count.max(1)..).take_while(|cpu| processors.join(format!("cpu{cpu}")).exists());
    for cpu in there.collect::<Vec<_>>().into_iter().rev() {
        let online = processors.join(format!("cpu{cpu}/online"));
        match fs::read(&online) {
            Ok(state) if state.starts_with(b"1") => {}
            _ => continue,
        }
        if let Err(error) = fs::write(&online, "0") {
            tracing::warn!("processor {cpu} stays online: {error}");
        }
        tokio::task::yield_now().await;
    }
}

/// Bytes of memory that the kernel has.
pub(crate) fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// Grows the guest, and answers when it has that size.
///
/// # Errors
/// [`FitError`] says what it has not.
pub(crate) async fn grow(size: Size) -> Result<(), FitError> {
    // Before anything is waited for: what has happened by then is not told.
    let events = match memory_bytes() < size.memory {
        false => None,
        true => Some(in_first_network(uevents).map_err(FitError::Wait)?),
    };
    bring_online(PROCESSORS.as_ref(), size.vcpus).await?;
    if size.vcpus > 1 {
        channels::fit(size.vcpus);
    }
    if let Some(events) = events {
        match tokio::time::timeout(PATIENCE, wait_for(size.memory, &events)).await {
            Ok(waited) => waited.map_err(FitError::Wait)?,
            Err(_) => {
                let (wanted_mib, has_mib) = (size.memory >> 20, memory_bytes() >> 20);
                return Err(FitError::Memory { wanted_mib, has_mib });
            }
        }
    }
    if size.memory > size.raised_for {
        in_first_network(|| raise_limits(size.raised_for, size.memory));
    }
    Ok(())
}

/// Brings the first `count` processors online. The first of all is.
async fn bring_online(processors: &Path, count: u32) -> Result<(), FitError> {
    for cpu in 1..count {
        let file = File::options().write(true).open(processors.join(format!("cpu{cpu}/online")));
        file.and_then(|mut file| file.write_all(b"1"))
            .map_err(|source| FitError::Processor { cpu, source })?;
        // It takes milliseconds; there may be a request meanwhile.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// A socket on which the kernel tells what comes and goes.
fn uevents() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL_UEVENTS))?;
    sys::async_fd(socket)
}

/// Looks again whenever something has come, whatever it is, and after some time.
async fn wait_for(bytes: u64, events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut event = [0; UEVENT_BYTES];
    while memory_bytes() < bytes {
        let Ok(ready) = tokio::time::timeout(LOOK_AGAIN, events.readable()).await else { continue };
        let mut ready = ready?;
        loop {
            match recv(events.get_ref(), &mut event, RecvFlags::empty()) {
                // Without room some were lost: something has come.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
    }
    Ok(())
}

/// `number` for `after` where it was for `before`.
fn scaled(number: u64, before: u64, after: u64) -> u64 {
    let wide = u128::from(number) * u128::from(after.max(before)) / u128::from(before.max(1));
    // What is no limit stays none.
    u64::try_from(wide).map_or(number, |scaled| scaled.min(i64::MAX.cast_unsigned()).max(number))
}

/// Numbers as a file below /proc/sys has them, or nothing when there is something else in it.
fn scaled_text(text: &str, before: u64, after: u64) -> Option<String> {
    let numbers = text.split_whitespace().map(|number| {
        number.parse().ok().map(|number: u64| scaled(number, before, after).to_string())
    });
    let numbers: Vec<String> = numbers.collect::<Option<_>>()?;
    Some(numbers.join(" "))
}

/// Comfort, without which containers still run: failures are only logged.
fn raise_limits(before: u64, after: u64) {
    for name in DERIVED {
        let path = format!("/proc/sys/{name}");
        let raised = fs::read_to_string(&path).and_then(|text| {
            let text = scaled_text(&text, before, after)
                .ok_or_else(|| io::Error::other("it is no number"))?;
            fs::write(&path, text)
        });
        if let Err(error) = raised {
            tracing::warn!("cannot raise {path} for more memory: {error}");
        }
    }
    for resource in DERIVED_LIMITS {
        let mut limit = getrlimit(resource);
        for bound in [&mut limit.current, &mut limit.maximum] {
            *bound = bound.map(|number| scaled(number, before, after));
        }
        if let Err(error) = setrlimit(resource, limit) {
            tracing::warn!("cannot raise {resource:?} for more memory: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_with_several_numbers_are_scaled_and_others_left_alone() {
        assert_eq!(scaled_text("100 200\t300\n", 128, 256).as_deref(), Some("200 400 600"));
        assert_eq!(
            scaled_text("9223372036854775807", 1, 9).as_deref(),
            Some("9223372036854775807")
        );
        assert_eq!(scaled_text("18446744073709551615", 1, 9), Some(u64::MAX.to_string()));
        assert_eq!(scaled_text("max", 128, 256), None);
    }

    #[tokio::test]
    async fn processor_that_is_not_there_is_named() {
        let processors = tempfile::tempdir().unwrap();
        let online = |cpu| processors.path().join(format!("cpu{cpu}/online"));
        for cpu in 0..3 {
            fs::create_dir(processors.path().join(format!("cpu{cpu}"))).unwrap();
            fs::write(online(cpu), "0").unwrap();
        }
        bring_online(processors.path(), 0).await.unwrap();
        bring_online(processors.path(), 3).await.unwrap();
        take_offline(processors.path(), 2).await;
        assert_eq!([0, 1, 2].map(|cpu| fs::read_to_string(online(cpu)).unwrap()), ["0", "1", "0"]);
        bring_online(processors.path(), 3).await.unwrap();
        // The first stays whatever is asked for.
        fs::write(online(0), "1").unwrap();
        take_offline(processors.path(), 0).await;
        assert_eq!([0, 1, 2].map(|cpu| fs::read_to_string(online(cpu)).unwrap()), ["1", "0", "0"]);
        fs::write(online(0), "0").unwrap();
        bring_online(processors.path(), 3).await.unwrap();
        let states = [0, 1, 2].map(|cpu| fs::read_to_string(online(cpu)).unwrap());
        assert_eq!(states, ["0", "1", "1"]);
        let error = bring_online(processors.path(), 4).await.unwrap_err();
        assert!(matches!(error, FitError::Processor { cpu: 3, .. }), "{error}");
    }

    #[tokio::test]
    async fn memory_that_is_there_is_not_waited_for() {
        let size = Size { vcpus: 1, memory: memory_bytes(), raised_for: memory_bytes() };
        grow(size).await.unwrap();
        wait_for(memory_bytes() / 2, &uevents().unwrap()).await.unwrap();
        let events = uevents().unwrap();
        let more = wait_for(u64::MAX, &events);
        tokio::time::timeout(Duration::from_millis(50), more).await.unwrap_err();
    }

    proptest! {
        #[test]
        fn no_limit_falls(number: u64, before: u64, after: u64) {
            prop_assert!(scaled(number, before, after) >= number);
            prop_assert_eq!(scaled(number, before, before), number);
        }
    }
}

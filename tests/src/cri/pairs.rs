//! How many pairs of queues an interface has, and uses: what `ethtool` tells and sets, which no image of the suite has.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SocketType, socket};

/// Requests of ethtool's (linux/sockios.h, linux/ethtool.h).
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_SCHANNELS: u32 = 0x3d;
/// Where `struct ethtool_channels` has the most that serve both directions, and those that do.
const MOST: usize = 4;
const USED: usize = 8;

fn ask(interface: &str, mut words: [u32; 9]) -> io::Result<[u32; 9]> {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name[..15].iter_mut().zip(interface.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: these commands read and write an `ethtool_channels`, nine words, which outlives the
    // call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(words) }
}

/// What a container asks this program for: an interface, and a number after `=`.
///
/// # Errors
/// As [`show`].
pub(crate) fn run(asked: &str) -> Result<()> {
    match asked.split_once('=') {
        Some((interface, count)) => show(interface, Some(count.parse()?)),
        None => show(asked, None),
    }
}

/// Prints how many pairs an interface has and uses, after it has it use `count`, if there is one.
///
/// # Errors
/// The kernel refuses.
fn show(interface: &str, count: Option<u32>) -> Result<()> {
    let mut words = [0; 9];
    words[0] = ETHTOOL_GCHANNELS;
    let mut words = ask(interface, words).context("ask for the pairs of queues")?;
    if let Some(count) = count {
        (words[0], words[USED]) = (ETHTOOL_SCHANNELS, count);
        ask(interface, words).context("set the pairs of queues")?;
        words[0] = ETHTOOL_GCHANNELS;
        words = ask(interface, words)?;
        ensure!(words[USED] == count, "{interface} uses {} pairs", words[USED]);
    }
    println!("{} of {}", words[USED], words[MOST]);
    Ok(())
}

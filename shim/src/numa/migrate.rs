//! Moves another process's memory between nodes (migrate_pages(2)).
#![allow(unsafe_code)]

use std::io;

use super::list::Set;

/// Words of a mask of nodes, of which there are at most 1,024 (MAX_NUMNODES).
const WORDS: usize = 16;

/// Moves what process `pid` has on the nodes `from` to the nodes `to`, and returns how many pages
/// could not be. Without any nodes to move from, nothing is done.
///
/// # Errors
/// The process is gone, or the kernel refuses. Nothing is known of what was moved then.
pub(super) fn pages(pid: u32, from: &Set, to: &Set) -> io::Result<u64> {
    if from.is_empty() {
        return Ok(0);
    }
    let (from, to) = (mask(from)?, mask(to)?);
    // The kernel counts one bit less than it is told.
    let bits = WORDS * 64 + 1;
    // SAFETY: both masks are as long as is said, and only read.
    let left =
        unsafe { libc::syscall(libc::SYS_migrate_pages, pid, bits, from.as_ptr(), to.as_ptr()) };
    u64::try_from(left).map_err(|_| io::Error::last_os_error())
}

fn mask(nodes: &Set) -> io::Result<[u64; WORDS]> {
    let mut mask = [0; WORDS];
    for node in nodes {
        let word = usize::try_from(node / 64).ok().and_then(|word| mask.get_mut(word));
        *word.ok_or(io::ErrorKind::Unsupported)? |= 1 << (node % 64);
    }
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_beyond_the_mask_are_refused() {
        assert_eq!(mask(&Set::from([0, 65])).unwrap()[..2], [1, 2]);
        assert!(mask(&Set::from([1024])).is_err());
    }

    #[test]
    fn process_that_is_gone_is_an_error() {
        assert_eq!(pages(1 << 30, &Set::new(), &Set::from([0])).unwrap(), 0);
        assert!(pages(1 << 30, &Set::from([0]), &Set::from([0])).is_err());
        pages(std::process::id(), &Set::from([0]), &Set::from([0])).unwrap();
    }
}

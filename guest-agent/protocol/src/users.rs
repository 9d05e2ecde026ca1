//! How the users and groups of a pod in a user namespace are those of the host.

use std::fmt;
use std::num::ParseIntError;

use crate::agent;

/// Why ids cannot be mapped so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    /// There has to be one range, as Kubernetes has it.
    #[error(
        "the pod's user namespace maps {count} ranges of {what}; Vial, like Kubernetes, takes one"
    )]
    Ranges {
        /// Users or groups.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// Nobody is root.
    #[error(
        "the range of {what} in the pod's user namespace begins with {first}; it has to begin with 0, \
         so that there is a root"
    )]
    NoRoot {
        /// Users or groups.
        what: &'static str,
        /// The first that is mapped.
        first: u32,
    },
    /// It holds nothing.
    #[error("the range of {0} in the pod's user namespace is empty")]
    Empty(&'static str),
    /// There are no such ids.
    #[error(
        "the range of {what} in the pod's user namespace ends beyond the last id of the host: \
         {size} from {host} on"
    )]
    Beyond {
        /// Users or groups.
        what: &'static str,
        /// The first on the host.
        host: u32,
        /// How many.
        size: u32,
    },
    /// It is no range at all.
    #[error(
        "'{0}' is no range of ids: first inside, first on the host and their number, with colons between"
    )]
    Text(String),
}

/// Ids from 0 on, which are others on the host: `host` and those that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdRange {
    host: u32,
    size: u32,
}

impl IdRange {
    fn new(what: &'static str, first: u32, host: u32, size: u32) -> Result<Self, UsersError> {
        if first != 0 {
            return Err(UsersError::NoRoot { what, first });
        }
        if size == 0 {
            return Err(UsersError::Empty(what));
        }
        // The highest number is no id: to system calls it says "as it is".
        if host.checked_add(size).is_none() {
            return Err(UsersError::Beyond { what, host, size });
        }
        Ok(Self { host, size })
    }

    fn only(what: &'static str, ranges: &[(u32, u32, u32)]) -> Result<Self, UsersError> {
        match *ranges {
            [(first, host, size)] => Self::new(what, first, host, size),
            _ => Err(UsersError::Ranges { what, count: ranges.len() }),
        }
    }

    /// What an id of the pod is on the host, if it is anything.
    pub fn on_host(self, id: u32) -> Option<u32> {
        // Checked when the range was made: no id of it is beyond the last.
        (id < self.size).then(|| self.host + id)
    }
}

/// As /proc/PID/uid_map has it (user_namespaces(7)).
impl fmt::Display for IdRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "0 {} {}", self.host, self.size)
    }
}

/// The users and groups of a pod, or of the files in a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Users {
    /// Its users.
    pub uids: IdRange,
    /// Its groups.
    pub gids: IdRange,
}

impl Users {
    /// Those of the only range of each kind: the first id inside, on the host, and their number.
    ///
    /// # Errors
    /// [`UsersError`].
    pub fn new(uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)]) -> Result<Self, UsersError> {
        Ok(Self { uids: IdRange::only("users", uids)?, gids: IdRange::only("groups", gids)? })
    }

    /// Those of texts as snapshotters have them in the options of a mount: ranges with commas between,
    /// and colons between their numbers.
    ///
    /// # Errors
    /// [`UsersError`].
    pub fn of_texts(uids: &str, gids: &str) -> Result<Self, UsersError> {
        Self::new(&ranges(uids)?, &ranges(gids)?)
    }

    /// Those of a request.
    ///
    /// # Errors
    /// [`UsersError`].
    pub fn of_wire(wire: &agent::UserNamespace) -> Result<Self, UsersError> {
        let ranges = |ranges: &[agent::IdRange]| -> Vec<(u32, u32, u32)> {
            ranges.iter().map(|range| (range.first, range.host, range.size)).collect()
        };
        Self::new(&ranges(&wire.uids), &ranges(&wire.gids))
    }

    /// For a request.
    pub fn to_wire(self) -> agent::UserNamespace {
        let range = |range: IdRange| agent::IdRange {
            first: 0,
            host: range.host,
            size: range.size,
            ..Default::default()
        };
        agent::UserNamespace {
            uids: vec![range(self.uids)],
            gids: vec![range(self.gids)],
            ..Default::default()
        }
    }
}

fn ranges(text: &str) -> Result<Vec<(u32, u32, u32)>, UsersError> {
    let wrong = || UsersError::Text(text.chars().take(64).flat_map(char::escape_debug).collect());
    let range = |text: &str| {
        let numbers: Result<Vec<u32>, ParseIntError> = text.split(':').map(str::parse).collect();
        match numbers.map_err(|_| wrong())?[..] {
            [first, host, size] => Ok((first, host, size)),
            _ => Err(wrong()),
        }
    };
    text.split(',').map(range).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn users(range: (u32, u32, u32)) -> Result<Users, UsersError> {
        Users::new(&[range], &[(0, 0, 1)])
    }

    #[test]
    fn what_is_no_single_range_from_root_on_is_refused() {
        let what = "users";
        assert_eq!(users((1, 1000, 5)), Err(UsersError::NoRoot { what, first: 1 }));
        assert_eq!(users((0, 1000, 0)), Err(UsersError::Empty(what)));
        let last = u32::MAX;
        assert!(users((0, last - 5, 5)).is_ok());
        assert_eq!(
            users((0, last - 5, 6)),
            Err(UsersError::Beyond { what, host: last - 5, size: 6 })
        );
        for ranges in [&[][..], &[(0, 1000, 5), (5, 3000, 5)], &[(0, 1000, 5), (0, 1000, 5)]] {
            let count = ranges.len();
            assert_eq!(Users::new(ranges, &[(0, 0, 1)]), Err(UsersError::Ranges { what, count }));
            let what = "groups";
            assert_eq!(Users::new(&[(0, 0, 1)], ranges), Err(UsersError::Ranges { what, count }));
        }
    }

    #[test]
    fn options_of_a_mount_are_read() {
        let read = Users::of_texts("0:1000:100000", "0:2000:5").unwrap();
        assert_eq!(read.uids.to_string(), "0 1000 100000");
        assert_eq!(read.gids.on_host(4), Some(2004));
        for wrong in ["", ":", "0:1", "0:1:2:3", "0:1:-2", "a:b:c", "0:1:4294967296", "0:1:2,"] {
            assert_eq!(
                Users::of_texts(wrong, "0:1:2"),
                Err(UsersError::Text(wrong.into())),
                "{wrong}"
            );
        }
        let two = Users::of_texts("0:1:2,2:10:5", "0:1:2");
        assert!(matches!(two, Err(UsersError::Ranges { count: 2, .. })), "{two:?}");
    }

    proptest! {
        #[test]
        fn ids_stay_in_their_range_on_the_host(host: u32, size: u32, id: u32) {
            let Ok(users) = users((0, host, size)) else { return Ok(()) };
            match users.uids.on_host(id) {
                Some(found) => {
                    prop_assert!(id < size && found - host == id && found < u32::MAX);
                }
                None => prop_assert!(id >= size),
            }
        }

        #[test]
        fn users_survive_the_wire(host in 0..u32::MAX / 2, size in 1..u32::MAX / 2) {
            let users = Users::new(&[(0, host, size)], &[(0, size, host.max(1))]).unwrap();
            prop_assert_eq!(Users::of_wire(&users.to_wire()), Ok(users));
        }
    }
}

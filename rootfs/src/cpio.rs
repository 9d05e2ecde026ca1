//! The "new ASCII" cpio format, as far as an initramfs needs it (Linux: Documentation/driver-api/early-userspace/
//! buffer-format.rst). Nothing of the build machine goes in: owner 0, time 0, link count 1, inodes counted from 1.

use anyhow::{Result, bail};

const MAGIC: &[u8] = b"070701";
const TRAILER: &str = "TRAILER!!!";
/// Names and data start at multiples of this.
const ALIGNMENT: usize = 4;
/// cpio tools read whole blocks of this size.
const BLOCK_BYTES: usize = 512;
const MODE_DIRECTORY: u32 = 0o040_000;
const MODE_CHARACTER_DEVICE: u32 = 0o020_000;
const MODE_FILE: u32 = 0o100_000;
/// The format's limit on a path, its end included (the kernel's PATH_MAX).
const PATH_LIMIT: usize = 4096;

/// One file of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, without a leading slash.
    pub path: String,
    /// Permission bits, with the sticky bit.
    pub permissions: u32,
    /// What kind of file it is.
    pub content: Content,
}

/// The kind of a file, with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A directory; its parents have entries of their own.
    Directory,
    /// A character device node.
    CharacterDevice {
        /// Its driver.
        major: u32,
        /// Which of the driver's devices.
        minor: u32,
    },
    /// A regular file.
    File(Vec<u8>),
}

/// The archive of these entries, sorted by path: a directory comes before what is in it.
///
/// # Errors
/// A path that is empty, absolute, too long or given twice; a file of 4 GiB or more.
pub fn archive(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by(|a, b| a.path.cmp(&b.path));
    let mut bytes = Vec::new();
    for (index, entry) in sorted.iter().enumerate() {
        let path = &entry.path;
        if path.is_empty()
            || path.starts_with('/')
            || path.len() >= PATH_LIMIT
            || path.contains('\0')
        {
            bail!("the path {path:?} cannot go into an image; use a short relative one");
        }
        if index > 0 && sorted[index - 1].path == *path {
            bail!("the path {path:?} is given twice; give it once");
        }
        let inode = u32::try_from(index + 1)?;
        let empty = Vec::new();
        let (kind, device, data) = match &entry.content {
            Content::Directory => (MODE_DIRECTORY, (0, 0), &empty),
            Content::CharacterDevice { major, minor } => {
                (MODE_CHARACTER_DEVICE, (*major, *minor), &empty)
            }
            Content::File(data) => (MODE_FILE, (0, 0), data),
        };
        push(&mut bytes, inode, kind | entry.permissions, device, path, data)?;
    }
    push(&mut bytes, 0, 0, (0, 0), TRAILER, &[])?;
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    Ok(bytes)
}

fn push(
    bytes: &mut Vec<u8>,
    inode: u32,
    mode: u32,
    device: (u32, u32),
    path: &str,
    data: &[u8],
) -> Result<()> {
    let Ok(size) = u32::try_from(data.len()) else {
        bail!(
            "the file {path:?} has 4 GiB or more, which the format cannot hold; use a smaller one"
        );
    };
    let name_size = path.len() as u32 + 1;
    // ino, mode, uid, gid, nlink, mtime, size, device of the file system, device of the node, name's size, checksum.
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
    bytes.extend_from_slice(MAGIC);
    for field in fields {
        bytes.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes.extend_from_slice(path.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back, as strictly as the format says.
    fn parse(bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            let header = at;
            assert_eq!(&bytes[header..header + 6], MAGIC);
            let field = |n: usize| {
                let start = header + 6 + n * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16)
                    .unwrap()
            };
            assert_eq!((field(2), field(3), field(4), field(5), field(12)), (0, 0, 1, 0, 0));
            let name_start = header + 110;
            let name_end = name_start + field(11) as usize - 1;
            assert_eq!(bytes[name_end], 0);
            let path = String::from_utf8(bytes[name_start..name_end].to_vec()).unwrap();
            let data_start = (name_end + 1).next_multiple_of(4);
            let data_end = data_start + field(6) as usize;
            at = data_end.next_multiple_of(4);
            if path == TRAILER {
                assert!(bytes[at..].iter().all(|byte| *byte == 0));
                return entries;
            }
            assert_eq!(field(0) as usize, entries.len() + 1);
            let content = match field(1) & 0o170_000 {
                MODE_DIRECTORY => Content::Directory,
                MODE_CHARACTER_DEVICE => {
                    Content::CharacterDevice { major: field(9), minor: field(10) }
                }
                MODE_FILE => Content::File(bytes[data_start..data_end].to_vec()),
                other => panic!("mode {other:o}"),
            };
            entries.push(Entry { path, permissions: field(1) & 0o7777, content });
        }
    }

    fn sample() -> Vec<Entry> {
        let mut entries = vec![
            Entry {
                path: "dev/console".to_owned(),
                permissions: 0o600,
                content: Content::CharacterDevice { major: 5, minor: 1 },
            },
            Entry { path: "dev".to_owned(), permissions: 0o755, content: Content::Directory },
            Entry { path: "tmp".to_owned(), permissions: 0o1777, content: Content::Directory },
        ];
        // Every remainder of the alignment, and none at all.
        for length in 0..6 {
            entries.push(Entry {
                path: format!("file{}", "x".repeat(length)),
                permissions: 0o755,
                content: Content::File(vec![0xa5; length]),
            });
        }
        entries
    }

    #[test]
    fn archive_read_back_gives_the_entries_sorted() {
        let mut expected = sample();
        expected.sort_by(|a, b| a.path.cmp(&b.path));
        let bytes = archive(&sample()).unwrap();
        assert_eq!(parse(&bytes), expected);
        assert_eq!(bytes.len() % BLOCK_BYTES, 0);
    }

    #[test]
    fn archive_order_of_entries_does_not_matter() {
        let mut reversed = sample();
        reversed.reverse();
        assert_eq!(archive(&sample()).unwrap(), archive(&reversed).unwrap());
    }

    #[test]
    fn archive_bad_paths_are_refused() {
        let directory = |path: &str| Entry {
            path: path.to_owned(),
            permissions: 0o755,
            content: Content::Directory,
        };
        for path in ["", "/dev", "a\0b", &"x".repeat(PATH_LIMIT)] {
            assert!(archive(&[directory(path)]).is_err(), "{path:?}");
        }
        let error = archive(&[directory("a"), directory("a")]).unwrap_err();
        assert!(error.to_string().contains("twice"));
    }
}

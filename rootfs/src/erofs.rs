//! The read-only file system EROFS, as far as a guest image needs it (Linux: fs/erofs/erofs_fs.h, Documentation/filesystems/
//! erofs.rst). Data lies in whole blocks, not compressed and not beside inodes, so that the guest maps files where the image lies
//! in its address space (DAX). Nothing of the build machine goes in: owner 0, time 0, inodes in the order of their paths.
//!
//! ```text
//! block 0      1024 bytes of zeros, the superblock
//! block 1 ...  inodes of 32 bytes, the root's first
//!              the blocks of directories and files, in the order of their inodes
//!              zeros, up to a multiple of IMAGE_ALIGNMENT
//! ```

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// The guest's kernel maps an image in pieces of so many bytes.
pub const IMAGE_ALIGNMENT: usize = 2 << 20;
const BLOCK_BYTES: usize = 4096;
const BLOCK_BITS: u8 = 12;
/// `EROFS_SUPER_OFFSET`, `EROFS_SUPER_MAGIC_V1`.
const SUPERBLOCK_AT: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Where inodes begin.
const INODES_BLOCK: u32 = 1;
/// An `erofs_inode_compact`. `i_format` 0 is that, and EROFS_INODE_FLAT_PLAIN.
const INODE_BYTES: usize = 32;
const COMPACT_AND_PLAIN: u16 = 0;
/// An `erofs_dirent`, before the names of its block.
const DIRENT_BYTES: usize = 12;
const MODE_DIRECTORY: u16 = 0o040_000;
const MODE_FILE: u16 = 0o100_000;
/// `EROFS_FT_*`.
const TYPE_FILE: u8 = 1;
const TYPE_DIRECTORY: u8 = 2;
/// `EROFS_NAME_LEN`.
const NAME_LIMIT: usize = 255;

/// One file of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, without a leading slash.
    pub path: String,
    /// Permission bits, with the sticky bit.
    pub permissions: u16,
    /// What kind of file it is.
    pub content: Content,
}

/// The kind of a file, with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A directory; its parents have entries of their own.
    Directory,
    /// A regular file.
    File(Vec<u8>),
}

/// What an inode says besides where its data is.
struct Inode<'a> {
    mode: u16,
    links: u16,
    data: std::borrow::Cow<'a, [u8]>,
}

/// The image of these entries, in a root directory that anyone may read. Their order does not matter.
///
/// # Errors
/// A path that is empty, absolute, with a name that is too long or none, or given twice; one whose parent is no directory; a
/// file or an image that is too large for the format.
pub fn image(entries: &[Entry]) -> Result<Vec<u8>> {
    let sorted = sorted(entries)?;
    let root = Entry { path: String::new(), permissions: 0o755, content: Content::Directory };
    let all: Vec<&Entry> = std::iter::once(&root).chain(sorted.values().copied()).collect();
    let numbers: BTreeMap<&str, u32> =
        all.iter().map(|entry| entry.path.as_str()).zip(0..).collect();
    let inodes =
        all.iter().map(|entry| inode(entry, &all, &numbers)).collect::<Result<Vec<_>>>()?;

    let blocks = |bytes: usize| u32::try_from(bytes.div_ceil(BLOCK_BYTES)).context("too large");
    let mut next = INODES_BLOCK + blocks(inodes.len() * INODE_BYTES)?;
    let mut bytes = vec![0; INODES_BLOCK as usize * BLOCK_BYTES];
    for (number, inode) in (1..).zip(&inodes) {
        push_inode(&mut bytes, inode, number, next)?;
        let end = next.checked_add(blocks(inode.data.len())?);
        next = end.context("the image is too large for its format; leave something out")?;
    }
    for inode in &inodes {
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        bytes.extend_from_slice(&inode.data);
    }
    bytes.resize(bytes.len().next_multiple_of(IMAGE_ALIGNMENT), 0);
    let superblock = superblock(inodes.len() as u64, next);
    bytes[SUPERBLOCK_AT..SUPERBLOCK_AT + superblock.len()].copy_from_slice(&superblock);
    Ok(bytes)
}

/// The entries by their paths, each of which can be there.
fn sorted(entries: &[Entry]) -> Result<BTreeMap<&str, &Entry>> {
    let mut sorted = BTreeMap::new();
    for entry in entries {
        let path = entry.path.as_str();
        let named = |name: &str| {
            !["", ".", ".."].contains(&name) && name.len() <= NAME_LIMIT && !name.contains('\0')
        };
        if !path.split('/').all(named) {
            bail!("the path {path:?} cannot go into an image; use a relative one of short names");
        }
        if sorted.insert(path, entry).is_some() {
            bail!("the path {path:?} is given twice; give it once");
        }
    }
    for path in sorted.keys() {
        let parent = path.rsplit_once('/').map(|(parent, _)| sorted.get(parent));
        if parent.is_some_and(|parent| parent.is_none_or(|e| e.content != Content::Directory)) {
            bail!("the path {path:?} is in no directory; give that, too");
        }
    }
    Ok(sorted)
}

fn inode<'a>(entry: &'a Entry, all: &[&Entry], numbers: &BTreeMap<&str, u32>) -> Result<Inode<'a>> {
    let (kind, links, data) = match &entry.content {
        Content::Directory => {
            let (data, directories) = directory(&entry.path, all, numbers)?;
            (MODE_DIRECTORY, 2 + directories, data.into())
        }
        Content::File(data) => (MODE_FILE, 1, data.into()),
    };
    Ok(Inode { mode: kind | entry.permissions & 0o7777, links, data })
}

/// The blocks of a directory, and how many directories are in it. Within a block, the names follow the entries; both are
/// sorted by the names' bytes.
fn directory(path: &str, all: &[&Entry], numbers: &BTreeMap<&str, u32>) -> Result<(Vec<u8>, u16)> {
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let mut names = vec![(".", numbers[path], TYPE_DIRECTORY)];
    names.push(("..", numbers[parent], TYPE_DIRECTORY));
    let mut directories = 0;
    for entry in all.iter().filter(|entry| !entry.path.is_empty()) {
        let (of, name) = entry.path.rsplit_once('/').unwrap_or(("", &entry.path));
        if of != path {
            continue;
        }
        let kind = match entry.content {
            Content::Directory => TYPE_DIRECTORY,
            Content::File(_) => TYPE_FILE,
        };
        directories += u16::from(kind == TYPE_DIRECTORY);
        names.push((name, numbers[entry.path.as_str()], kind));
    }
    names.sort_by_key(|(name, ..)| name.as_bytes());
    let mut bytes = Vec::new();
    let mut rest = names.as_slice();
    while !rest.is_empty() {
        let mut used = 0;
        let fits = rest.iter().take_while(|(name, ..)| {
            used += DIRENT_BYTES + name.len();
            used <= BLOCK_BYTES
        });
        let (block, after) = rest.split_at(fits.count());
        rest = after;
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        let mut name_at = block.len() * DIRENT_BYTES;
        for (name, number, kind) in block {
            bytes.extend(u64::from(*number).to_le_bytes());
            bytes.extend(u16::try_from(name_at)?.to_le_bytes());
            bytes.extend([*kind, 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, ..)| bytes.extend(name.as_bytes()));
    }
    Ok((bytes, directories))
}

/// Writes an `erofs_inode_compact`: the inode with that number counted from 1, whose data begins at a block.
fn push_inode(bytes: &mut Vec<u8>, inode: &Inode<'_>, number: u32, block: u32) -> Result<()> {
    let size = u32::try_from(inode.data.len());
    let size = size.context("a file has 4 GiB or more, which the format cannot hold")?;
    bytes.extend(COMPACT_AND_PLAIN.to_le_bytes());
    bytes.extend([0; 2]); // No extended attributes.
    bytes.extend(inode.mode.to_le_bytes());
    bytes.extend(inode.links.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend([0; 8]); // Owner and group 0; reserved.
    Ok(())
}

/// An `erofs_super_block`. The root is inode 0; there is no checksum, no compression, no other device.
fn superblock(inodes: u64, blocks: u32) -> [u8; 128] {
    let mut bytes = [0; 128];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[12] = BLOCK_BITS;
    bytes[16..24].copy_from_slice(&inodes.to_le_bytes());
    bytes[36..40].copy_from_slice(&blocks.to_le_bytes());
    bytes[40..44].copy_from_slice(&INODES_BLOCK.to_le_bytes());
    bytes[64..68].copy_from_slice(b"vial");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
        let mut eight = [0; 8];
        eight[..N].copy_from_slice(&bytes[at..at + N]);
        u64::from_le_bytes(eight)
    }

    /// Reads an image back as the kernel does, from the inode with that number on.
    fn read(bytes: &[u8], nid: u64, path: &str, found: &mut Vec<Entry>) {
        let meta = number::<4>(bytes, SUPERBLOCK_AT + 40) as usize * BLOCK_BYTES;
        let at = meta + nid as usize * INODE_BYTES;
        assert_eq!((number::<4>(bytes, at), number::<8>(bytes, at + 24)), (0, 0));
        assert_eq!(number::<4>(bytes, at + 20), nid + 1);
        let (mode, size) = (number::<2>(bytes, at + 4), number::<4>(bytes, at + 8) as usize);
        let start = number::<4>(bytes, at + 16) as usize * BLOCK_BYTES;
        let mut content = Content::Directory;
        match mode as u16 & 0o170_000 {
            MODE_FILE => content = Content::File(bytes[start..start + size].to_vec()),
            kind => assert_eq!(kind, MODE_DIRECTORY),
        }
        let is_directory = content == Content::Directory;
        if !path.is_empty() {
            let permissions = mode as u16 & 0o7777;
            found.push(Entry { path: path.to_owned(), permissions, content });
        }
        if !is_directory {
            return;
        }
        let mut names = Vec::new();
        for block in (0..size).step_by(BLOCK_BYTES) {
            let block = &bytes[start + block..start + (block + BLOCK_BYTES).min(size)];
            let count = number::<2>(block, 8) as usize / DIRENT_BYTES;
            for index in 0..count {
                let offset = |index: usize| number::<2>(block, index * DIRENT_BYTES + 8) as usize;
                let end = if index + 1 < count { offset(index + 1) } else { block.len() };
                let name = &block[offset(index)..end];
                let name = &name[..name.iter().position(|b| *b == 0).unwrap_or(name.len())];
                let name = String::from_utf8(name.to_vec()).unwrap();
                names.push((name, number::<8>(block, index * DIRENT_BYTES)));
            }
        }
        assert!(names.is_sorted() && names[0] == (".".into(), nid) && names[1].0 == "..");
        for (name, nid) in &names[2..] {
            let path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            read(bytes, *nid, &path, found);
        }
    }

    fn entry(path: &str, permissions: u16, content: Content) -> Entry {
        Entry { path: path.to_owned(), permissions, content }
    }

    fn sample() -> Vec<Entry> {
        let mut entries = vec![
            entry("dev", 0o755, Content::Directory),
            entry("dev/deep", 0o700, Content::Directory),
            entry("dev/deep/file", 0o644, Content::File(vec![7; 9000])),
            entry("dev.file", 0o644, Content::File(b"sorts between".to_vec())),
            entry("tmp", 0o1777, Content::Directory),
            entry("many", 0o755, Content::Directory),
        ];
        for length in [0, 1, 4095, 4096, 4097] {
            let content = Content::File(vec![0xa5; length]);
            entries.push(entry(&format!("file{length}"), 0o755, content));
        }
        // More than a block of names.
        for index in 0..300 {
            let name = format!("many/{index}{}", "x".repeat(index % 40));
            entries.push(entry(&name, 0o600, Content::File(name.clone().into_bytes())));
        }
        entries
    }

    #[test]
    fn image_read_back_gives_the_entries() {
        let mut expected = sample();
        let bytes = image(&expected).unwrap();
        assert!(bytes.len().is_multiple_of(IMAGE_ALIGNMENT));
        assert_eq!(number::<4>(&bytes, SUPERBLOCK_AT), u64::from(MAGIC));
        assert_eq!(number::<8>(&bytes, SUPERBLOCK_AT + 16), expected.len() as u64 + 1);
        let mut found = Vec::new();
        read(&bytes, 0, "", &mut found);
        expected.sort_by(|a, b| a.path.cmp(&b.path));
        found.sort_by(|a, b| a.path.cmp(&b.path));
        assert_eq!(found, expected);
    }

    #[test]
    fn image_order_of_entries_does_not_matter() {
        let mut reversed = sample();
        reversed.reverse();
        assert_eq!(image(&sample()).unwrap(), image(&reversed).unwrap());
    }

    #[test]
    fn image_bad_paths_are_refused() {
        let directory = |path: &str| entry(path, 0o755, Content::Directory);
        for path in ["", "/dev", "a//b", "a/../b", "a/", "a\0b", "a/b", &"x".repeat(256)] {
            assert!(image(&[directory(path)]).is_err(), "{path:?}");
        }
        let error = image(&[directory("a"), directory("a")]).unwrap_err();
        assert!(error.to_string().contains("twice"));
        let file = entry("a", 0o644, Content::File(Vec::new()));
        assert!(image(&[file, directory("a/b")]).unwrap_err().to_string().contains("directory"));
    }
}

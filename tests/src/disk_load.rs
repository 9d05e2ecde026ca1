//! Writes a disk by many threads at once, past the caches of the kernel it runs on, and checks what is there.
//!
//! Each block says which it is and of which round, so that one that is lost, torn or at another's place shows.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The size of a block, which all disks' logical blocks divide.
const BLOCK_BYTES: usize = 4096;

/// Memory that lies as every disk wants it.
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// What is written.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// How many threads write, each a run of blocks of its own.
    pub threads: u64,
    /// How many blocks of each.
    pub blocks: u64,
}

impl Load {
    /// Writes all blocks once, for a round.
    ///
    /// # Errors
    /// The disk cannot be opened or written.
    pub fn write(self, path: &Path, round: u64) -> Result<()> {
        let disk = open(path, true)?;
        self.each(|block| {
            let bytes = contents(block, round);
            disk.write_all_at(&bytes.0, block * BLOCK_BYTES as u64)
                .with_context(|| format!("write block {block} of {}", path.display()))
        })
    }

    /// Writes rounds for ever, and prints the number of each that is on the disk.
    ///
    /// # Errors
    /// As [`Load::write`].
    pub fn write_for_ever(self, path: &Path) -> Result<()> {
        let disk = open(path, true)?;
        for round in 1.. {
            self.write(path, round)?;
            disk.sync_data().with_context(|| format!("flush {}", path.display()))?;
            println!("round {round} is there");
        }
        Ok(())
    }

    /// Holds all blocks against those of a round, or of later ones.
    ///
    /// # Errors
    /// One is another.
    pub fn check(self, path: &Path, round: u64) -> Result<()> {
        let disk = open(path, false)?;
        self.each(|block| {
            let mut found = Block([0; BLOCK_BYTES]);
            disk.read_exact_at(&mut found.0, block * BLOCK_BYTES as u64)
                .with_context(|| format!("read block {block} of {}", path.display()))?;
            let [_, told] = words(&found, 0);
            ensure!(told >= round, "block {block} is of round {told}, and {round} was flushed");
            let whole = found.0 == contents(block, told).0;
            ensure!(whole, "block {block} is not what was written in round {told}");
            Ok(())
        })
    }

    /// Does something for each block, all threads at a time.
    fn each(self, act: impl Fn(u64) -> Result<()> + Sync) -> Result<()> {
        let act = &act;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| {
                    let mut blocks = thread * self.blocks..(thread + 1) * self.blocks;
                    scope.spawn(move || blocks.try_for_each(act))
                })
                .collect();
            let mut ends = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread has panicked")))
            });
            ends.try_for_each(|end| end)
        })
    }
}

fn open(path: &Path, write: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    options.open(path).with_context(|| format!("open {}", path.display()))
}

/// A block of a round: in each 16 bytes its number and the round's.
fn contents(block: u64, round: u64) -> Box<Block> {
    let mut bytes = Box::new(Block([0; BLOCK_BYTES]));
    for piece in bytes.0.chunks_exact_mut(16) {
        piece[..8].copy_from_slice(&block.to_le_bytes());
        piece[8..].copy_from_slice(&round.to_le_bytes());
    }
    bytes
}

fn words(block: &Block, at: usize) -> [u64; 2] {
    [at, at + 8].map(|at| {
        let mut word = [0; 8];
        word.copy_from_slice(&block.0[at..at + 8]);
        u64::from_le_bytes(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_found_and_what_was_not_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let load = Load { threads: 3, blocks: 4 };
        std::fs::write(&path, vec![0; 12 * BLOCK_BYTES]).unwrap();
        assert!(load.check(&path, 1).is_err());
        load.write(&path, 2).unwrap();
        load.check(&path, 1).unwrap();
        load.check(&path, 2).unwrap();
        assert!(load.check(&path, 3).is_err());
        let torn = OpenOptions::new().write(true).open(&path).unwrap();
        torn.write_all_at(&[9], 5 * BLOCK_BYTES as u64 + 100).unwrap();
        assert!(load.check(&path, 2).unwrap_err().to_string().contains("block 5"));
    }
}

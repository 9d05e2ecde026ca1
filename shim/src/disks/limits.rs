//! What the host's kernel says of a block device, and what of it a guest is told (Documentation/ABI/stable/sysfs-block).

use std::{fs, io, path::Path};

use vial_vmm_api::{DISK_QUEUES, DiscardLimits, DiskCache, DiskShape, LOGICAL_BLOCKS};

use super::cache::Cache;

/// The most bytes that memory is aligned to without a cache: a page. No device is known that wants more.
const PAGE_BYTES: u64 = 4096;

/// What there is to know of a block device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    logical_block: u64,
    physical_block: u64,
    io_sizes: (u64, u64),
    /// What memory is aligned to for it.
    alignment: u64,
    discard: Option<(u64, u64)>,
}

impl Limits {
    /// Those of the device that sysfs has that directory of. A partition has those of its disk.
    ///
    /// # Errors
    /// There is no such device.
    pub fn read(device: &Path) -> io::Result<Self> {
        let of_a_part = device.join("partition").exists();
        // What is there is a link, by which `..` leads to the disk.
        let queue = if of_a_part { device.join("../queue") } else { device.join("queue") };
        let number = |name: &str| -> io::Result<u64> {
            let text = fs::read_to_string(queue.join(name))?;
            text.trim().parse().map_err(io::Error::other)
        };
        // Some came with newer kernels.
        let or = |name: &str, other: u64| number(name).unwrap_or(other);
        let logical_block = number("logical_block_size")?;
        // A guest's discards become holes in the device, for which it has to be able to write zeros so.
        let (discard, zeros) = (or("discard_max_bytes", 0), or("write_zeroes_max_bytes", 0));
        let discards = discard > 0 && zeros > 0;
        Ok(Self {
            logical_block,
            physical_block: or("physical_block_size", logical_block),
            io_sizes: (or("minimum_io_size", 0), or("optimal_io_size", 0)),
            // A mask (Linux 6.1).
            alignment: number("dma_alignment").map_or(logical_block, |mask| mask.saturating_add(1)),
            discard: discards.then(|| (or("discard_granularity", 0), discard)),
        })
    }

    /// What a guest is told, with so many queues if there can be, and how the file is opened: without a cache only where
    /// memory can lie as the device wants it.
    pub fn shape(&self, cache: Cache, vcpus: u8) -> DiskShape {
        let word = |bytes: u64| u32::try_from(bytes).unwrap_or(0);
        let is_block =
            |bytes: &u64| bytes.is_power_of_two() && LOGICAL_BLOCKS.contains(&word(*bytes));
        let logical_block = Some(self.logical_block).filter(is_block).unwrap_or(512);
        let is_larger = |bytes: &u64| is_block(bytes) && *bytes >= logical_block;
        let fits = self.alignment.is_power_of_two() && self.alignment <= PAGE_BYTES;
        let cache = match cache {
            Cache::Direct if fits => DiskCache::Direct { alignment: word(self.alignment) },
            _ => DiskCache::Writeback,
        };
        let granularity = |bytes: u64| word(bytes).max(word(logical_block));
        DiskShape {
            queues: vcpus.clamp(*DISK_QUEUES.start(), *DISK_QUEUES.end()),
            logical_block: word(logical_block),
            physical_block: word(
                Some(self.physical_block).filter(is_larger).unwrap_or(logical_block),
            ),
            io_sizes: (word(self.io_sizes.0), word(self.io_sizes.1)),
            cache,
            discard: self.discard.map(|(least, most)| DiscardLimits {
                granularity: granularity(least),
                bytes: most,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(files: &[(&str, &str)], part: bool) -> (tempfile::TempDir, std::path::PathBuf) {
        let tree = tempfile::tempdir().unwrap();
        let disk = tree.path().join("disk");
        fs::create_dir_all(disk.join("queue")).unwrap();
        for (name, text) in files {
            fs::write(disk.join("queue").join(name), text).unwrap();
        }
        let path = match part {
            true => {
                fs::create_dir(disk.join("disk1")).unwrap();
                fs::write(disk.join("disk1/partition"), "1\n").unwrap();
                let link = tree.path().join("259:1");
                std::os::unix::fs::symlink("disk/disk1", &link).unwrap();
                link
            }
            false => disk,
        };
        (tree, path)
    }

    const NVME: &[(&str, &str)] = &[
        ("logical_block_size", "4096\n"),
        ("physical_block_size", "16384\n"),
        ("minimum_io_size", "16384\n"),
        ("optimal_io_size", "131072\n"),
        ("dma_alignment", "3\n"),
        ("discard_max_bytes", "2199023255040\n"),
        ("write_zeroes_max_bytes", "131072\n"),
        ("discard_granularity", "16384\n"),
    ];

    #[test]
    fn partition_has_the_limits_of_its_disk() {
        for part in [false, true] {
            let (_tree, path) = device(NVME, part);
            let shape = Limits::read(&path).unwrap().shape(Cache::Direct, 2);
            let expected = DiskShape {
                queues: 2,
                logical_block: 4096,
                physical_block: 16384,
                io_sizes: (16384, 131_072),
                cache: DiskCache::Direct { alignment: 4 },
                discard: Some(DiscardLimits { granularity: 16384, bytes: 2_199_023_255_040 }),
            };
            assert_eq!(shape, expected);
        }
    }

    #[test]
    fn what_an_older_kernel_does_not_tell_is_as_it_was_then() {
        let (_tree, path) = device(&NVME[..1], false);
        let limits = Limits::read(&path).unwrap();
        let shape = limits.shape(Cache::Direct, 64);
        assert_eq!(shape.cache, DiskCache::Direct { alignment: 4096 });
        assert_eq!((shape.queues, shape.physical_block, shape.discard), (8, 4096, None));
        assert_eq!(limits.shape(Cache::Writeback, 0).cache, DiskCache::Writeback);
        assert_eq!(limits.shape(Cache::Writeback, 0).queues, 1);
        let (_tree, path) = device(&NVME[1..], false);
        assert!(Limits::read(&path).is_err());
    }

    #[test]
    fn device_that_discards_and_writes_no_zeros_is_not_discarded() {
        let (_tree, path) = device(&[NVME[0], NVME[5]], false);
        assert_eq!(Limits::read(&path).unwrap().shape(Cache::Direct, 1).discard, None);
    }

    proptest! {
        /// Whatever a device says, the VMM takes what is made of it.
        #[test]
        fn shape_is_one_that_can_be(
            logical: u64, exponents in (0..70u32, 0..70u32, 0..70u32), vcpus: u8, raw: bool,
        ) {
            let power = |exponent: u32| 1u64.checked_shl(exponent).unwrap_or(0);
            let limits = Limits {
                logical_block: if raw { logical } else { power(exponents.0) },
                physical_block: power(exponents.1),
                io_sizes: (logical, logical),
                alignment: if raw { logical } else { power(exponents.2) },
                discard: Some((logical, logical)),
            };
            let shape = limits.shape(Cache::Direct, vcpus);
            prop_assert!(DISK_QUEUES.contains(&shape.queues));
            prop_assert!(shape.logical_block.is_power_of_two());
            prop_assert!(LOGICAL_BLOCKS.contains(&shape.logical_block));
            prop_assert!(shape.physical_block.is_power_of_two());
            prop_assert!(shape.physical_block >= shape.logical_block);
            if let DiskCache::Direct { alignment } = shape.cache {
                prop_assert!(alignment.is_power_of_two() && alignment <= 4096);
            }
        }
    }
}

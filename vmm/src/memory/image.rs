//! The file system that guests boot from, as memory that they can read and nobody can write.
//!
//! It is no part of [`GuestRam`](super::GuestRam): a device that a guest sends there finds no memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vial_vmm_api::{IMAGE_MAGIC, IMAGE_MAGIC_AT, IMAGE_UNIT_BYTES, MAX_IMAGE_BYTES, is_image_size};

use super::huge;

/// Why an image cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is none.
    #[error(
        "map the guest image: it has {0} bytes, which are no multiple of {IMAGE_UNIT_BYTES} up to \
         {MAX_IMAGE_BYTES}; make it with vial-mkimage"
    )]
    Size(u64),
    /// It is something else.
    #[error("map the guest image: it is no EROFS file system; make it with vial-mkimage")]
    Kind,
    /// The file that was saved with a machine ends before it.
    #[error("map the saved guest image: the file ends before it does; make it again")]
    Short,
    /// The host.
    #[error("map the guest image: {0}")]
    Map(io::Error),
}

/// A mapped image. It stays mapped for as long as the process lives, as the machine does.
#[derive(Debug)]
pub struct Image {
    file: File,
    offset: u64,
    bytes: u64,
    address: u64,
}

impl Image {
    /// Maps a file that is an image and nothing else.
    ///
    /// # Errors
    /// It has another size than an image can have, is something else, or cannot be mapped.
    pub fn of_file(file: File) -> Result<Self, ImageError> {
        let bytes = file.metadata().map_err(ImageError::Map)?.len();
        if !is_image_size(bytes) {
            return Err(ImageError::Size(bytes));
        }
        let mut magic = [0; IMAGE_MAGIC.len()];
        file.read_exact_at(&mut magic, IMAGE_MAGIC_AT).map_err(ImageError::Map)?;
        if magic != IMAGE_MAGIC {
            return Err(ImageError::Kind);
        }
        Self::map(file, 0, bytes)
    }

    /// Maps `bytes` bytes of a file from an offset on, where [`Image::save`] has put them.
    ///
    /// # Errors
    /// The file is too short, no image has that size, or it cannot be mapped.
    pub fn saved(file: File, offset: u64, bytes: u64) -> Result<Self, ImageError> {
        let length = file.metadata().map_err(ImageError::Map)?.len();
        match offset.checked_add(bytes) {
            Some(end) if end <= length => Self::map(file, offset, bytes),
            _ => Err(ImageError::Short),
        }
    }

    fn map(file: File, offset: u64, bytes: u64) -> Result<Self, ImageError> {
        if !is_image_size(bytes) {
            return Err(ImageError::Size(bytes));
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let address = huge::map(&file, offset, bytes, libc::PROT_READ, flags);
        let address = address.map_err(ImageError::Map)? as u64;
        Ok(Self { file, offset, bytes, address })
    }

    /// How long it is: a multiple of [`IMAGE_UNIT_BYTES`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it is mapped in this process, for reading.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Writes it into another file, at an offset that is a huge page's. Returns for each of its huge pages how many of
    /// their pages are more than zeros, which alone are written.
    ///
    /// # Errors
    /// The host's, of reading or writing.
    pub fn save(&self, to: &File, offset: u64) -> io::Result<Vec<u16>> {
        to.set_len(offset + self.bytes)?;
        let mut used = vec![0; ((offset + self.bytes) / huge::HUGE_PAGE_BYTES) as usize];
        let read = |at, page: &mut [u8]| self.file.read_exact_at(page, self.offset + at);
        huge::write_pages(to, offset, self.bytes, &mut used, read)?;
        Ok(used.split_off((offset / huge::HUGE_PAGE_BYTES) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_is_saved_behind_other_memory_and_mapped_from_there() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * IMAGE_UNIT_BYTES).unwrap();
        file.write_all_at(&IMAGE_MAGIC, IMAGE_MAGIC_AT).unwrap();
        file.write_all_at(b"end", 2 * IMAGE_UNIT_BYTES - 3).unwrap();
        let image = Image::of_file(file).unwrap();
        assert_eq!((image.bytes(), image.address() % huge::HUGE_PAGE_BYTES), (4 << 20, 0));

        let memory = tempfile::tempfile().unwrap();
        memory.write_all_at(b"memory", (2 << 20) - 6).unwrap();
        assert_eq!(image.save(&memory, 2 << 20).unwrap(), [1, 1]);
        let saved = |bytes| Image::saved(memory.try_clone().unwrap(), 2 << 20, bytes);
        let again = saved(4 << 20).unwrap();
        assert_eq!(again.save(&tempfile::tempfile().unwrap(), 0).unwrap(), [1, 1]);
        let mut end = [0; 3];
        again.file.read_exact_at(&mut end, (6 << 20) - 3).unwrap();
        assert_eq!(&end, b"end");
        assert!(matches!(saved(6 << 20), Err(ImageError::Short)));
        let beyond = Image::saved(memory.try_clone().unwrap(), u64::MAX, 2 << 20);
        assert!(matches!(beyond, Err(ImageError::Short)));
    }

    #[test]
    fn files_with_something_else_are_no_images() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(IMAGE_UNIT_BYTES).unwrap();
        file.write_all_at(b"070701", 0).unwrap();
        assert!(matches!(Image::of_file(file), Err(ImageError::Kind)));
    }

    #[test]
    fn files_of_other_sizes_are_no_images() {
        for bytes in [0, 1, 4096, IMAGE_UNIT_BYTES + 1, MAX_IMAGE_BYTES + IMAGE_UNIT_BYTES] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            let error = Image::of_file(file).unwrap_err();
            assert!(matches!(error, ImageError::Size(found) if found == bytes), "{error}");
        }
    }
}

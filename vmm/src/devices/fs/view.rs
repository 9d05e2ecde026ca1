//! Guest memory in the type that the file server library wants.
//!
//! The library takes a `GuestMemoryMmap` with a dirty bitmap of its own. The view made here has
//! the same host addresses as the guest's memory, and owns none of them.
#![allow(unsafe_code)]

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::memory::GuestRam;

/// Names the bitmap that the library's [`Reader`] has by default, whose crate is not ours to
/// depend on.
trait BitmapOf {
    type Bitmap;
}

impl<B> BitmapOf for Reader<'_, B> {
    type Bitmap = B;
}

type ServerMemory = GuestMemoryMmap<<Reader<'static> as BitmapOf>::Bitmap>;

/// Why there is no view.
#[derive(Debug, thiserror::Error)]
pub(super) enum ViewError {
    /// A region of guest memory was refused.
    #[error("show the file server {bytes} bytes of guest memory at {start:#x}: {reason}")]
    Region {
        /// The guest address.
        start: u64,
        /// Its size.
        bytes: u64,
        /// What was refused.
        reason: String,
    },
    /// The page for replies that nobody reads was refused.
    #[error("make the file server's scratch page: {0}")]
    Scratch(String),
}

/// Guest memory, seen by the file server.
pub(super) struct View {
    memory: ServerMemory,
    scratch: Scratch,
    /// What keeps the memory mapped. Dropped after `memory`.
    _ram: GuestRam,
}

impl View {
    /// A view of all of `ram`.
    ///
    /// # Errors
    /// [`ViewError`].
    pub(super) fn new(ram: &GuestRam) -> Result<Self, ViewError> {
        let regions = ram
            .iter()
            .map(|region| {
                let refused = |reason: String| ViewError::Region {
                    start: region.start_addr().raw_value(),
                    bytes: region.len(),
                    reason,
                };
                // SAFETY: pointer, size, protection and flags are those of a live mapping, which
                // the clone of `ram` in the view keeps alive. What is made by `build_raw` never
                // unmaps. Both ends access guest memory only by volatile means.
                let alias = unsafe {
                    MmapRegion::build_raw(
                        region.as_ptr(),
                        region.size(),
                        region.prot(),
                        region.flags(),
                    )
                }
                .map_err(|error| refused(error.to_string()))?;
                GuestRegionMmap::new(alias, region.start_addr())
                    .ok_or_else(|| refused("it ends beyond the address space".into()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let memory = ServerMemory::from_regions(regions).map_err(|error| ViewError::Region {
            start: 0,
            bytes: ram.last_addr().raw_value(),
            reason: error.to_string(),
        })?;
        Ok(Self { memory, scratch: Scratch::new()?, _ram: ram.clone() })
    }

    /// What the guest wrote of a request.
    pub(super) fn reader<M>(
        &self,
        chain: DescriptorChain<M>,
    ) -> virtiofsd::descriptor_utils::Result<Reader<'_>>
    where
        M: std::ops::Deref,
        M::Target: GuestMemory + Sized,
    {
        Reader::new(&self.memory, chain)
    }

    /// Where the guest wants the reply.
    pub(super) fn writer<M>(
        &self,
        chain: DescriptorChain<M>,
    ) -> virtiofsd::descriptor_utils::Result<Writer<'_>>
    where
        M: std::ops::Deref,
        M::Target: GuestMemory + Sized,
    {
        Writer::new(&self.memory, chain)
    }

    /// A page of ours for a reply that the guest left no room for.
    pub(super) fn scratch_writer(&self) -> virtiofsd::descriptor_utils::Result<Writer<'_>> {
        Writer::new(&self.scratch.memory, self.scratch.chain.clone())
    }
}

/// A page of ours and a descriptor chain that names it, since the library makes a [`Writer`] from
/// nothing else.
struct Scratch {
    memory: ServerMemory,
    chain: DescriptorChain<Arc<ServerMemory>>,
}

impl Scratch {
    const TABLE: GuestAddress = GuestAddress(0);
    const AVAILABLE: GuestAddress = GuestAddress(0x100);
    const USED: GuestAddress = GuestAddress(0x200);
    const PAGE: GuestAddress = GuestAddress(0x1000);
    const PAGE_BYTES: u32 = 0x1000;
    /// `VIRTQ_DESC_F_WRITE` (virtio 1.2, 2.7.5).
    const WRITE: u16 = 2;

    fn new() -> Result<Self, ViewError> {
        let refused = |error: &dyn std::fmt::Display| ViewError::Scratch(error.to_string());
        let memory = ServerMemory::from_ranges(&[(GuestAddress(0), 0x2000)])
            .map_err(|error| refused(&error))?;
        let mut descriptor = Self::PAGE.raw_value().to_le_bytes().to_vec();
        descriptor.extend(Self::PAGE_BYTES.to_le_bytes());
        descriptor.extend(Self::WRITE.to_le_bytes());
        descriptor.extend(0_u16.to_le_bytes());
        // Flags 0, one chain available, its head 0.
        let available = [0, 0, 1, 0, 0, 0];
        memory
            .write_slice(&descriptor, Self::TABLE)
            .and_then(|()| memory.write_slice(&available, Self::AVAILABLE))
            .map_err(|error| refused(&error))?;
        let mut queue = Queue::new(2).map_err(|error| refused(&error))?;
        let low = |address: GuestAddress| Some(address.raw_value() as u32);
        queue.set_desc_table_address(low(Self::TABLE), Some(0));
        queue.set_avail_ring_address(low(Self::AVAILABLE), Some(0));
        queue.set_used_ring_address(low(Self::USED), Some(0));
        queue.set_ready(true);
        let chain = queue
            .pop_descriptor_chain(Arc::new(memory.clone()))
            .ok_or_else(|| ViewError::Scratch("its own queue is empty".into()))?;
        Ok(Self { memory, chain })
    }
}

//! Takes a machine out of KVM and into files.

use std::fs::File;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::arch::vcpu_state::{VcpuState, VcpuStateError};
use crate::devices::vsock::VsockConnector;
use crate::kvm::{KvmError, Vm};
use crate::memory::{self, GuestRam, HUGE_PAGE_BYTES, Image};
use crate::pci::bus::lock;
use crate::snapshot::{RELEASE, Snapshot, SnapshotError};
use crate::vcpu::Parking;
use crate::virtio::pci::{SaveError as DeviceError, VirtioPci};

/// How long vCPUs may take to leave the guest, and how often they are told to.
const PATIENCE: Duration = Duration::from_secs(10);
const TELL_AGAIN: Duration = Duration::from_millis(1);

/// Why a machine was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It was not started to be.
    #[error("this machine cannot be saved: it was not booted as a template")]
    NotATemplate,
    /// The guest has connections, which would not outlive it.
    #[error("{0} vsock connections of the guest are open; close them and ask again")]
    Connections(usize),
    /// A vCPU stays in the guest.
    #[error("a vCPU did not leave the guest within {PATIENCE:?}")]
    Vcpus,
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The file for the state.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// The file for the memory.
    #[error("write the guest's memory: {0}; is the disk full?")]
    Memory(std::io::Error),
}

impl SaveError {
    /// Whether the machine runs on as if nothing had been asked.
    pub fn is_harmless(&self) -> bool {
        matches!(self, Self::NotATemplate | Self::Connections(_))
    }
}

/// What a machine needs to be saved.
pub(super) struct Saving {
    pub(super) ram: GuestRam,
    pub(super) image: Option<Image>,
    pub(super) memory_mib: u32,
    pub(super) max_vcpus: u8,
    pub(super) devices: Vec<Arc<Mutex<VirtioPci>>>,
    pub(super) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// The model-specific registers that make up a vCPU's state.
    pub(super) registers: Vec<u32>,
    pub(super) parking: Arc<Parking>,
    pub(super) parked: Receiver<(u8, VcpuFd)>,
    pub(super) threads: Vec<JoinHandle<()>>,
}

impl Saving {
    /// Stops the machine and writes it down.
    pub(super) fn save(
        &self,
        vm: &Vm,
        vsock: Option<&VsockConnector>,
        memory: &File,
        mut state: File,
    ) -> Result<(), SaveError> {
        let connections = || vsock.map_or(0, VsockConnector::connections);
        if connections() > 0 {
            return Err(SaveError::Connections(connections()));
        }
        let vcpus = self.park()?;
        // No kick comes any more; what came is served before a worker stops.
        let devices = self
            .devices
            .iter()
            .map(|device| lock(device).save())
            .collect::<Result<_, DeviceError>>()?;
        let vcpus = vcpus
            .iter()
            .map(|(index, vcpu)| VcpuState::of(vcpu, *index, &self.registers))
            .collect::<Result<_, _>>()?;
        let used = write_memory(&self.ram, memory).map_err(SaveError::Memory)?;
        let mut all_used = used.clone();
        if let Some(image) = &self.image {
            let offset = image_offset(self.memory_mib);
            all_used.resize((offset / HUGE_PAGE_BYTES) as usize, 0);
            all_used.extend(image.save(memory, offset).map_err(SaveError::Memory)?);
        }
        memory::gather(memory, &all_used).map_err(SaveError::Memory)?;
        let snapshot = Snapshot {
            vmm: RELEASE.into(),
            memory_mib: self.memory_mib,
            max_vcpus: self.max_vcpus,
            cpuid: self.cpuid.clone(),
            vcpus,
            vm: vm.state()?,
            devices,
            empty: empty(&used),
            image_bytes: self.image.as_ref().map(Image::bytes),
        };
        Ok(snapshot.write(&mut state)?)
    }

    /// Takes all vCPUs out of the guest, in their order.
    fn park(&self) -> Result<Vec<(u8, VcpuFd)>, SaveError> {
        let start = Instant::now();
        let signal = || {
            for thread in &self.threads {
                let _ = thread.kill(SIGRTMIN()); // One that has ended needs none.
            }
        };
        let next = || self.parked.recv_timeout(TELL_AGAIN).ok();
        let is_late = || start.elapsed() > PATIENCE;
        let parked = self.parking.request.gather(self.threads.len(), signal, next, is_late);
        let mut parked = parked.ok_or(SaveError::Vcpus)?;
        parked.sort_by_key(|(index, _)| *index);
        Ok(parked)
    }
}

/// Where the image lies in the file of the memory of a machine that has so much: behind it, at a huge page's start.
pub(super) fn image_offset(memory_mib: u32) -> u64 {
    (u64::from(memory_mib) << 20).next_multiple_of(HUGE_PAGE_BYTES)
}

/// Writes the guest's memory, range behind range, and leaves holes for pages of zeros. Returns for each huge page of the file,
/// in order, how many of its pages are more than that.
fn write_memory(ram: &GuestRam, file: &File) -> std::io::Result<Vec<u16>> {
    let length = ram.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(length)?;
    // What is behind the last whole one has no number.
    let mut used = vec![0; (length / HUGE_PAGE_BYTES) as usize];
    let mut offset = 0;
    for region in ram.iter() {
        let start = region.start_addr().0;
        memory::write_pages(file, offset, region.len(), &mut used, |at, page| {
            ram.read_slice(page, GuestAddress(start + at)).map_err(std::io::Error::other)
        })?;
        offset += region.len();
    }
    Ok(used)
}

/// The numbers of the huge pages in which there is nothing but zeros.
fn empty(used: &[u16]) -> Vec<u32> {
    (0..).zip(used).filter_map(|(number, pages)| (*pages == 0).then_some(number)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::devices::mem::Room;
    use crate::memory::{map_ram, map_saved_ram};

    #[test]
    fn memory_survives_its_file_which_has_no_zeros_and_is_not_written_again() {
        let ram = map_ram(32 << 20).unwrap();
        ram.write_slice(b"end", GuestAddress((32 << 20) - 3)).unwrap();
        ram.write_slice(b"middle", GuestAddress(5 << 20)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let used = write_memory(&ram, &file).unwrap();
        assert_eq!((used.len(), used[2], used[15]), (16, 1, 1));
        let empty = empty(&used);
        assert_eq!(empty, (0..15).filter(|number| *number != 2).collect::<Vec<_>>());
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 32 << 20);
        assert!(metadata.blocks() * 512 <= 64 << 10, "{} blocks", metadata.blocks());

        let text = |ram: &GuestRam, at| {
            let mut text = [0; 6];
            ram.read_slice(&mut text, GuestAddress(at)).unwrap();
            text
        };
        let none = Room { start: 4 << 30, bytes: 1 << 30, present: 0 };
        let first = map_saved_ram(32 << 20, (file.try_clone().unwrap(), &empty), none, 0).unwrap();
        let more = Room { present: 6 << 20, ..none };
        let second = map_saved_ram(32 << 20, (file.try_clone().unwrap(), &empty), more, 0).unwrap();
        assert_eq!(text(&second, (4 << 30) + (6 << 20) - 6), [0; 6]);
        assert_eq!((first.num_regions(), second.num_regions()), (1, 2));
        assert_eq!(second.last_addr().0, (4 << 30) + (6 << 20) - 1);
        first.write_slice(b"secret", GuestAddress(5 << 20)).unwrap();
        assert_eq!(&text(&first, 5 << 20), b"secret");
        assert_eq!(&text(&second, 5 << 20), b"middle");
        assert_eq!(&text(&second, (32 << 20) - 6), b"\0\0\0end");
        // What was empty is no page of the file's when a guest writes it.
        first.write_slice(b"secret", GuestAddress(20 << 20)).unwrap();
        assert_eq!((&text(&first, 20 << 20), &text(&second, 20 << 20)), (b"secret", &[0; 6]));
        assert_eq!(file.metadata().unwrap().blocks(), metadata.blocks());
        let beyond = map_saved_ram(32 << 20, (file.try_clone().unwrap(), &[16]), none, 0);
        assert!(beyond.is_err());
        assert!(map_saved_ram(33 << 20, (file, &empty), none, 0).is_err());
    }
}

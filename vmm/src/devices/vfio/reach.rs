//! Which memory functions of the host reach: all of the guest's, and no other.
//!
//! There are two ways to it, of which whoever configures the VM has chosen one. Groups are joined
//! to a container of VFIO's, with an address space of its own. Functions that are bound to an
//! iommufd are attached to an address space there, which all of the VM's share, so that its memory
//! is pinned once.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::VfioError;
use super::iommufd::AddressSpace;
use super::requests::{Container, FunctionFile};
use crate::kvm::Vm;
use crate::memory::GuestRam;

/// The descriptors of one way.
pub enum Way {
    /// A container, and the groups that were joined to it.
    Groups(OwnedFd, Vec<OwnedFd>),
    /// An iommufd, and the number of an address space there.
    Iommufd(OwnedFd, u32),
}

/// What lets functions reach a VM's memory. Dropping it takes the memory away from them.
pub enum Joined {
    /// By a container.
    Groups(JoinedGroups),
    /// By iommufd.
    Functions(JoinedFunctions),
}

/// What lets functions reach a VM's memory, for all sets of them that there are.
pub struct Reach {
    vm: Arc<Vm>,
    ram: GuestRam,
    /// That of all functions that came by iommufd, as long as there are any.
    shared: Weak<AddressSpace>,
}

impl Reach {
    /// For functions of that VM.
    pub fn new(vm: &Arc<Vm>, ram: &GuestRam) -> Self {
        Self { vm: vm.clone(), ram: ram.clone(), shared: Weak::new() }
    }

    /// Tells KVM of functions, and lets them reach the guest's memory.
    ///
    /// # Errors
    /// [`VfioError`]. They reach nothing then.
    pub fn join(&mut self, way: Way, functions: Vec<FunctionFile>) -> Result<Joined, VfioError> {
        match way {
            Way::Groups(container, groups) => {
                let container = Container::new(container);
                let (vm, ram) = (self.vm.clone(), self.ram.clone());
                JoinedGroups::new(vm, ram, container, groups).map(Joined::Groups)
            }
            Way::Iommufd(iommufd, id) => {
                let shared = match self.shared.upgrade() {
                    // The descriptor is one more of the same.
                    Some(shared) => shared,
                    None => {
                        let made = AddressSpace::new(iommufd, id, &self.ram);
                        Arc::new(made.map_err(VfioError::AddressSpace)?)
                    }
                };
                self.shared = Arc::downgrade(&shared);
                let vm = self.vm.clone();
                JoinedFunctions::new(vm, &self.ram, shared, functions).map(Joined::Functions)
            }
        }
    }
}

/// What the kernel's answer means for a guest's memory.
fn refused(ram: &GuestRam, error: io::Error) -> VfioError {
    // Of iommufd (Linux drivers/iommu/iommufd/io_pagetable.c,
    // `iopt_table_enforce_dev_resv_regions`).
    if error.raw_os_error() == Some(libc::EADDRINUSE) {
        return VfioError::Reserved(error);
    }
    let bytes: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    VfioError::Memory { mib: bytes >> 20, error }
}

/// Groups that are joined to a container with the guest's memory.
pub struct JoinedGroups {
    vm: Arc<Vm>,
    ram: GuestRam,
    container: Container,
    groups: Vec<OwnedFd>,
}

impl JoinedGroups {
    fn new(
        vm: Arc<Vm>,
        ram: GuestRam,
        container: Container,
        groups: Vec<OwnedFd>,
    ) -> Result<Self, VfioError> {
        let told = vm.join_files(&groups).map_err(VfioError::from);
        let mapped = told.and_then(|()| container.map(&ram).map_err(|error| refused(&ram, error)));
        if let Err(error) = mapped {
            // What is mapped goes with the container.
            let _ = vm.leave_files(&groups);
            return Err(error);
        }
        Ok(Self { vm, ram, container, groups })
    }
}

impl Drop for JoinedGroups {
    fn drop(&mut self) {
        // Closing the descriptors would do both, unless somebody else had them, too.
        if let Err(error) = self.container.unmap(&self.ram) {
            tracing::warn!(%error, "guest memory of passed functions is not unmapped before");
        }
        if let Err(error) = self.vm.leave_files(&self.groups) {
            tracing::warn!(%error, "the groups of passed functions stay with KVM");
        }
    }
}

/// Functions that are attached to an address space with the guest's memory.
pub struct JoinedFunctions {
    vm: Arc<Vm>,
    functions: Vec<FunctionFile>,
    /// Goes with the last set.
    _shared: Arc<AddressSpace>,
}

impl JoinedFunctions {
    fn new(
        vm: Arc<Vm>,
        ram: &GuestRam,
        shared: Arc<AddressSpace>,
        functions: Vec<FunctionFile>,
    ) -> Result<Self, VfioError> {
        let told = vm.join_files(&functions).map_err(VfioError::from);
        let attached = told.and_then(|()| {
            let attach = |function: &FunctionFile| function.attach(shared.id());
            functions.iter().try_for_each(attach).map_err(|error| refused(ram, error))
        });
        if let Err(error) = attached {
            // Detaching what is not attached changes nothing.
            functions.iter().for_each(|function| drop(function.detach()));
            let _ = vm.leave_files(&functions);
            return Err(error);
        }
        Ok(Self { vm, functions, _shared: shared })
    }
}

impl Drop for JoinedFunctions {
    fn drop(&mut self) {
        // Closing the descriptors would do both, unless somebody else had them, too.
        for function in &self.functions {
            if let Err(error) = function.detach() {
                tracing::warn!(%error, "a passed function is not detached before it is closed");
            }
        }
        if let Err(error) = self.vm.leave_files(&self.functions) {
            tracing::warn!(%error, "passed functions stay with KVM");
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn refusals_tell_what_to_do() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 3 << 20)]).unwrap();
        for (number, words) in [
            (libc::ENOMEM, ["3 MiB", "limit of locked memory"]),
            (libc::EADDRINUSE, ["reserved_regions", "other functions"]),
        ] {
            let text = refused(&ram, io::Error::from_raw_os_error(number)).to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }
}

//! Functions of the host in a machine: those that it begins with, and those that come and go while
//! it runs. Each set is taken back by itself, whether it shares an IOMMU address space with others
//! or not ([`crate::devices::vfio::reach`]).

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vial_vmm_api::{AddedFunctions, Descriptor, MAX_PASSED_FUNCTIONS, PassedBy};

use super::{Descriptors, MachineError, Platform};
use crate::devices::vfio::reach::{Joined, Reach, Way};
use crate::devices::vfio::requests::HostFunction;
use crate::devices::vfio::{self, Placed, VfioError};
use crate::kvm::Vm;
use crate::memory::{Discards, GuestRam, Hold};
use crate::pci::bus::BusError;

/// Why functions do not come or go.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// VFIO, KVM or the functions.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// No number is left.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A descriptor is not there.
    #[error("{0}")]
    Descriptor(String),
    /// There would be too many.
    #[error("the VM would have more than {MAX_PASSED_FUNCTIONS} functions of the host; give fewer")]
    TooMany,
    /// There is nothing in the request.
    #[error("no function is given")]
    None,
    /// The threads of the VMM may not.
    #[error("the VM was started without `hot_plug`; start it with that")]
    NotHotPlug,
    /// There is no such set.
    #[error("the VM has no set {0} of functions")]
    NoSet(u32),
}

impl PassError {
    /// Whether the request is at fault, rather than the host.
    pub fn is_invalid_request(&self) -> bool {
        !matches!(self, Self::Vfio(_))
    }
}

impl From<MachineError> for PassError {
    fn from(error: MachineError) -> Self {
        Self::Descriptor(error.to_string())
    }
}

/// Functions that came together.
struct Set {
    number: u32,
    devices: Vec<u8>,
    _joined: Joined,
    /// Goes after that.
    _hold: Hold,
}

/// The descriptors of a request.
pub(super) struct Given {
    pub(super) way: PassedBy,
    pub(super) functions: Vec<Descriptor>,
}

/// All of a machine's functions of the host.
pub(super) struct Passed {
    vm: Arc<Vm>,
    reach: Reach,
    platform: Arc<Platform>,
    high_window: Range<u64>,
    discards: Discards,
    sets: Vec<Set>,
    next_set: u32,
}

impl Passed {
    /// None yet, for a machine with that window for wide BARs.
    pub(super) fn new(
        vm: &Arc<Vm>,
        ram: &GuestRam,
        platform: &Arc<Platform>,
        high_window: Range<u64>,
    ) -> Self {
        let (vm, reach, platform) = (vm.clone(), Reach::new(vm, ram), platform.clone());
        let (discards, sets) = (Discards::default(), Vec::new());
        Self { vm, reach, platform, high_window, discards, sets, next_set: 0 }
    }

    /// How guest memory goes back to the host while no function holds it.
    pub(super) fn discards(&self) -> Discards {
        self.discards.clone()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// Lets functions reach the guest's memory, and puts them on the bus.
    ///
    /// # Errors
    /// [`PassError`]; none of them is there then.
    pub(super) fn add(
        &mut self,
        given: Given,
        descriptors: &mut Descriptors,
        placed: Placed,
    ) -> Result<AddedFunctions, PassError> {
        if given.functions.is_empty() {
            return Err(PassError::None);
        }
        let present: usize = self.sets.iter().map(|set| set.devices.len()).sum();
        if present + given.functions.len() > MAX_PASSED_FUNCTIONS {
            return Err(PassError::TooMany);
        }
        let way = match given.way {
            PassedBy::Groups { container, groups } => Way::Groups(
                descriptors.take(container, "the VFIO container")?,
                take_all(groups, "a VFIO group", descriptors)?,
            ),
            PassedBy::Iommufd { iommufd, address_space } => {
                Way::Iommufd(descriptors.take(iommufd, "the iommufd")?, address_space)
            }
        };
        let functions = take_all(given.functions, "a passed function", descriptors)?;
        let pci = &self.platform.pci;
        let mut files = Vec::new();
        let functions = functions
            .into_iter()
            .map(|function| {
                let host = HostFunction::new(function).map_err(VfioError::from)?;
                files.push(host.file());
                vfio::function(host, &self.vm, pci, self.high_window.clone(), placed)
            })
            .collect::<Result<Vec<_>, _>>()?;
        // What the guest gives back from here on stays.
        let hold = self.discards.hold();
        let joined = self.reach.join(way, files)?;
        let mut devices = Vec::new();
        for function in functions {
            match pci.add(Arc::new(Mutex::new(function))) {
                Ok(device) => devices.push(device),
                Err(error) => {
                    take_off(&self.platform, &devices);
                    return Err(error.into());
                }
            }
        }
        let number = self.next_set;
        self.next_set += 1;
        self.sets.push(Set { number, devices: devices.clone(), _joined: joined, _hold: hold });
        Ok(AddedFunctions { set: number, devices })
    }

    /// Takes a set off the bus, resets its functions, and takes the guest's memory away from them.
    ///
    /// # Errors
    /// [`PassError::NoSet`].
    pub(super) fn remove(&mut self, number: u32) -> Result<(), PassError> {
        let at = self.sets.iter().position(|set| set.number == number);
        let set = self.sets.remove(at.ok_or(PassError::NoSet(number))?);
        take_off(&self.platform, &set.devices);
        Ok(())
    }
}

fn take_all(
    which: Vec<Descriptor>,
    what: &str,
    descriptors: &mut Descriptors,
) -> Result<Vec<OwnedFd>, PassError> {
    which.into_iter().map(|which| Ok(descriptors.take(which, what)?)).collect()
}

fn take_off(platform: &Platform, devices: &[u8]) {
    for device in devices {
        platform.pci.remove(*device);
    }
}

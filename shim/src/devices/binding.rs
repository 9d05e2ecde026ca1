//! Checks what a pod asks for before anything is touched, binds what has to be bound, and gives it
//! back.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use vial_vmm_api::MAX_PASSED_FUNCTIONS;

use super::{
    DeviceError, VFIO_DRIVER,
    address::Address,
    pci::Sysfs,
    wanted::{self, Wanted},
};

/// A function that a pod has, kept on disk to be given back when the shim cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its address.
    pub address: Address,
    /// Its IOMMU group.
    pub group: u32,
    /// Whether Vial binds it, and so gives it back.
    pub bound_here: bool,
    /// The driver that it is given back to; none if it had none.
    pub driver: Option<String>,
}

/// The functions that a pod gets, in the order of their addresses, once all of them are fit.
/// Nothing is changed by this.
///
/// # Errors
/// [`DeviceError`] names the function or the group, and what to do.
pub fn check(sysfs: &Sysfs, wanted: &Wanted) -> Result<Vec<Record>, DeviceError> {
    let mut records = BTreeMap::new();
    for group in &wanted.groups {
        for address in sysfs.members(*group)? {
            records.insert(address, bound_elsewhere(sysfs, address, *group)?);
        }
    }
    let mut named = BTreeSet::new();
    for node in &wanted.nodes {
        let (address, group) = wanted::place_of(sysfs, *node)?;
        records.insert(address, bound_elsewhere(sysfs, address, group)?);
        named.insert((address, group));
    }
    for address in &wanted.addresses {
        if !sysfs.has(*address) {
            return Err(DeviceError::Absent(*address));
        }
        let group = sysfs.group(*address).ok_or(DeviceError::NoIommu(*address))?;
        named.insert((*address, group));
    }
    for (address, group) in named {
        let others = sysfs.members(group)?;
        let stranger = others.into_iter().find(|other| {
            *other != address && !wanted.addresses.contains(other) && !records.contains_key(other)
        });
        if let Some(stranger) = stranger {
            let driver = shown(sysfs.driver(stranger));
            return Err(DeviceError::Stranger { group, stranger, driver });
        }
        let driver = sysfs.driver(address);
        let bound_here = driver.as_deref() != Some(VFIO_DRIVER);
        records.entry(address).or_insert(Record { address, group, bound_here, driver });
    }
    if let Some(address) = records.keys().find(|address| !sysfs.can_be_reset(**address)) {
        return Err(DeviceError::NoReset(*address));
    }
    if records.len() > MAX_PASSED_FUNCTIONS {
        return Err(DeviceError::TooMany(MAX_PASSED_FUNCTIONS));
    }
    Ok(records.into_values().collect())
}

/// A function that somebody else has bound to vfio-pci.
fn bound_elsewhere(sysfs: &Sysfs, address: Address, group: u32) -> Result<Record, DeviceError> {
    let driver = sysfs.driver(address);
    match driver.as_deref() {
        Some(VFIO_DRIVER) => Ok(Record { address, group, bound_here: false, driver }),
        _ => Err(DeviceError::NotBound { address, group, driver: shown(driver) }),
    }
}

fn shown(driver: Option<String>) -> String {
    driver.unwrap_or_else(|| "none".into())
}

/// Binds what is not bound yet.
///
/// # Errors
/// [`DeviceError`]; [`give_back`] takes back what was done.
pub fn bind(sysfs: &Sysfs, records: &[Record]) -> Result<(), DeviceError> {
    records
        .iter()
        .filter(|record| record.bound_here)
        .try_for_each(|record| sysfs.bind_to_vfio(record.address))
}

/// Gives everything that was bound here to the driver that it came from. All are tried.
///
/// # Errors
/// The first [`DeviceError`].
pub fn give_back(sysfs: &Sysfs, records: &[Record]) -> Result<(), DeviceError> {
    let mut result = Ok(());
    for record in records.iter().filter(|record| record.bound_here) {
        let given = sysfs.give_back(record.address, record.driver.as_deref());
        if result.is_ok() {
            result = given;
        }
    }
    result
}

#[cfg(test)]
#[path = "binding_tests.rs"]
mod tests;

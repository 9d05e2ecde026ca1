//! PCI functions of the host that come and go while the guest runs.
//!
//! There is no hot-plug in the machine: the host says what has come, and the kernel is told to look.
//! The kernel's own drivers take what they know, within the call: on a bus that is looked at again,
//! it waits for them (Linux drivers/pci/bus.c, `pci_bus_add_device`). Which device nodes they have made is
//! found by [`nodes`].

pub(crate) mod nodes;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use vial_agent_protocol::{FUNCTION_DEVICES, MAX_FUNCTIONS};

const BUS: &str = "/sys/bus/pci";
/// The most device nodes that a container has of functions.
pub(crate) const MAX_NODES: usize = 256;

/// Why functions do not come or go.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FunctionError {
    #[error("{0} PCI functions in one request: give 1 to {MAX_FUNCTIONS}")]
    Count(usize),
    #[error("{0} is no device number of a function on the guest's PCI bus")]
    Number(u32),
    #[error("the guest finds no PCI function {0}")]
    Absent(String),
    #[error("cannot look for new devices by {path}: {source}")]
    Rescan { path: PathBuf, source: io::Error },
    #[error("cannot remove the PCI function {address}: {source}")]
    Remove { address: String, source: io::Error },
    #[error("{0:?} cannot be the device by which a container asks for a PCI function")]
    Path(String),
    #[error("cannot list the guest's devices in {path}: {source}")]
    List { path: PathBuf, source: io::Error },
    #[error(
        "with the PCI function {0}, the container would have more than {MAX_NODES} device nodes; give \
         it fewer functions, or a disk with fewer namespaces or partitions"
    )]
    TooManyNodes(String),
}

impl FunctionError {
    /// Whether another request could do better.
    pub(crate) fn is_of_the_request(&self) -> bool {
        matches!(self, Self::Count(_) | Self::Number(_) | Self::Path(_))
    }
}

/// Makes the kernel look for devices that came meanwhile.
///
/// # Errors
/// [`FunctionError::Rescan`].
pub(crate) fn rescan() -> Result<(), FunctionError> {
    rescan_at(Path::new(BUS))
}

/// Makes the kernel find functions, and tells the driver of each; an empty name is none.
///
/// # Errors
/// [`FunctionError`].
pub(crate) fn add(devices: &[u32]) -> Result<Vec<String>, FunctionError> {
    add_at(Path::new(BUS), devices)
}

/// Makes the kernel forget functions. All are tried.
///
/// # Errors
/// The first [`FunctionError`].
pub(crate) fn remove(devices: &[u32]) -> Result<(), FunctionError> {
    remove_at(Path::new(BUS), devices)
}

/// The addresses of devices on bus 0.
fn addresses(devices: &[u32]) -> Result<Vec<String>, FunctionError> {
    if !(1..=MAX_FUNCTIONS).contains(&devices.len()) {
        return Err(FunctionError::Count(devices.len()));
    }
    let address = |device: &u32| match FUNCTION_DEVICES.contains(device) {
        true => Ok(format!("0000:00:{device:02x}.0")),
        false => Err(FunctionError::Number(*device)),
    };
    devices.iter().map(address).collect()
}

fn rescan_at(bus: &Path) -> Result<(), FunctionError> {
    let path = bus.join("rescan");
    fs::write(&path, "1").map_err(|source| FunctionError::Rescan { path, source })
}

fn add_at(bus: &Path, devices: &[u32]) -> Result<Vec<String>, FunctionError> {
    let addresses = addresses(devices)?;
    rescan_at(bus)?;
    let driver = |address: String| {
        let at = bus.join("devices").join(&address);
        if !at.exists() {
            return Err(FunctionError::Absent(address));
        }
        let driver = fs::read_link(at.join("driver")).ok();
        let name = driver.as_deref().and_then(Path::file_name).unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        tracing::info!("the PCI function {address} has come; its driver: {name:?}");
        Ok(name)
    };
    addresses.into_iter().map(driver).collect()
}

fn remove_at(bus: &Path, devices: &[u32]) -> Result<(), FunctionError> {
    let mut result = Ok(());
    for address in addresses(devices)? {
        let path = bus.join("devices").join(&address).join("remove");
        // Not made where it is absent: that is no sysfs then.
        let removed = fs::OpenOptions::new().write(true).open(path);
        let removed = removed.and_then(|mut file| io::Write::write_all(&mut file, b"1"));
        match removed {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => {
                result =
                    result.and(removed.map_err(|source| FunctionError::Remove { address, source }));
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree as sysfs has it, with the functions of two devices, of which one has a driver.
    fn bus() -> tempfile::TempDir {
        let bus = tempfile::tempdir().unwrap();
        for address in ["0000:00:05.0", "0000:00:1f.0"] {
            let at = bus.path().join("devices").join(address);
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join("remove"), "").unwrap();
        }
        let driver = bus.path().join("devices/0000:00:05.0/driver");
        std::os::unix::fs::symlink("../../drivers/igbvf", driver).unwrap();
        bus
    }

    #[test]
    fn functions_are_found_with_their_drivers_after_a_look() {
        let bus = bus();
        assert_eq!(add_at(bus.path(), &[5, 31]).unwrap(), ["igbvf", ""]);
        assert_eq!(fs::read_to_string(bus.path().join("rescan")).unwrap(), "1");
        let error = add_at(bus.path(), &[5, 6]).unwrap_err();
        assert!(matches!(&error, FunctionError::Absent(at) if at == "0000:00:06.0"), "{error}");
        assert!(!error.is_of_the_request());
    }

    #[test]
    fn functions_are_removed_and_absent_ones_are_gone_already() {
        let bus = bus();
        remove_at(bus.path(), &[6, 5]).unwrap();
        let at = |name: &str| bus.path().join("devices").join(name);
        assert_eq!(fs::read_to_string(at("0000:00:05.0/remove")).unwrap(), "1");
        assert_eq!(fs::read_to_string(at("0000:00:1f.0/remove")).unwrap(), "");
        assert!(!at("0000:00:06.0").exists());
    }

    #[test]
    fn requests_past_the_bounds_are_refused_before_the_kernel_looks() {
        let bus = bus();
        for (devices, count) in [
            (vec![], true),
            (vec![5; MAX_FUNCTIONS + 1], true),
            (vec![0], false),
            (vec![5, 32], false),
        ] {
            let error = add_at(bus.path(), &devices).unwrap_err();
            assert_eq!(matches!(error, FunctionError::Count(_)), count, "{error}");
            assert!(error.is_of_the_request());
            assert!(remove_at(bus.path(), &devices).unwrap_err().is_of_the_request());
        }
        assert!(!bus.path().join("rescan").exists());
        assert_eq!(fs::read_to_string(bus.path().join("devices/0000:00:05.0/remove")).unwrap(), "");
    }
}

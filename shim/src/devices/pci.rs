//! PCI functions as sysfs shows them (Linux Documentation/ABI/testing/sysfs-bus-pci), and the
//! change of their drivers.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use super::{DeviceError, VFIO_DRIVER, address::Address, ways::Node};

/// The class of bridges, which pass on what functions behind them do, and do nothing themselves.
const CLASS_BRIDGE: u32 = 0x06;
/// Its sub-classes that have a bus behind them: PCI to PCI, and the same in part.
const SUBCLASSES_PCI: [u32; 2] = [0x04, 0x09];

/// sysfs.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: "/sys".into() }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    move |error| DeviceError::Io { action, path: path.into(), error }
}

impl Sysfs {
    /// A tree that is laid out as sysfs is.
    pub fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    fn device(&self, address: Address) -> PathBuf {
        self.root.join("bus/pci/devices").join(address.to_string())
    }

    /// All functions.
    ///
    /// # Errors
    /// [`DeviceError::Io`].
    pub fn functions(&self) -> Result<Vec<Address>, DeviceError> {
        addresses_in(&self.root.join("bus/pci/devices"))
    }

    /// Whether there is such a function.
    pub fn has(&self, address: Address) -> bool {
        self.device(address).exists()
    }

    /// The name of what a link of the function's leads to.
    fn link(&self, address: Address, name: &str) -> Option<String> {
        let target = fs::read_link(self.device(address).join(name)).ok()?;
        target.file_name()?.to_str().map(str::to_owned)
    }

    /// The driver that has it.
    pub fn driver(&self, address: Address) -> Option<String> {
        self.link(address, "driver")
    }

    /// Its IOMMU group.
    pub fn group(&self, address: Address) -> Option<u32> {
        self.link(address, "iommu_group")?.parse().ok()
    }

    /// The device that it has for itself while it is bound to vfio-pci, where the kernel makes
    /// some.
    pub fn vfio_node(&self, address: Address) -> Option<Node> {
        let entries = fs::read_dir(self.device(address).join("vfio-dev")).ok()?;
        let has_number = |entry: &fs::DirEntry| entry.path().join("dev").exists();
        let mut entries = entries.flatten().filter(has_number);
        entries.find_map(|entry| Node::of_name(entry.file_name().to_str()?))
    }

    /// The function that a device of VFIO's is of.
    pub fn of_vfio_node(&self, node: Node) -> Option<Address> {
        let device = self.root.join("class/vfio-dev").join(node.to_string()).join("device");
        fs::read_link(device).ok()?.file_name()?.to_str()?.parse().ok()
    }

    /// The function that it is a virtual one of.
    pub fn physical(&self, address: Address) -> Option<Address> {
        self.link(address, "physfn")?.parse().ok()
    }

    /// The functions of a group that do something by themselves: all but bridges.
    ///
    /// # Errors
    /// [`DeviceError::NoGroup`].
    pub fn members(&self, group: u32) -> Result<Vec<Address>, DeviceError> {
        let directory = self.root.join("kernel/iommu_groups").join(group.to_string());
        if !directory.exists() {
            return Err(DeviceError::NoGroup(group));
        }
        let mut members = addresses_in(&directory.join("devices"))?;
        members.retain(|address| !self.is_bridge(*address));
        Ok(members)
    }

    /// Whether it has a bus behind it.
    pub fn is_bridge(&self, address: Address) -> bool {
        let class = self.number(address, "class").unwrap_or_default() >> 8;
        class >> 8 == CLASS_BRIDGE && SUBCLASSES_PCI.contains(&(class & 0xff))
    }

    /// A number that a file of the function's holds, in hexadecimal after `0x`.
    pub fn number(&self, address: Address, name: &str) -> Option<u32> {
        let text = self.text(address, name)?;
        u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
    }

    fn text(&self, address: Address, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.device(address).join(name)).ok()?;
        Some(text.trim().to_owned())
    }

    /// The NUMA node that it is near to, where there is more than one.
    pub fn node(&self, address: Address) -> Option<u32> {
        self.text(address, "numa_node")?.parse().ok()
    }

    /// Whether the kernel has a way to reset it alone.
    pub fn can_be_reset(&self, address: Address) -> bool {
        self.device(address).join("reset").exists()
    }

    /// How many virtual functions it has, and can have.
    pub fn virtual_functions(&self, address: Address) -> Option<(u32, u32)> {
        let number = |name: &str| self.text(address, name)?.parse().ok();
        Some((number("sriov_numvfs")?, number("sriov_totalvfs")?))
    }

    /// Takes the function from its driver and gives it to vfio-pci.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn bind_to_vfio(&self, address: Address) -> Result<(), DeviceError> {
        if !self.root.join("bus/pci/drivers").join(VFIO_DRIVER).exists() {
            return Err(DeviceError::NoDriver);
        }
        self.write(address, "driver_override", VFIO_DRIVER)?;
        self.unbind(address)?;
        self.probe(address)?;
        match self.driver(address).as_deref() {
            Some(VFIO_DRIVER) => Ok(()),
            _ => Err(DeviceError::NotTaken(address)),
        }
    }

    /// Takes the function from vfio-pci, and gives it to `driver` again. Whoever has it meanwhile
    /// keeps it, if that is not vfio-pci.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn give_back(&self, address: Address, driver: Option<&str>) -> Result<(), DeviceError> {
        if !self.has(address) {
            return Ok(());
        }
        // An empty line is none.
        self.write(address, "driver_override", "\n")?;
        if self.driver(address).as_deref() == Some(VFIO_DRIVER) && driver != Some(VFIO_DRIVER) {
            self.unbind(address)?;
        }
        let Some(driver) = driver.filter(|_| self.driver(address).is_none()) else { return Ok(()) };
        let bind = self.root.join("bus/pci/drivers").join(driver).join("bind");
        match fs::write(&bind, address.to_string()) {
            // Taken in the same moment by a driver that looks for devices.
            Err(_) if self.driver(address).as_deref() == Some(driver) => Ok(()),
            result => result.map_err(failed("bind a PCI function by", &bind)),
        }
    }

    fn unbind(&self, address: Address) -> Result<(), DeviceError> {
        let path = self.device(address).join("driver/unbind");
        match fs::write(&path, address.to_string()) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(failed("unbind a PCI function by", &path)),
        }
    }

    fn probe(&self, address: Address) -> Result<(), DeviceError> {
        let path = self.root.join("bus/pci/drivers_probe");
        fs::write(&path, address.to_string()).map_err(failed("bind a PCI function by", &path))
    }

    fn write(&self, address: Address, name: &str, text: &str) -> Result<(), DeviceError> {
        let path = self.device(address).join(name);
        fs::write(&path, text).map_err(failed("write", &path))
    }
}

/// The addresses among the names in a directory, in order.
fn addresses_in(directory: &Path) -> Result<Vec<Address>, DeviceError> {
    let list = |error| failed("list", directory)(error);
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(list)? {
        let entry = entry.map_err(list)?;
        found.extend(entry.file_name().to_str().and_then(|name| name.parse::<Address>().ok()));
    }
    found.sort();
    Ok(found)
}

//! The operator's configuration, `/etc/vial/config.toml`.
//!
//! [`File`] is the shape on disk; [`Config`] is what the program uses, checked. A file that is
//! absent means the defaults; a key that is not known is an error that names it.

use std::path::{Path, PathBuf};

use crate::devices::{DeviceError, address::Address};
use crate::disks::cache::Cache;
use crate::jail::user_ids::Range;
use crate::trust::{self, TrustError};
use crate::vhost_user::listed::{Entry, Listed};
use serde::Deserialize;
use vial_vmm_api::{MAX_COMMAND_LINE_BYTES, MEMORY_MIB, VCPUS};

/// Where the configuration lies.
pub const DEFAULT_PATH: &str = "/etc/vial/config.toml";
/// Names another configuration file; meant for tests and private installations.
pub const PATH_VARIABLE: &str = "VIAL_CONFIG";
/// Where kernel, guest image and VMM are installed.
pub const LIBRARY_DIRECTORY: &str = "/usr/lib/vial";
/// Where templates are kept.
pub const TEMPLATE_DIRECTORY: &str = "/run/vial-templates";
/// Where sandboxes keep what they need while they live.
pub const STATE_DIRECTORY: &str = "/run/vial";

/// How long a boot may take, in seconds.
pub const BOOT_TIMEOUT_SECONDS: std::ops::RangeInclusive<u32> = 1..=3600;

/// The first user id that jails can have: none of the host's own.
pub const JAIL_UID_BASE: std::ops::RangeInclusive<u32> = 65_536..=u32::MAX - 65_538;
/// What a VM may cost beside its memory, in MiB.
pub const OVERHEAD_MIB: std::ops::RangeInclusive<u32> = 32..=65_536;

/// Drivers of virtual functions that the guest's kernel has.
const GUEST_DRIVERS: [&str; 3] = ["igbvf", "ixgbevf", "iavf"];
/// How many drivers can be listed.
const MAX_DRIVERS: usize = 32;

/// Where CNI's library keeps results for containerd, and for Multus.
const CNI_CACHES: [&str; 2] = ["/var/lib/cni", "/var/lib/cni/multus"];
/// How many such directories can be listed.
const MAX_CACHES: usize = 8;

/// When pods start from templates ([`crate::template`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Templates {
    /// Whenever there is one that fits. A pod that finds none has one made, for those to come.
    #[default]
    Auto,
    /// Whenever there is one that fits. Only `vial template create` makes one.
    Manual,
    /// Never.
    Off,
}

/// Whether the kernel's vhost-net carries the packets of pods ([`crate::network::vhost`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostNet {
    /// Where the host has it; else the VMM does.
    #[default]
    Auto,
    /// Never: the VMM does.
    Off,
}

/// Keys of older versions, and what became of them.
const RENAMED: [(&str, &str); 1] =
    [("initrd", "since the guest image is a file system that is mapped, it is `image`")];

/// The file, as it is written. Every key may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The guest's kernel, an uncompressed 64-bit ELF file.
    pub kernel: Option<PathBuf>,
    /// The guest image: see `vial-mkimage`.
    pub image: Option<PathBuf>,
    /// The `vial-vmm` program.
    pub vmm: Option<PathBuf>,
    /// The least vCPUs of a VM, see [`crate::size`].
    pub vcpus: Option<u8>,
    /// Memory of a VM beside what its pod's containers are limited to, in MiB.
    pub memory_mib: Option<u32>,
    /// The most vCPUs that a VM grows to while it runs.
    pub max_vcpus: Option<u8>,
    /// The most memory that it grows to, in MiB.
    pub max_memory_mib: Option<u32>,
    /// How long a VM may take until its agent answers.
    pub boot_timeout_seconds: Option<u32>,
    /// Whether the guest's serial console is written to `console.log` in the state directory.
    pub debug_console: Option<bool>,
    /// Words added to the kernel's command line.
    pub kernel_arguments: Option<String>,
    /// Where sandboxes keep their state.
    pub state_directory: Option<PathBuf>,
    /// When pods start from templates.
    pub templates: Option<Templates>,
    /// Where templates are kept.
    pub template_directory: Option<PathBuf>,
    /// Whether VMMs are jailed.
    pub jail: Option<bool>,
    /// The first user id that a jail may have.
    pub jail_uid_base: Option<u32>,
    /// How many there are.
    pub jail_uid_count: Option<u32>,
    /// What a VM may cost beside its memory, in MiB.
    pub memory_overhead_mib: Option<u32>,
    /// PCI functions that pods may name by address.
    pub pci_devices: Option<Vec<String>>,
    /// Whether containers can bring functions into a VM that runs.
    pub hot_plug_devices: Option<bool>,
    /// Whether functions may be passed by iommufd.
    pub iommufd: Option<bool>,
    /// Drivers whose virtual functions go to the guest when CNI has moved them.
    pub network_functions: Option<Vec<String>>,
    /// Where CNI's results are kept.
    pub cni_caches: Option<Vec<PathBuf>>,
    /// Whether the kernel carries the packets of pods.
    pub vhost_net: Option<VhostNet>,
    /// Whether each VMM has its cores to itself.
    pub core_scheduling: Option<bool>,
    /// How block devices of pods are cached.
    pub disk_cache: Option<Cache>,
    /// Whether their requests are given to the kernel together.
    pub io_uring: Option<bool>,
    /// Devices of other processes that pods may name.
    pub vhost_user: Option<Vec<Entry>>,
}

/// The configuration that the program uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest image: see `vial-mkimage`.
    pub image: PathBuf,
    /// The `vial-vmm` program.
    pub vmm: PathBuf,
    /// See [`VCPUS`].
    pub vcpus: u8,
    /// See [`MEMORY_MIB`].
    pub memory_mib: u32,
    /// The most vCPUs that a VM grows to while it runs, beside what a template serves. 0: it keeps
    /// its size.
    pub max_vcpus: u8,
    /// The most memory that it grows to, in MiB; `None` for all that the host has. 0: it keeps its
    /// size.
    pub max_memory_mib: Option<u32>,
    /// See [`BOOT_TIMEOUT_SECONDS`].
    pub boot_timeout: std::time::Duration,
    /// Whether the guest's serial console is kept.
    pub debug_console: bool,
    /// Words added to the kernel's command line.
    pub kernel_arguments: String,
    /// Where sandboxes keep their state.
    pub state_directory: PathBuf,
    /// When pods start from templates.
    pub templates: Templates,
    /// Where templates are kept.
    pub template_directory: PathBuf,
    /// Whether VMMs are jailed. They have the rights of the shim if not.
    pub jail: bool,
    /// The user ids of the jails, one a pod.
    pub jail_uids: Range,
    /// What a VM may cost the host beside its guest's memory, in MiB. See
    /// [`crate::jail::cgroup::Limits`].
    pub memory_overhead_mib: u32,
    /// PCI functions that pods may name by address, see [`crate::devices`].
    pub pci_devices: Vec<Address>,
    /// Whether containers can bring functions into a VM that runs, on a node that has some bound to
    /// vfio-pci.
    pub hot_plug_devices: bool,
    /// Whether functions are passed by iommufd where the host has it, see [`crate::devices::ways`].
    pub iommufd: bool,
    /// Drivers of the host whose virtual functions go to the guest when CNI has moved them into a
    /// pod's network namespace, see [`crate::network::functions`].
    pub network_functions: Vec<String>,
    /// Where CNI's results are kept, which tell of functions that no interface tells of, see
    /// [`crate::network::chosen`].
    pub cni_caches: Vec<PathBuf>,
    /// Whether the kernel carries the packets of pods.
    pub vhost_net: VhostNet,
    /// Whether each VMM has the cores to itself on which it runs, see [`crate::core_scheduling`].
    pub core_scheduling: bool,
    /// How block devices of pods are cached, see [`crate::disks`].
    pub disk_cache: Cache,
    /// Whether VMMs get rings of io_uring for them, see [`crate::jail::rings`].
    pub io_uring: bool,
    /// Devices of other processes that pods may name, see [`crate::vhost_user`].
    pub vhost_user: Vec<Listed>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there but cannot be read.
    #[error("cannot read the configuration {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The file is no TOML, or has a key or a type that is not known.
    #[error("the configuration {path} is wrong in line {line}: {text}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Which key, and what it could be.
        text: String,
    },
    /// A value is out of its bounds.
    #[error("the configuration {path} is wrong: {key} = {value}, but it has to be {expected}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it can be.
        expected: String,
    },
    /// It, or a directory that it names, is not the operator's alone.
    #[error("the configuration {path} is refused: {error}")]
    Trust {
        /// The file.
        path: PathBuf,
        /// Who could change what.
        error: TrustError,
    },
}

impl Config {
    /// Reads the file that [`PATH_VARIABLE`] names, or [`DEFAULT_PATH`].
    ///
    /// # Errors
    /// [`ConfigError`]. A file that [`PATH_VARIABLE`] names has to exist. Others than root can change neither it nor the
    /// directories of sandboxes and templates.
    pub fn load() -> Result<Self, ConfigError> {
        let named = std::env::var_os(PATH_VARIABLE).map(PathBuf::from);
        let path = named.clone().unwrap_or_else(|| DEFAULT_PATH.into());
        let path = std::path::absolute(&path).unwrap_or(path);
        let trusted = |place: &Path| {
            trust::check(place).map_err(|error| ConfigError::Trust { path: path.clone(), error })
        };
        trusted(&path)?;
        let config = Self::read(&path, named.is_some())?;
        trusted(&config.state_directory)?;
        trusted(&config.template_directory)?;
        Ok(config)
    }

    fn read(path: &Path, named: bool) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => {
                Self::check(File::default(), path)
            }
            Err(error) => Err(ConfigError::Read { path: path.into(), error }),
        }
    }

    /// The configuration that `text`, the content of `path`, stands for.
    ///
    /// # Errors
    /// [`ConfigError::Parse`] and [`ConfigError::Value`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file = toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            ConfigError::Parse {
                path: path.into(),
                line: before.matches('\n').count() + 1,
                text: with_new_name(error.message()),
            }
        })?;
        Self::check(file, path)
    }

    fn check(file: File, path: &Path) -> Result<Self, ConfigError> {
        let library = Path::new(LIBRARY_DIRECTORY);
        let defaults = [
            ("kernel", file.kernel, library.join("vmlinux")),
            ("image", file.image, library.join("image.erofs")),
            ("vmm", file.vmm, default_vmm()),
            ("state_directory", file.state_directory, STATE_DIRECTORY.into()),
            ("template_directory", file.template_directory, TEMPLATE_DIRECTORY.into()),
        ];
        let [kernel, image, vmm, state_directory, template_directory] =
            defaults.map(|(key, given, default)| absolute(path, key, given.unwrap_or(default)));
        let timeout = file.boot_timeout_seconds.unwrap_or(60);
        let (base, count) =
            (file.jail_uid_base.unwrap_or(1_900_000_000), file.jail_uid_count.unwrap_or(65_536));
        let overhead = file.memory_overhead_mib.unwrap_or(128);
        let listed = file.pci_devices.unwrap_or_default();
        let listed: Result<Vec<Address>, _> = listed.iter().map(|text| text.parse()).collect();
        let pci_devices = listed.map_err(|error: DeviceError| {
            let expected = "a list of addresses such as \"0000:3b:02.0\"".into();
            wrong(path, "pci_devices", error.to_string(), expected)
        })?;
        let arguments = file.kernel_arguments.unwrap_or_default();
        // Half of the room is left to the shim's own words.
        let most = MAX_COMMAND_LINE_BYTES / 2;
        if arguments.len() > most || arguments.bytes().any(|b| !(0x20..0x7f).contains(&b)) {
            let expected = format!("at most {most} printable ASCII characters");
            return Err(wrong(path, "kernel_arguments", arguments, expected));
        }
        Ok(Self {
            kernel: kernel?,
            image: image?,
            vmm: vmm?,
            vcpus: within(path, "vcpus", file.vcpus.unwrap_or(1), VCPUS)?,
            memory_mib: within(path, "memory_mib", file.memory_mib.unwrap_or(128), MEMORY_MIB)?,
            max_vcpus: within(
                path,
                "max_vcpus",
                file.max_vcpus.unwrap_or(*VCPUS.end()),
                0..=*VCPUS.end(),
            )?,
            max_memory_mib: file
                .max_memory_mib
                .map(|most| within(path, "max_memory_mib", most, 0..=*MEMORY_MIB.end()))
                .transpose()?,
            boot_timeout: std::time::Duration::from_secs(
                within(path, "boot_timeout_seconds", timeout, BOOT_TIMEOUT_SECONDS)?.into(),
            ),
            debug_console: file.debug_console.unwrap_or(false),
            kernel_arguments: arguments,
            state_directory: state_directory?,
            templates: file.templates.unwrap_or_default(),
            template_directory: template_directory?,
            jail: file.jail.unwrap_or(true),
            jail_uids: Range {
                base: within(path, "jail_uid_base", base, JAIL_UID_BASE)?,
                count: within(path, "jail_uid_count", count, 1..=u32::MAX - 1 - base)?,
            },
            memory_overhead_mib: within(path, "memory_overhead_mib", overhead, OVERHEAD_MIB)?,
            pci_devices,
            hot_plug_devices: file.hot_plug_devices.unwrap_or(true),
            iommufd: file.iommufd.unwrap_or(true),
            network_functions: drivers(path, file.network_functions)?,
            cni_caches: caches(path, file.cni_caches)?,
            vhost_net: file.vhost_net.unwrap_or_default(),
            core_scheduling: file.core_scheduling.unwrap_or(false),
            disk_cache: file.disk_cache.unwrap_or_default(),
            io_uring: file.io_uring.unwrap_or(true),
            vhost_user: listed_devices(path, file.vhost_user.unwrap_or_default())?,
        })
    }

    /// The kernel's command line, less the words that the VMM adds for the machine it builds.
    pub fn command_line(&self) -> String {
        // A panic ends the VM at once; the guest has a host that starts it again, not a console
        // that somebody looks at. Entropy comes from the CPU until the VM's device is probed.
        // The dummy driver makes an interface by itself that no pod has asked for. Per-CPU memory
        // comes by pages, not in chunks of 2 MiB that the first container's cgroup makes the
        // kernel describe with 4 MiB. The host's clock is the guest's, so nobody has to look
        // twice a second whether the processor's counter can be trusted. What the kernel frees only
        // when no processor looks at it any more (RCU), a start waits for again and again: it asks
        // its few processors at once instead of letting ticks of 10 ms go by.
        let mut words = vec![
            "panic=-1",
            "random.trust_cpu=on",
            "dummy.numdummies=0",
            "percpu_alloc=page",
            "tsc=nowatchdog",
            "rcupdate.rcu_expedited=1",
        ];
        if self.debug_console {
            words.push("console=ttyS0");
        } else {
            words.extend(["quiet", "8250.nr_uarts=0"]);
        }
        words.extend(self.kernel_arguments.split_ascii_whitespace());
        words.join(" ")
    }
}

/// Names of drivers; by default those that the guest's kernel has, too.
fn drivers(path: &Path, given: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let names = given.unwrap_or_else(|| GUEST_DRIVERS.map(str::to_owned).into());
    let is_name = |name: &String| {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        (1..=64).contains(&name.len()) && name.bytes().all(is_part)
    };
    if names.len() > MAX_DRIVERS || !names.iter().all(is_name) {
        let expected = format!("a list of at most {MAX_DRIVERS} drivers such as \"igbvf\"");
        return Err(wrong(path, "network_functions", format!("{names:?}"), expected));
    }
    Ok(names)
}

/// Directories; by default that of the library by which CNI's plugins are called, and Multus'.
fn caches(path: &Path, given: Option<Vec<PathBuf>>) -> Result<Vec<PathBuf>, ConfigError> {
    let caches = given.unwrap_or_else(|| CNI_CACHES.map(PathBuf::from).into());
    if caches.len() > MAX_CACHES || !caches.iter().all(|cache| cache.is_absolute()) {
        let expected = format!("a list of at most {MAX_CACHES} absolute paths");
        return Err(wrong(path, "cni_caches", format!("{caches:?}"), expected));
    }
    Ok(caches)
}

/// What pods may name, each by a name of its own.
fn listed_devices(path: &Path, entries: Vec<Entry>) -> Result<Vec<Listed>, ConfigError> {
    let key = "vhost_user";
    let mut listed: Vec<Listed> = Vec::new();
    for entry in entries {
        let device =
            Listed::new(entry).map_err(|expected| wrong(path, key, "an entry".into(), expected))?;
        if listed.iter().any(|other| other.name == device.name) {
            let expected = "a list of devices with different names".into();
            return Err(wrong(path, key, format!("'{}' twice", device.name), expected));
        }
        listed.push(device);
    }
    Ok(listed)
}

/// `vial-vmm` beside the running program if it is there, else the installed one.
fn default_vmm() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.join("vial-vmm")))
        .filter(|beside| beside.is_file())
        .unwrap_or_else(|| Path::new(LIBRARY_DIRECTORY).join("vial-vmm"))
}

fn wrong(path: &Path, key: &'static str, value: String, expected: String) -> ConfigError {
    ConfigError::Value { path: path.into(), key, value, expected }
}

fn absolute(path: &Path, key: &'static str, value: PathBuf) -> Result<PathBuf, ConfigError> {
    if value.is_absolute() {
        return Ok(value);
    }
    Err(wrong(path, key, format!("{value:?}"), "an absolute path".into()))
}

fn within<T: PartialOrd + std::fmt::Display>(
    path: &Path,
    key: &'static str,
    value: T,
    bounds: std::ops::RangeInclusive<T>,
) -> Result<T, ConfigError> {
    if bounds.contains(&value) {
        return Ok(value);
    }
    let expected = format!("from {} to {}", bounds.start(), bounds.end());
    Err(wrong(path, key, value.to_string(), expected))
}

/// In one line, since containerd shows it as part of one; and where a key had another name once, its name of now.
fn with_new_name(message: &str) -> String {
    let line = message.replace('\n', ", ");
    match RENAMED.iter().find(|(old, _)| line.contains(&format!("unknown field `{old}`"))) {
        Some((_, new)) => format!("{line}; {new}"),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/vial/config.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn empty_file_gives_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.kernel, Path::new("/usr/lib/vial/vmlinux"));
        assert_eq!((config.vcpus, config.memory_mib), (1, 128));
        assert!(config.command_line().contains("quiet"));
    }

    #[test]
    fn example_file_holds_the_defaults() {
        let mut example = parse(include_str!("../../runtimeclass/config.toml")).unwrap();
        let defaults = parse("").unwrap();
        // Where that is depends on what lies beside the test's program.
        example.vmm.clone_from(&defaults.vmm);
        assert_eq!(example, defaults);
    }

    #[test]
    fn unknown_key_is_named_with_its_file() {
        let error = parse("vcpus = 1\nmemory_mb = 64").unwrap_err();
        assert!(error.contains("line 2") && !error.contains('\n'), "{error}");
        assert!(error.contains("memory_mb") && error.contains("/etc/vial/config.toml"), "{error}");
        assert!(!error.contains("since"), "{error}");
        let error = parse("initrd = \"/usr/lib/vial/initrd.img\"").unwrap_err();
        assert!(error.contains("it is `image`") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn values_out_of_bounds_name_the_bounds() {
        for (text, bounds) in [
            ("vcpus = 0", "1 to 64"),
            ("vcpus = 65", "1 to 64"),
            ("memory_mib = 31", "32 to 65536"),
            ("memory_mib = 65537", "32 to 65536"),
            ("max_vcpus = 65", "0 to 64"),
            ("max_memory_mib = 65537", "0 to 65536"),
            ("boot_timeout_seconds = 0", "1 to 3600"),
            ("jail_uid_base = 1000", "from 65536"),
            ("jail_uid_base = 4294967295", "to 4294901757"),
            ("jail_uid_count = 0", "from 1"),
            ("jail_uid_base = 4000000000\njail_uid_count = 300000000", "to 294967294"),
            ("memory_overhead_mib = 1", "32 to 65536"),
            ("kernel = \"vmlinux\"", "absolute"),
            ("pci_devices = [\"3b:02.0\"]", "0000:3b:02.0"),
            ("template_directory = \"templates\"", "absolute"),
            ("network_functions = [\"../igbvf\"]", "igbvf"),
            ("network_functions = [\"\"]", "at most 32"),
            ("cni_caches = [\"cni\"]", "at most 8 absolute"),
            ("vhost_net = \"on\"", "expected `auto` or `off`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(bounds), "{text}: {error}");
        }
        let long = format!("kernel_arguments = \"{}\"", "x".repeat(MAX_COMMAND_LINE_BYTES));
        assert!(parse(&long).unwrap_err().contains("printable"));
    }

    #[test]
    fn debug_console_is_not_quiet() {
        let config = parse("debug_console = true\nkernel_arguments = \"a  b\"").unwrap();
        let line = config.command_line();
        assert!(line.contains("console=ttyS0") && !line.contains("quiet"), "{line}");
        assert!(line.ends_with(" a b"), "{line}");
        assert!(line.len() <= MAX_COMMAND_LINE_BYTES);
    }
}

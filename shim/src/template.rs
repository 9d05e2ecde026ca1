//! Templates: guests that were booted once and saved, for pods to go on from.
//!
//! A template is a directory below `template_directory`, made whole or not at all:
//!
//! - `memory`: the guest's memory. Every VM maps it for itself alone, so that all of them share
//!   what none has written. Nobody reads all of it to find out whether it is as it was: the
//!   manifest has what the file system says of it ([`Seal`]).
//! - `state`: the vCPUs and devices. The VMM reads it, and refuses what is damaged or of another
//!   processor or release.
//! - `template.json`: what it was made from ([`Manifest`]).
//!
//! It serves pods of any size from its own up to its most vCPUs: a VM that goes on from it can have
//! more vCPUs, and more memory, which its guest takes then.
//!
//! Its name begins with the size of its VM and ends with a digest of all that decided how the
//! guest booted. A start does not read the kernel to compare digests: it compares what the file
//! system says of the files ([`Stamp`]), which a file that was replaced or written cannot keep.
//! Only root can write below the directory, or change what a stamp shows.

pub mod ahead;
pub mod create;
pub mod list;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use vial_agent_protocol::{TEMPLATE_WORD, is_valid_id};
use vial_vmm_api::GROWTH_STEP_MIB;

use crate::{
    config::{Config, Templates},
    jail::descriptors,
    spec::start_of,
};

/// The file names in a template.
const MEMORY: &str = "memory";
const STATE: &str = "state";
const MANIFEST: &str = "template.json";
/// The version of [`Manifest`]'s shape.
const MANIFEST_VERSION: u32 = 3;
/// The largest manifest that is read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 64 << 10;
/// What the names of templates begin with that are not whole yet.
const UNFINISHED: &str = ".new-";

/// The most vCPUs of pods that a template serves, unless its own VM has more. Each that a guest may
/// have costs it memory in every cgroup.
const MAX_VCPUS: u8 = 8;

/// What the file system says of a file, and a digest of its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    /// When content or inode last changed, in nanoseconds since 1970.
    changed_ns: i128,
    /// SHA-256 of the content, in hexadecimal.
    pub digest: String,
}

impl Stamp {
    /// Whether `path` is the same file, as it was.
    fn holds(&self, path: &Path) -> io::Result<bool> {
        let now = fs::metadata(path)?;
        let was = (self.device, self.inode, self.bytes, self.changed_ns);
        Ok(self.path == path && was == identity(&now))
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64, u64, i128) {
    let changed_ns =
        i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec());
    (metadata.dev(), metadata.ino(), metadata.len(), changed_ns)
}

/// What the file system says of a file that is written once: whoever writes, shortens or replaces it later changes that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    inode: u64,
    bytes: u64,
    /// When content or inode last changed, in nanoseconds since 1970.
    changed_ns: i128,
}

impl Seal {
    fn of(metadata: &fs::Metadata) -> Self {
        let (_, inode, bytes, changed_ns) = identity(metadata);
        Self { inode, bytes, changed_ns }
    }
}

/// What a template was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this shape.
    pub version: u32,
    /// The release of the shim that made it.
    pub release: String,
    /// The guest's kernel.
    pub kernel: Stamp,
    /// The guest image: see `vial-mkimage`.
    pub image: Stamp,
    /// The VMM, which decides what the guest saw of its machine.
    pub vmm: Stamp,
    /// vCPUs of the VM, which a pod's has too.
    pub vcpus: u8,
    /// The most vCPUs that a pod's can have.
    pub max_vcpus: u8,
    /// Memory of the VM, in MiB. A pod's has as much, or more.
    pub memory_mib: u32,
    /// The kernel's command line.
    pub command_line: String,
    /// The processor's name.
    pub processor: String,
    /// When it was made, in seconds since 1970.
    pub created_unix_seconds: u64,
    /// Its memory, as it was written. Known when the file has its name.
    pub memory: Seal,
}

/// Why a pod does not start from a template.
#[derive(Debug, thiserror::Error)]
pub enum NoTemplate {
    /// The operator does not want it.
    #[error("`templates` is \"off\"")]
    Off,
    /// The pod does not want it.
    #[error("the pod's annotation {ANNOTATION} is none")]
    Unwanted,
    /// A console has to be there from the start.
    #[error("`debug_console` is on, and the console of a template is not kept")]
    Console,
    /// The VM has devices that cannot be added to a guest that runs already.
    #[error("the VM has devices of the host")]
    Devices,
    /// The VM's memory has to be of another kind, or elsewhere.
    #[error("none has what the pod asks for of its memory: {0}")]
    Placed(&'static str),
    /// There is one for fewer vCPUs.
    #[error("{name} serves no more than {most} vCPUs, and the VM has {vcpus}")]
    Vcpus {
        /// The template.
        name: String,
        /// The most that it serves.
        most: u8,
        /// vCPUs of the VM.
        vcpus: u8,
    },
    /// There is none for that size.
    #[error(
        "there is none for {vcpus} vCPUs and {memory_mib} MiB below {directory}; `vial template \
         create` makes one"
    )]
    None {
        /// vCPUs of the VM.
        vcpus: u8,
        /// Its memory, in MiB.
        memory_mib: u32,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// There is one, from something else.
    #[error("{name} was made with another {what}; `vial template create` makes it anew")]
    Stale {
        /// The template.
        name: String,
        /// What is another one.
        what: &'static str,
    },
    /// There is one whose memory is not what was saved.
    #[error(
        "{0}: {MEMORY}: it was changed after it was made; `vial template create` makes it anew"
    )]
    Changed(String),
    /// There is one that cannot be used.
    #[error("{name}: {file}: {error}; `vial template create` makes it anew")]
    Unreadable {
        /// The template.
        name: String,
        /// The file in it.
        file: &'static str,
        /// What went wrong.
        error: io::Error,
    },
}

impl NoTemplate {
    /// Whether a template made now would do.
    pub fn is_for_want_of_one(&self) -> bool {
        matches!(
            self,
            Self::None { .. } | Self::Stale { .. } | Self::Changed(_) | Self::Unreadable { .. }
        )
    }
}

/// A template that fits, open.
#[derive(Debug)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// The guest's memory.
    pub memory: File,
    /// All else.
    pub state: File,
    /// The memory of its VM, in MiB.
    base_memory_mib: u32,
    /// The most vCPUs that it serves.
    max_vcpus: u8,
}

impl Template {
    /// The memory of its VM, in MiB.
    pub fn base_memory_mib(&self) -> u32 {
        self.base_memory_mib
    }

    /// The most vCPUs that it serves.
    pub fn max_vcpus(&self) -> u8 {
        self.max_vcpus
    }

    /// Whether it is this one still that has its name.
    fn is_in_place(&self, root: &Path) -> bool {
        let now = fs::metadata(root.join(&self.name).join(STATE));
        let own = self.state.metadata();
        now.is_ok_and(|now| own.is_ok_and(|own| (own.dev(), own.ino()) == (now.dev(), now.ino())))
    }

    /// The memory of a VM that goes on from it and is to have `memory_mib` at least.
    pub fn grown_mib(&self, memory_mib: u32) -> u32 {
        let more = memory_mib.saturating_sub(self.base_memory_mib);
        self.base_memory_mib + more.next_multiple_of(GROWTH_STEP_MIB)
    }

    /// What a VM with `memory_mib` has more than it.
    pub fn more_mib(&self, memory_mib: u32) -> u32 {
        memory_mib.saturating_sub(self.base_memory_mib)
    }
}

/// The annotation of a pod that says whether it may start from a template: all pods from one share
/// pages of memory, by which one can tell what code of the kernel another one runs.
pub const ANNOTATION: &str = "io.vial/template";

/// The annotation says something else.
#[derive(Debug, thiserror::Error)]
#[error("the annotation {ANNOTATION} is '{0}'; it can be auto or none")]
pub struct WrongAnnotation(String);

/// Whether the pod with these annotations may start from a template.
///
/// # Errors
/// [`WrongAnnotation`].
pub fn allowed(annotations: &HashMap<String, String>) -> Result<bool, WrongAnnotation> {
    match annotations.get(ANNOTATION).map(String::as_str) {
        None | Some("auto") => Ok(true),
        Some("none") => Ok(false),
        Some(other) => Err(WrongAnnotation(start_of(other))),
    }
}

/// The kernel's command line of a template whose VM has so many vCPUs: those that a pod may have
/// besides wait until it has them.
pub fn command_line(config: &Config, vcpus: u8) -> String {
    // A kernel that has patched itself for one processor would patch itself back in each pod that
    // has more, and each would then have the kernel's code to itself. A pod's memory is mapped in
    // pages of 4 KiB, so what is free goes back in pieces of 64 KiB and more (an order of 4), not
    // only in those of 2 MiB that a cold guest's memory is mapped in.
    format!("{} noreplace-smp {FREE_PAGES} maxcpus={vcpus} {TEMPLATE_WORD}", config.command_line())
}

const FREE_PAGES: &str = "page_reporting.page_reporting_order=4";

/// The most vCPUs of a VM that goes on from a template of that configuration.
fn max_vcpus(config: &Config) -> u8 {
    config.vcpus.max(MAX_VCPUS)
}

fn prefix(vcpus: u8, memory_mib: u32) -> String {
    format!("{vcpus}x{memory_mib}-")
}

/// The template for a VM of that configuration.
///
/// # Errors
/// [`NoTemplate`] says why there is none.
pub fn open(config: &Config) -> Result<Template, NoTemplate> {
    let (name, manifest) = find(config)?;
    let directory = config.template_directory.join(&name);
    let open = |file: &'static str| {
        descriptors::open_file(&directory.join(file)).map_err(|error| NoTemplate::Unreadable {
            name: name.clone(),
            file,
            error,
        })
    };
    Ok(Template {
        memory: open(MEMORY)?,
        state: open(STATE)?,
        name: name.clone(),
        base_memory_mib: manifest.memory_mib,
        max_vcpus: manifest.max_vcpus,
    })
}

/// The name of the template for a VM of that configuration, the largest of several, and what it was
/// made from.
///
/// # Errors
/// [`NoTemplate`] says why there is none.
pub fn find(config: &Config) -> Result<(String, Manifest), NoTemplate> {
    if config.templates == Templates::Off {
        return Err(NoTemplate::Off);
    }
    if config.debug_console {
        return Err(NoTemplate::Console);
    }
    let mut found: Option<(String, Manifest)> = None;
    let mut reason = NoTemplate::None {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        directory: config.template_directory.clone(),
    };
    for name in names(&config.template_directory) {
        let path = config.template_directory.join(&name);
        let unreadable =
            |error| NoTemplate::Unreadable { name: name.clone(), file: MANIFEST, error };
        match read_manifest(&path) {
            Ok(manifest) if !manifest.begins_within(config) => {}
            Ok(Manifest { max_vcpus: most, .. }) if most < config.vcpus => {
                reason = NoTemplate::Vcpus { name, most, vcpus: config.vcpus };
            }
            Ok(manifest) => match manifest.misfit(config).map_err(unreadable) {
                Ok(None) if !manifest.is_whole(&path) => reason = NoTemplate::Changed(name),
                Ok(None) if found.as_ref().is_some_and(|(_, best)| manifest.is_less(best)) => {}
                Ok(None) => found = Some((name, manifest)),
                Ok(Some(what)) => reason = NoTemplate::Stale { name, what },
                Err(error) => reason = error,
            },
            Err(error) => reason = unreadable(error),
        }
    }
    found.ok_or(reason)
}

impl Manifest {
    /// Whether what it was made from is not there as it was.
    fn is_outdated(&self) -> bool {
        let gone = |stamp: &Stamp| !stamp.holds(&stamp.path).unwrap_or(false);
        self.release != env!("CARGO_PKG_VERSION")
            || [&self.kernel, &self.image, &self.vmm].into_iter().any(gone)
    }

    /// Whether the memory in that directory is as it was saved.
    fn is_whole(&self, template: &Path) -> bool {
        fs::metadata(template.join(MEMORY)).is_ok_and(|now| Seal::of(&now) == self.memory)
    }

    /// Whether its VM is no larger than that of the configuration, so that it can become that.
    fn begins_within(&self, config: &Config) -> bool {
        self.vcpus <= config.vcpus && self.memory_mib <= config.memory_mib
    }

    /// Whether its VM leaves more to come than another's.
    fn is_less(&self, other: &Self) -> bool {
        (self.memory_mib, self.vcpus) < (other.memory_mib, other.vcpus)
    }

    /// What of the configuration the template was not made with.
    fn misfit(&self, config: &Config) -> io::Result<Option<&'static str>> {
        let files = [
            ("kernel", &self.kernel, &config.kernel),
            ("guest image", &self.image, &config.image),
            ("VMM", &self.vmm, &config.vmm),
        ];
        for (what, stamp, path) in files {
            if !stamp.holds(path)? {
                return Ok(Some(what));
            }
        }
        let checks = [
            ("release of Vial", self.release == env!("CARGO_PKG_VERSION")),
            ("kernel command line", self.command_line == command_line(config, self.vcpus)),
            ("size", self.begins_within(config) && config.vcpus <= self.max_vcpus),
        ];
        Ok(checks.into_iter().find(|(_, same)| !same).map(|(what, _)| what))
    }
}

/// The names of all templates that are whole, in order.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            !name.starts_with('.') && directory.join(name).join(MANIFEST).symlink_metadata().is_ok()
        })
        .collect();
    names.sort();
    names
}

/// Reads what a template was made from.
///
/// # Errors
/// It is absent, too large or no manifest.
pub fn read_manifest(template: &Path) -> io::Result<Manifest> {
    let path = template.join(MANIFEST);
    if fs::metadata(&path)?.len() > MAX_MANIFEST_BYTES {
        return Err(io::Error::other("it is too large to be one of ours"));
    }
    let manifest: Manifest = serde_json::from_slice(&fs::read(&path)?)?;
    match manifest.version {
        MANIFEST_VERSION => Ok(manifest),
        other => Err(io::Error::other(format!("it has version {other}"))),
    }
}

/// How much of the host's disk, and so at most of its page cache, a template takes, in bytes.
pub fn disk_bytes(template: &Path) -> u64 {
    let blocks = |file| fs::metadata(template.join(file)).map_or(0, |metadata| metadata.blocks());
    (blocks(MEMORY) + blocks(STATE)) * 512
}

/// Removes a template. VMs that go on from it keep what they have.
///
/// # Errors
/// There is none of that name, or the host refuses.
pub fn remove(directory: &Path, name: &str) -> io::Result<()> {
    let path = directory.join(name);
    if !is_valid_id(name) || !names(directory).iter().any(|known| known == name) {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("there is no template '{name}' below {}", directory.display()),
        ));
    }
    // Out of the sight of starts first, so that none finds half of one.
    let gone = directory.join(format!("{UNFINISHED}{name}-removed"));
    let _ = fs::remove_dir_all(&gone); // Left by a removal that was interrupted.
    fs::rename(&path, &gone)?;
    fs::remove_dir_all(&gone)
}

#[cfg(test)]
mod tests;

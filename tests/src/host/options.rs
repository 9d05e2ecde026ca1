//! The command line of `vial-host`, and its exit statuses.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::devices::Layout;

/// The time limit was reached and the emulated host was killed.
pub(crate) const STATUS_TIME_LIMIT: u8 = 124;
/// The emulated host died: panic, silence, or QEMU gone, before the command's status came.
pub(crate) const STATUS_EMULATOR_DIED: u8 = 125;
/// Nothing was started: wrong arguments, no QEMU, no disk.
pub(crate) const STATUS_NOT_STARTED: u8 = 123;

/// Runs commands on an emulated host with a working /dev/kvm, containerd and runc.
#[derive(Debug, Parser)]
#[command(
    name = "vial-host",
    after_help = "Exit status:
  0-255  the command's own (128+N when signal N ended it)
  123    nothing was started: wrong arguments, QEMU or the host's disk missing
  124    the time limit was reached
  125    the emulator died (kernel panic, silence, or QEMU ended): not a result of the command, run it again once
A command may end with 123 to 125 itself; --report tells them apart."
)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) action: Action,
}

/// What to do on the emulated host.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Boot the host, run a command on it, bring back its output, exit status and files, power off.
    Run(Run),
    /// Boot the host and give an interactive shell on it.
    Shell(Machine),
}

/// `vial-host run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) machine: Machine,

    /// Kill the host after this many seconds, its start-up included
    #[arg(long, value_name = "SECS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,

    /// Write how it ended, as JSON, to this file: {"outcome": "exited"|"time-limit"|"died"|"interrupted", "status", "reason", "seconds"}
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// One argument that names a local file ending in .sh: that script. One other argument: a line for sh.
    /// Several: a program on the host and its arguments. Standard error joins standard output
    #[arg(value_name = "SCRIPT|COMMAND", required = true, trailing_var_arg = true)]
    pub(crate) command: Vec<String>,
}

/// The machine to boot, and what it is given.
#[derive(Debug, Args)]
pub(crate) struct Machine {
    /// Virtual CPUs of the host
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) cpus: u8,

    /// The CPUs are two threads of each core
    #[arg(long, requires = "cpus", conflicts_with = "devices")]
    pub(crate) smt: bool,

    /// Memory of the host in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=65_536))]
    pub(crate) memory: u32,

    /// Count instructions: one CPU, the clock advances 1 ns an instruction, so that times can be compared between runs
    #[arg(long, conflicts_with = "cpus")]
    pub(crate) icount: bool,

    /// Give it an IOMMU, NUMA nodes, and on one of them a network card with SR-IOV and an NVMe disk, none of whose
    /// drivers is loaded; at most 2048 MiB of memory then
    #[arg(
        long,
        value_name = "LAYOUT",
        conflicts_with = "icount",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "two-nodes"
    )]
    pub(crate) devices: Option<Layout>,

    /// Do not start containerd
    #[arg(long)]
    pub(crate) no_containerd: bool,

    /// A directory that the host sees, read-only, as /payload; of several, the later hide files of the earlier.
    /// The files in its bin/ are copied to /usr/local/bin, its config.toml to /etc/vial, and containerd takes
    /// its containerd/config.toml
    #[arg(long, value_name = "DIR")]
    pub(crate) payload: Vec<PathBuf>,

    /// A directory that receives, at once, what is written to /out on the host
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// Where to write the host's kernel console, always kept; without it, a file in the temporary directory that is
    /// kept and named when the run fails
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,

    /// The host's directory (disk.img, vmlinuz, initrd.img); without it, VIAL_HOST, or what tests/host/build made last
    #[arg(long, value_name = "DIR")]
    pub(crate) host: Option<PathBuf>,

    /// More words for the host kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub(crate) append: String,

    /// One more argument for QEMU, as often as needed (devices, NUMA nodes)
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) qemu: Vec<String>,
}

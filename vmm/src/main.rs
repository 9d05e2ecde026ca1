//! The `vial-vmm` program: runs one virtual machine for whoever holds the other end of its socket.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use vial_vmm::{control::Control, landlock, privileges, probe, seccomp};

/// Runs one virtual machine, and is told which over an inherited socket.
///
/// Exit status: 0 the guest powered off, 10 it asked for a reset, 11 its kernel panicked, 12 triple
/// fault, 13 it was stopped, 14 the VMM or KVM failed; 1 an error before there was a VM, 2 a wrong
/// command line.
#[derive(Debug, Parser)]
#[command(name = "vial-vmm", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

/// What goes to standard error unless it is said.
const LEVEL: tracing::Level = tracing::Level::INFO;

#[derive(Debug, Args)]
struct Serve {
    /// The number of an inherited descriptor: one end of a SOCK_SEQPACKET pair, over which the VM
    /// is configured and run
    #[arg(long, value_name = "NUMBER")]
    api_fd: Option<RawFd>,
    /// The least serious messages that go to standard error
    #[arg(long, value_name = "LEVEL", default_value_t = LEVEL)]
    log: tracing::Level,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tells whether this host's KVM can run a guest: exit status 0 and one line when it can, 1 and
    /// the reason when not
    Probe {
        /// KVM's device node
        #[arg(long, default_value = "/dev/kvm", value_name = "PATH")]
        kvm: PathBuf,
    },
}

/// The command line as the shim has it. To build a parser of all that there can be takes longer than what a VM waits for
/// besides until it is configured, so it is built for others only.
fn as_the_shim_starts_it() -> Option<Cli> {
    let mut words = std::env::args_os().skip(1);
    let (option, number) = (words.next()?, words.next()?);
    let number = number.to_str()?.parse().ok()?;
    (option == "--api-fd" && words.next().is_none())
        .then_some(Cli { command: None, serve: Serve { api_fd: Some(number), log: LEVEL } })
}

fn main() -> ExitCode {
    let cli = as_the_shim_starts_it().unwrap_or_else(Cli::parse);
    let result = match cli.command {
        Some(Command::Probe { kvm }) => run_probe(&kvm),
        None => serve(&cli.serve),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vial-vmm: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, each said once: some tell their cause themselves.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match &*text {
        "" => cause,
        told if told.contains(&cause) => text,
        told => format!("{told}: {cause}"),
    })
}

fn run_probe(kvm: &std::path::Path) -> Result<ExitCode> {
    let took = probe::probe(kvm)?;
    println!("KVM is usable: the probe's guest took {:.3} ms", took.as_secs_f64() * 1e3);
    Ok(ExitCode::SUCCESS)
}

fn serve(options: &Serve) -> Result<ExitCode> {
    let Some(number) = options.api_fd else {
        bail!("no socket was given: this program is started by the shim; see --help");
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(options.log)
        .with_ansi(false)
        .without_time()
        .init();
    privileges::prepare_process()?;
    seccomp::keep_one_heap();
    if !landlock::restrict()? {
        tracing::debug!("this kernel has no Landlock: the jail and the filters hold alone");
    }
    let socket = inherited_socket(number)?;
    make_room_for_descriptors(&socket);
    // What a machine has goes with the process. To take it apart would need system calls that this
    // thread no longer may.
    let mut control = ManuallyDrop::new(Control::new(socket)?);
    let reason = control.run()?;
    // The shim hears of it by the socket and the exit status.
    tracing::debug!(%reason, "the VM ended");
    // Threads in the guest or in a system call are not waited for.
    std::process::exit(reason.status().into())
}

/// How many descriptors there is room for from the start.
const DESCRIPTORS: RawFd = 256;

/// Has the kernel make the table of descriptors larger than the 64 that it begins with. Once there are threads, whoever
/// opens the 65th waits until no processor looks at the old table any more (a grace period of RCU, Linux
/// `fs/file.c:expand_fdtable`): some milliseconds of a start with a network.
fn make_room_for_descriptors(any: &OwnedFd) {
    if let Err(error) = rustix::io::fcntl_dupfd_cloexec(any, DESCRIPTORS - 1) {
        tracing::debug!("there is no room for {DESCRIPTORS} descriptors yet: {error}");
    }
}

/// Takes over descriptor `number`, when it is a packet socket.
#[allow(unsafe_code)]
fn inherited_socket(number: RawFd) -> Result<OwnedFd> {
    if number < 3 {
        bail!("descriptor {number} is a standard stream; give --api-fd a number of 3 or more");
    }
    // SAFETY: the descriptor is only borrowed, to ask what it is; a number that is not open is
    // answered with an error.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    let kind = rustix::net::sockopt::socket_type(borrowed.as_fd())
        .with_context(|| format!("--api-fd {number} is not an open socket; pass one"))?;
    if kind != rustix::net::SocketType::SEQPACKET {
        bail!("--api-fd {number} is a socket of another type; pass a SOCK_SEQPACKET one");
    }
    // A duplicate is owned by us for certain, and closed when the VM's own children would run.
    let socket = rustix::io::fcntl_dupfd_cloexec(borrowed, 3)
        .context("take over the API socket; raise the limit of open files")?;
    // SAFETY: nothing else in this program has heard of the number: it came by the command line,
    // and no thread runs yet.
    drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) });
    Ok(socket)
}

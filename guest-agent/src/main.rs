//! `vial-agent`: PID 1 of the guest.
//!
//! It sets the guest up ([`boot`]), then serves the shim over vsock ([`server`], [`service`]):
//! containers ([`container`]) made by libcontainer in single-threaded helper processes of this
//! same program ([`launch`], [`helper`]), their streams ([`streams`], [`stdio`], [`terminal`]) and
//! their ends ([`reaper`]). What containers share is in [`network`], [`pod`] and [`users`], sockets of the host in [`sockets`]; a guest that goes
//! on from a template becomes a pod's own in [`adopt`], and as large as that pod's VM in [`fit`].
//! When it fails it ends, and the kernel
//! panics for want of an init: that is how the host learns of it.

mod adopt;
mod boot;
mod cgroup;
mod container;
mod copies;
mod devices;
mod fit;
mod forward;
mod functions;
mod helper;
mod launch;
mod log;
mod marks;
mod network;
mod nodes;
mod pod;
mod reaper;
mod served;
mod server;
mod service;
mod share;
mod shutdown;
mod sockets;
mod spec;
mod stdio;
mod streams;
mod sys;
mod terminal;
mod users;
mod workdir;

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use rustix::process::getpid;
use tracing::Level;

use crate::container::Places;
use crate::log::Sink;
use crate::server::Endpoint;

const USAGE: &str = "vial-agent is PID 1 of a Vial guest and not for use by hand.\n\
    usage: vial-agent --version\n\
    \x20      vial-agent --serve DIRECTORY SHARE   (as root: serve on Unix sockets, for tests)";

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [helper::WORD, order] => helper::run(order),
        [pod::MAKER_WORD] => pod::make_pid_namespace(None),
        [pod::MAKER_WORD, users] => pod::make_pid_namespace(Some(users.as_ref())),
        [pod::INIT_WORD] => pod::be_pid_namespace_init(),
        [users::MAKER_WORD] => users::make(),
        ["--version"] => {
            println!("vial-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--serve", directory, share] => match serve_directory(directory, share) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("vial-agent: {error:#}");
                ExitCode::FAILURE
            }
        },
        // The kernel hands words of its command line that it does not know on to init.
        _ if getpid().is_init() => match be_init() {
            Ok(never) => match never {},
            Err(error) => {
                say_last_words(&format!("{error:#}"));
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn be_init() -> anyhow::Result<Infallible> {
    let marks = boot::set_up()?;
    log::start(Sink::Kernel, log_level());
    let share = PathBuf::from(boot::SHARE);
    let places = Places::below(boot::BASE.as_ref(), share.clone());
    server::serve(&Endpoint::Vsock, places, marks)?;
    Err(shutdown::power_off(&share)).context("cannot power off")
}

/// `vial.log=debug` on the kernel's command line, or info.
fn log_level() -> Level {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let asked = line.split_whitespace().rev().find_map(|word| word.strip_prefix("vial.log="));
    asked.and_then(|level| level.parse().ok()).unwrap_or(Level::INFO)
}

fn serve_directory(directory: &str, share: &str) -> anyhow::Result<()> {
    log::start(Sink::Stderr, Level::DEBUG);
    if !rustix::process::geteuid().is_root() {
        bail!("containers need root");
    }
    // What PID 1 gets without asking: orphans.
    rustix::process::set_child_subreaper(Some(getpid())).context("become a subreaper")?;
    let directory = PathBuf::from(directory);
    let places = Places::below(&directory, PathBuf::from(share));
    server::serve(&Endpoint::Directory(directory), places, Vec::new())?;
    Ok(())
}

/// One line where someone may look: the kernel's log, else the console.
fn say_last_words(text: &str) {
    let line = format!("<2>vial-agent: fatal: {}\n", text.replace('\n', " "));
    if std::fs::write("/dev/kmsg", &line).is_err() {
        eprint!("{}", &line[3..]);
    }
}

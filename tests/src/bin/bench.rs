//! `vial-bench`: how fast pods start and what they cost, with Vial, with runc, and with any other runtime of containerd.
//!
//! `make bench` runs it; `measure` where the pods run, the rest where the results are wanted.

#[path = "../bench/mod.rs"]
mod bench;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bench::measure::{Plan, measure};
use bench::report::{Measured, Report, grown};
use bench::subject::Subject;
use clap::{Parser, Subcommand, ValueEnum};
use vial_tests::disk_load::Load;

/// Measures how fast pods start and what they cost, and reports it.
#[derive(Debug, Parser)]
#[command(name = "vial-bench", version)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    /// The host's clock is a clock
    Wall,
    /// The host's clock advances 1 ns an instruction
    Icount,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Take all measurements on this host, which needs root, KVM, containerd, runc and Vial
    Measure {
        /// What the host's clock shows
        #[arg(long, value_enum, default_value = "wall")]
        mode: Mode,
        /// How many samples of each measurement
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        /// The image that the containers run: it needs sh, dd, seq, ls and rm
        #[arg(long, default_value = "localhost/vial/busybox:latest")]
        image: String,
        /// Another runtime to measure beside runc and Vial, as kata=io.containerd.kata.v2; can be repeated
        #[arg(long, value_name = "NAME=RUNTIME")]
        peer: Vec<Subject>,
        /// Only the measurements whose id contains one of these words, parted by commas
        #[arg(long, value_name = "WORDS", value_delimiter = ',')]
        only: Vec<String>,
        /// Not the measurements with these ids, parted by commas
        #[arg(long, value_name = "IDS", value_delimiter = ',')]
        not: Vec<String>,
        /// Where to write the samples
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Make report.json, a table and pictures of what was measured
    Report {
        /// Where to put them
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
        /// What `measure` wrote
        #[arg(required = true)]
        measured: Vec<PathBuf>,
    },
    /// Take no measurement, but exchange data with this address; a measurement runs it in a container
    #[command(hide = true)]
    Exchange {
        /// Where the measurement listens
        address: std::net::SocketAddr,
    },
    /// Take no measurement, but write a disk by 8 threads at once; a measurement runs it in a container
    #[command(hide = true)]
    Load {
        /// The disk
        disk: PathBuf,
    },
    /// Compare counted instructions with a baseline; exit status 1 when something has grown
    Check {
        /// A report.json that was kept
        #[arg(long, value_name = "FILE")]
        baseline: PathBuf,
        /// How much more is too much
        #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
        limit: f64,
        /// What `measure` wrote
        #[arg(required = true)]
        measured: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().action) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vial-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<()> {
    match action {
        Action::Measure { mode, rounds, image, peer, only, not, output } => {
            let mode = match mode {
                Mode::Wall => "wall",
                Mode::Icount => "icount",
            };
            let plan = Plan { mode: mode.into(), rounds, image, peers: peer, only, not };
            write(&output, &serde_json::to_string_pretty(&measure(&plan)?)?)
        }
        Action::Load { disk } => Load { threads: 8, blocks: 64 }.write(&disk, 1),
        Action::Exchange { address } => bench::network::exchange(address),
        Action::Report { output, measured } => report(&output, &read_all(&measured)?),
        Action::Check { baseline, limit, measured } => {
            let baseline: Report = read(&baseline)?;
            let report = Report::of(&read_all(&measured)?);
            let grown = grown(&baseline, &report, limit);
            print!("{}", report.table());
            if !grown.is_empty() {
                bail!(
                    "more than the baseline by over {limit} %:\n  {}\nFind what costs that; if it is worth it, write the \
                     new baseline with 'make baseline' and say why in the commit",
                    grown.join("\n  ")
                );
            }
            Ok(())
        }
    }
}

fn report(directory: &Path, measured: &[Measured]) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let report = Report::of(measured);
    write(&directory.join("report.json"), &serde_json::to_string_pretty(&report)?)?;
    for one in measured {
        let named = |what: &str| directory.join(format!("{what}-{}.svg", one.mode));
        write(&named("timeline"), &bench::plot::timeline(one))?;
        write(&named("distributions"), &bench::plot::distributions(one))?;
    }
    print!("{}", report.table());
    println!("\nreport.json and pictures are in {}", directory.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not of vial-bench", path.display()))
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Measured>> {
    paths.iter().map(|path| read(path)).collect()
}

//! `vial-suite`: what a user of containerd does, run with Vial and with runc side by side.
//!
//! Runs as root on a host with KVM, containerd and both runtimes: the emulated host, as
//! `make test` does, or any machine of one's own.

#[path = "../cri/mod.rs"]
mod cri;
#[path = "../suite/mod.rs"]
mod suite;

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Parser;

/// Runs containers through containerd with Vial and with runc, and compares what they do.
///
/// Prints a line a case and `N passed, N failed` at the end. Exit status 0 when all passed.
#[derive(Debug, Parser)]
#[command(name = "vial-suite", version)]
struct Cli {
    /// Only the cases whose name contains one of these words, which commas separate
    #[arg(default_value = "")]
    filter: String,
    /// Only the cases of one part of so many, as in 1/2, so that several hosts can share them
    #[arg(long, value_name = "N/ALL", value_parser = part, default_value = "1/1")]
    part: (usize, usize),
    /// The handler in containerd's CRI configuration by which pods of Vial are run
    #[arg(long, value_name = "NAME", default_value = "vial")]
    handler: String,
    /// Lists the cases and runs none
    #[arg(long)]
    list: bool,
    /// Runs the cases of passed functions and NUMA nodes instead, on a host that has some: `vial-host run --devices`
    #[arg(long)]
    devices: bool,
    /// Writes the names of cases that held to this file, and leaves out those that stand there: a run that a host
    /// has died under goes on where it was
    #[arg(long, value_name = "FILE")]
    record: Option<std::path::PathBuf>,
    /// Runs the cases of vCPUs with a CPU each instead: `vial-host run --devices --cpus 4`
    #[arg(long, conflicts_with = "devices")]
    cpus: bool,
    /// Runs no cases, but kills shims, VMMs and containerd at random for so many minutes, and counts what is left
    #[arg(long, value_name = "MINUTES", conflicts_with_all = ["devices", "cpus", "record", "list"])]
    soak: Option<u32>,
    /// What --soak draws its times from: the same number draws the same [default: the clock]
    #[arg(long, value_name = "NUMBER", requires = "soak")]
    seed: Option<u64>,
    /// Runs no cases, but prints what inotify tells of these paths; a case runs it in a container
    #[arg(long, hide = true, value_delimiter = ',')]
    watch: Vec<std::path::PathBuf>,
    /// Archives to import first, each for `ctr image import`
    #[arg(long, value_name = "FILE")]
    import: Vec<std::path::PathBuf>,
    /// The image that the containers run
    #[arg(long, default_value = suite::bed::IMAGE)]
    image: String,
}

/// Reads `N/ALL`.
fn part(text: &str) -> Result<(usize, usize), String> {
    let numbers =
        text.split_once('/').and_then(|(n, all)| Some((n.parse().ok()?, all.parse().ok()?)));
    match numbers {
        Some((n, all)) if 1 <= n && n <= all => Ok((n, all)),
        _ => Err("give a part and how many there are, as in 1/2".into()),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if !cli.watch.is_empty() {
        return match suite::watch::watch(&cli.watch) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("vial-suite: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let wanted = |name: &str| cli.filter.split(',').any(|word| name.contains(word));
    let (part, parts) = cli.part;
    // Every so many, since cases of a kind stand together and take equally long.
    let all = match (cli.devices, cli.cpus) {
        (true, _) => suite::cases_of_devices(),
        (_, true) => suite::cases_of_cpus(),
        _ => suite::cases(),
    };
    let cases: Vec<_> =
        all.into_iter().filter(|case| wanted(case.name)).skip(part - 1).step_by(parts).collect();
    if cli.list {
        cases.iter().for_each(|case| println!("{}", case.name));
        return ExitCode::SUCCESS;
    }
    if cases.is_empty() {
        eprintln!("vial-suite: no case is called {:?} in that part; see --list", cli.filter);
        return ExitCode::from(2);
    }
    cri::pod::use_handler(cli.handler);
    if let Some(minutes) = cli.soak {
        let long = Duration::from_secs(60 * u64::from(minutes));
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seed = cli.seed.unwrap_or(clock.as_micros() as u64);
        return match suite::soak::soak(&cli.image, &cli.import, long, seed) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        };
    }
    let record = match suite::record::Record::open(cli.record.as_deref()) {
        Ok(record) => record,
        Err(error) => {
            eprintln!("vial-suite: {error:#}");
            return ExitCode::from(2);
        }
    };
    match suite::run(&cases, &cli.image, &cli.import, cli.devices, record) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

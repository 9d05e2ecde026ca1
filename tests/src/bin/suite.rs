//! `vial-suite`: what a user of containerd does, run with Vial and with runc side by side.
//!
//! Runs as root on a host with KVM, containerd and both runtimes: the emulated host, as
//! `make test` does, or any machine of one's own.

#[path = "../cri/mod.rs"]
mod cri;
#[path = "../suite/mod.rs"]
mod suite;

use std::ops::RangeInclusive;
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
    /// Only the cases of some parts of so many, as in 1/2 or 1-3/5, so that several hosts can share them
    #[arg(long, value_name = "N[-M]/ALL", value_parser = part, default_value = "1/1")]
    part: Part,
    /// The handler in containerd's CRI configuration by which pods of Vial are run
    #[arg(long, value_name = "NAME", default_value = "vial")]
    handler: String,
    /// Gives all pods of CRI users of their own, with runc, too
    #[arg(long)]
    own_users: bool,
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
    /// Runs no cases, but sends the standard input to this Unix socket and prints what comes back; a case runs it in a
    /// container
    #[arg(long, hide = true, value_name = "PATH")]
    call: Option<std::path::PathBuf>,
    /// Runs no cases, but echoes what comes to this Unix socket, for ever; a case runs it in a container
    #[arg(long, hide = true, value_name = "PATH")]
    answer: Option<std::path::PathBuf>,
    /// Runs no cases, but writes this disk for ever, and prints what is on it; a case runs it in a container
    #[arg(long, hide = true, value_name = "DEVICE")]
    load: Option<std::path::PathBuf>,
    /// Runs no cases, but prints how many pairs of queues an interface uses, and has it use COUNT before; a case runs it in
    /// a container
    #[arg(long, hide = true, value_name = "INTERFACE[=COUNT]")]
    pairs: Option<String>,
    /// Archives to import first, each for `ctr image import`
    #[arg(long, value_name = "FILE")]
    import: Vec<std::path::PathBuf>,
    /// The image that the containers run
    #[arg(long, default_value = suite::bed::IMAGE)]
    image: String,
}

/// Some of the parts that all cases are divided into.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Which of them, counted from 1.
    some: RangeInclusive<usize>,
    /// How many there are.
    all: usize,
}

impl Part {
    /// Whether the case is in it that comes after so many. Every so many are, since cases of a kind stand together and
    /// take equally long.
    fn has(&self, index: usize) -> bool {
        self.some.contains(&(index % self.all + 1))
    }
}

/// Reads `N/ALL` or `N-M/ALL`.
fn part(text: &str) -> Result<Part, String> {
    let read = || {
        let (some, all) = text.split_once('/')?;
        let (first, last) = some.split_once('-').unwrap_or((some, some));
        Some((first.parse().ok()?, last.parse().ok()?, all.parse().ok()?))
    };
    match read() {
        Some((first, last, all)) if 1 <= first && first <= last && last <= all => {
            Ok(Part { some: first..=last, all })
        }
        _ => Err("give a part and how many there are, as in 1/2, or several, as in 1-3/5".into()),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let helps = match (&cli.call, &cli.answer) {
        (Some(path), _) => Some(suite::calls::call(path)),
        (_, Some(path)) => Some(suite::calls::Server::run(path)),
        _ if cli.load.is_some() => {
            cli.load.as_ref().map(|disk| cri::disks::LOAD.write_for_ever(disk))
        }
        _ if cli.pairs.is_some() => cli.pairs.as_deref().map(cri::pairs::run),
        _ if !cli.watch.is_empty() => Some(suite::watch::watch(&cli.watch)),
        _ => None,
    };
    if let Some(helped) = helps {
        return match helped {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("vial-suite: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let wanted = |name: &str| cli.filter.split(',').any(|word| name.contains(word));
    let all = match (cli.devices, cli.cpus) {
        (true, _) => suite::cases_of_devices(),
        (_, true) => suite::cases_of_cpus(),
        _ => suite::cases(),
    };
    let wanted = all.into_iter().filter(|case| wanted(case.name)).enumerate();
    let cases: Vec<_> =
        wanted.filter(|(index, _)| cli.part.has(*index)).map(|(_, case)| case).collect();
    if cli.list {
        cases.iter().for_each(|case| println!("{}", case.name));
        return ExitCode::SUCCESS;
    }
    if cases.is_empty() {
        eprintln!("vial-suite: no case is called {:?} in that part; see --list", cli.filter);
        return ExitCode::from(2);
    }
    cri::pod::use_handler(cli.handler);
    if cli.own_users {
        cri::pod::give_own_users();
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_each_case_once() {
        let parts = ["1-4/7", "5-7/7"].map(|text| part(text).unwrap());
        for index in 0..30 {
            assert_eq!(parts.iter().filter(|part| part.has(index)).count(), 1, "case {index}");
        }
        assert_eq!((0..28).filter(|index| parts[0].has(*index)).count(), 16);
        for text in ["", "1", "0/2", "3/2", "2-1/3", "1-4/3", "a/2", "1/0"] {
            assert!(part(text).is_err(), "{text:?}");
        }
    }
}

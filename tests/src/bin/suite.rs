//! `vial-suite`: what a user of containerd does, run with Vial and with runc side by side.
//!
//! Runs as root on a host with KVM, containerd and both runtimes: the emulated host, as
//! `make test` does, or any machine of one's own.

#[path = "../cri/mod.rs"]
mod cri;
#[path = "../suite/mod.rs"]
mod suite;

use std::process::ExitCode;

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
    /// Lists the cases and runs none
    #[arg(long)]
    list: bool,
    /// Archives to import first, each for `ctr image import`
    #[arg(long, value_name = "FILE")]
    import: Vec<std::path::PathBuf>,
    /// The image that the containers run
    #[arg(long, default_value = suite::bed::IMAGE)]
    image: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let wanted = |name: &str| cli.filter.split(',').any(|word| name.contains(word));
    let cases: Vec<_> = suite::cases().into_iter().filter(|case| wanted(case.name)).collect();
    if cli.list {
        cases.iter().for_each(|case| println!("{}", case.name));
        return ExitCode::SUCCESS;
    }
    if cases.is_empty() {
        eprintln!("vial-suite: no case is called {:?}; see --list", cli.filter);
        return ExitCode::from(2);
    }
    match suite::run(&cases, &cli.image, &cli.import) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

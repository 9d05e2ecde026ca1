//! The `vial` command: looks at a machine and at the sandboxes on it.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vial_shim::{
    check,
    config::Config,
    devices::{list, pci::Sysfs},
    ps,
};

/// Looks at this machine and at the Vial sandboxes on it.
#[derive(Debug, Parser)]
#[command(name = "vial", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tells whether this machine can run microVMs behind containerd, and what to do if not.
    Check,
    /// Lists the PCI functions that pods can be given, and who has them.
    Devices {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
        /// Show every function that is no bridge.
        #[arg(long)]
        all: bool,
    },
    /// Lists the sandboxes that run here.
    Ps {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
        /// Print the phases of a sandbox's start, of all sandboxes without an ID.
        #[arg(long, value_name = "ID", num_args = 0..=1, default_missing_value = "")]
        timeline: Option<String>,
    },
}

fn main() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vial: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check => {
            let findings = check::run();
            for finding in &findings {
                println!("{finding}");
            }
            let ready = findings.iter().all(|finding| !finding.stands_in_the_way());
            Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Devices { json, all } => {
            let config = Config::load()?;
            let sandboxes = ps::list(&config.state_directory)?;
            let found = list::list(&Sysfs::default(), &config.pci_devices, &sandboxes, all)?;
            match json {
                true => println!("{}", serde_json::to_string_pretty(&found)?),
                false => print!("{}", list::table(&found)),
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Ps { json, timeline } => {
            let config = Config::load()?;
            let mut sandboxes = ps::list(&config.state_directory)?;
            if let Some(id) = timeline.as_deref().filter(|id| !id.is_empty()) {
                sandboxes.retain(|sandbox| sandbox.state.id == id);
                anyhow::ensure!(!sandboxes.is_empty(), "no sandbox '{id}' runs here");
            }
            if json {
                println!("{}", serde_json::to_string_pretty(&sandboxes)?);
            } else if timeline.is_some() {
                print!("{}", ps::timelines(&sandboxes));
            } else {
                print!("{}", ps::table(&sandboxes));
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

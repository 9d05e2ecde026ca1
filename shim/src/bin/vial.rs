//! The `vial` command: looks at a machine and at the sandboxes on it.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use vial_shim::{
    check,
    config::Config,
    devices::{list, pci::Sysfs, ways},
    export::{metrics, trace},
    jail::cgroup,
    ps, template, timeline,
};
use vial_vmm_api::{MEMORY_MIB, VCPUS};

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
    Check {
        /// The file that containerd's configuration begins with.
        #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
        containerd_config: PathBuf,
    },
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
    /// Prints numbers of the sandboxes and templates for Prometheus, as OpenMetrics text.
    Metrics {
        /// Write them to this file instead, beside its place and renamed: node_exporter's textfile collector reads *.prom.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Prints the starts of the sandboxes as traces, in OpenTelemetry's JSON: a line each.
    Trace {
        /// Only that sandbox.
        id: Option<String>,
    },
    /// Makes, lists and removes templates: guests that were booted once, for pods to start from.
    #[command(subcommand)]
    Template(TemplateCommand),
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Boots a guest and saves it, in place of an older template of that size. Prints its name.
    Create {
        /// The fewest vCPUs of a pod's VM, as the configuration says without this. Up to 8 it can
        /// have more.
        #[arg(long, value_parser = clap::value_parser!(u8).range(bounds(VCPUS)))]
        vcpus: Option<u8>,
        /// The least memory of a pod's VM in MiB, as the configuration says without this. One with
        /// more takes it when it starts.
        #[arg(long, value_parser = clap::value_parser!(u32).range(bounds(MEMORY_MIB)))]
        memory_mib: Option<u32>,
        /// Do nothing when there is one for pods of every size, or while another process makes
        /// one; else make it at the lowest priority. So a pod that finds none has it made.
        #[arg(long, conflicts_with_all = ["vcpus", "memory_mib"])]
        if_missing: bool,
    },
    /// Lists the templates, and whether pods start from them.
    List {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Removes a template. Pods that run go on.
    Remove {
        /// Its name.
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// Remove all of them.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
}

fn bounds<T: Into<i64> + Copy>(
    range: std::ops::RangeInclusive<T>,
) -> std::ops::RangeInclusive<i64> {
    (*range.start()).into()..=(*range.end()).into()
}

fn main() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    match run(command) {
        Ok(code) => code,
        // Whoever reads has seen enough, as `head` has.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vial: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// Writes to standard output.
fn tell(text: impl std::fmt::Display) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    write!(output, "{text}").and_then(|()| output.flush())
}

fn tell_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(tell(serde_json::to_string_pretty(value)? + "\n")?)
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check { containerd_config } => {
            let findings = check::run(&containerd_config);
            for finding in &findings {
                tell(format_args!("{finding}\n"))?;
            }
            let ready = findings.iter().all(|finding| !finding.stands_in_the_way());
            Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Devices { json, all } => {
            let config = Config::load()?;
            let sandboxes = ps::list(&config.state_directory)?;
            let found = list::list(&Sysfs::default(), &config.pci_devices, &sandboxes, all)?;
            match json {
                true => tell_json(&found)?,
                false => {
                    let (_, way) = ways::Host::look(Path::new("/")).way(config.iommufd);
                    tell(list::table(&found, &way))?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Ps { json, timeline } => {
            let config = Config::load()?;
            let mut sandboxes = ps::list(&config.state_directory)?;
            if let Some(id) = timeline.as_deref().filter(|id| !id.is_empty()) {
                keep_only(&mut sandboxes, id)?;
            }
            if json {
                tell_json(&sandboxes)?;
            } else if timeline.is_some() {
                tell(ps::timelines(&sandboxes))?;
            } else {
                tell(ps::table(&sandboxes))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Metrics { output } => {
            let config = Config::load()?;
            let sandboxes = ps::list(&config.state_directory)?;
            let templates = template::list::list(&config);
            let text = metrics::text(&sandboxes, &templates, Path::new(cgroup::ROOT));
            match output {
                Some(path) => replace(&path, &text)?,
                None => tell(text)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Trace { id } => {
            let mut sandboxes = ps::list(&Config::load()?.state_directory)?;
            if let Some(id) = id {
                keep_only(&mut sandboxes, &id)?;
            }
            tell(trace::lines(&sandboxes, timeline::since_epoch_ns()))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Template(command) => run_template(command, Config::load()?),
    }
}

fn keep_only(sandboxes: &mut Vec<ps::Listed>, id: &str) -> anyhow::Result<()> {
    sandboxes.retain(|sandbox| sandbox.state.id == id);
    anyhow::ensure!(!sandboxes.is_empty(), "no sandbox '{id}' runs here");
    Ok(())
}

/// Writes a file beside its place and renames it, so that a reader never sees half of one.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut beside = path.to_owned().into_os_string();
    beside.push(format!(".{}", std::process::id()));
    let done = std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, path));
    if done.is_err() {
        // What is there of it may be half.
        let _ = std::fs::remove_file(&beside);
    }
    done.with_context(|| format!("cannot write {}", path.display()))
}

fn run_template(command: TemplateCommand, mut config: Config) -> anyhow::Result<ExitCode> {
    match command {
        TemplateCommand::Create { vcpus, memory_mib, if_missing } => {
            config.vcpus = vcpus.unwrap_or(config.vcpus);
            config.memory_mib = memory_mib.unwrap_or(config.memory_mib);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let name = match if_missing {
                true => runtime.block_on(template::ahead::create_missing(&config))?,
                false => Some(runtime.block_on(template::create::create(&config))?),
            };
            if let Some(name) = name {
                tell(format_args!("{name}\n"))?;
            }
        }
        TemplateCommand::List { json } => {
            let listed = template::list::list(&config);
            match json {
                true => tell_json(&listed)?,
                false => tell(template::list::table(&listed))?,
            }
        }
        TemplateCommand::Remove { name, all } => {
            let directory = &config.template_directory;
            let names = if all { template::names(directory) } else { name.into_iter().collect() };
            for name in names {
                template::remove(directory, &name)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

//! `vial-host`: runs a command, or a shell, on the emulated host. See `--help` and the module `host`.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use clap::error::ErrorKind;

#[path = "../host/mod.rs"]
mod host;

use host::emulator::{Emulator, Task, shell_quote};
use host::options::{
    Action, Machine, Options, Run, STATUS_EMULATOR_DIED, STATUS_NOT_STARTED, STATUS_TIME_LIMIT,
};
use host::process::ending_signals;
use host::session::{self, Outcome};

/// What a shell reports of a program that SIGINT ended.
const STATUS_INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(STATUS_NOT_STARTED),
            };
        }
    };
    let ended = match &options.action {
        Action::Run(run) => run_command(run),
        Action::Shell(machine) => run_shell(machine),
    };
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("vial-host: {error:#}");
            ExitCode::from(STATUS_NOT_STARTED)
        }
    }
}

fn run_command(run: &Run) -> Result<u8> {
    let script = script(&run.command)?;
    let mut signals = ending_signals().context("cannot watch for signals")?;
    let started = Instant::now();
    let mut emulator = Emulator::start(&run.machine, Task::Script(&script))?;
    let limit = Some(Duration::from_secs(run.timeout));
    let outcome = session::wait(&mut emulator, &mut signals, limit, run.machine.icount)?;
    if let Some(report) = &run.report {
        write_report(report, &outcome, started.elapsed())?;
    }
    Ok(conclude(&emulator, &outcome, Some(run.timeout)))
}

fn run_shell(machine: &Machine) -> Result<u8> {
    let mut signals = ending_signals().context("cannot watch for signals")?;
    // QEMU makes the terminal raw and puts it back at its end, but not when it is killed.
    let saved = Command::new("stty")
        .arg("-g")
        .stdin(Stdio::inherit())
        .output()
        .ok()
        .filter(|output| output.status.success());
    let mut emulator = Emulator::start(machine, Task::Shell)?;
    let outcome = session::wait(&mut emulator, &mut signals, None, machine.icount)?;
    let status = conclude(&emulator, &outcome, None);
    drop(emulator);
    if let Some(saved) = saved {
        let settings = String::from_utf8_lossy(&saved.stdout).trim().to_owned();
        let _ = Command::new("stty").arg(settings).stdin(Stdio::inherit()).status();
    }
    Ok(status)
}

/// The script that the host's init runs for these words.
fn script(words: &[String]) -> Result<String> {
    if let [word] = words {
        if word.ends_with(".sh") && Path::new(word).is_file() {
            return fs::read_to_string(word)
                .with_context(|| format!("cannot read the script {word}"));
        }
        return Ok(format!("{word}\n"));
    }
    let quoted: Vec<String> = words.iter().map(|word| shell_quote(word)).collect();
    Ok(format!("exec {}\n", quoted.join(" ")))
}

/// Says what has to be said, and returns our exit status.
fn conclude(emulator: &Emulator, outcome: &Outcome, limit_seconds: Option<u64>) -> u8 {
    let status = match outcome {
        Outcome::Exited(status) => *status,
        Outcome::TimeLimit => {
            let limit_seconds = limit_seconds.unwrap_or_default();
            eprintln!(
                "vial-host: the time limit of {limit_seconds} seconds was reached; the host is killed"
            );
            STATUS_TIME_LIMIT
        }
        Outcome::Died(reason) => {
            eprintln!("vial-host: the emulator died, this is no result of the command: {reason}");
            STATUS_EMULATOR_DIED
        }
        Outcome::Interrupted => STATUS_INTERRUPTED,
    };
    // A shell ends with whatever its last command did: no failure to look into.
    let fine = match outcome {
        Outcome::Exited(status) => *status == 0 || limit_seconds.is_none(),
        Outcome::Interrupted => true,
        Outcome::TimeLimit | Outcome::Died(_) => false,
    };
    if !fine && let Some(console) = emulator.keep_console() {
        eprintln!("vial-host: the host's console is in {}", console.display());
    }
    status
}

fn write_report(path: &Path, outcome: &Outcome, elapsed: Duration) -> Result<()> {
    let (name, status, reason) = match outcome {
        Outcome::Exited(status) => ("exited", Some(*status), None),
        Outcome::TimeLimit => ("time-limit", None, None),
        Outcome::Died(reason) => ("died", None, Some(reason.as_str())),
        Outcome::Interrupted => ("interrupted", None, None),
    };
    let report = serde_json::json!({
        "outcome": name,
        "status": status,
        "reason": reason,
        "seconds": elapsed.as_secs_f64(),
    });
    fs::write(path, format!("{report}\n"))
        .with_context(|| format!("cannot write the report {}", path.display()))
}

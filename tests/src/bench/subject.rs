//! What is measured: a runtime of containerd, and one container of it at a time.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use vial_tests::node;

/// A runtime, and the name that the report has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) runtime: String,
    /// The node's configuration that it runs with; without, the one that there is.
    pub(crate) configuration: Option<String>,
}

impl std::str::FromStr for Subject {
    type Err = String;

    /// `NAME=RUNTIME`, as `kata=io.containerd.kata.v2`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, runtime)) if !name.is_empty() && !runtime.is_empty() => {
                Ok(Self { name: name.into(), runtime: runtime.into(), configuration: None })
            }
            _ => Err("give NAME=RUNTIME, as kata=io.containerd.kata.v2".into()),
        }
    }
}

/// Moments of a container that ran in the foreground, in milliseconds since `ctr` was started.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ran {
    /// When each line of its output came.
    pub(crate) lines: Vec<f64>,
    /// When `ctr` had ended.
    pub(crate) end: f64,
}

/// Milliseconds since a moment.
pub(crate) fn since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// Waits for a child without looking again and again, which would be measured, too. Whoever runs the
/// measurements sets their time limit.
fn ended(child: Child, what: &str) -> Result<()> {
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} ended with {}: {}", output.status, said.trim());
    Ok(())
}

/// Runs `ctr` and waits for it.
pub(crate) fn ctr(args: &[&str]) -> Result<()> {
    let mut command = Command::new("ctr");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    ended(command.spawn().context("start ctr")?, &format!("ctr {}", args.join(" ")))
}

impl Subject {
    /// Makes the node one for it.
    pub(crate) fn configure(&self) -> Result<()> {
        self.configuration.as_deref().map_or(Ok(()), node::write)
    }

    /// The name of its runtime in containerd's CRI configuration.
    pub(crate) fn handler(&self) -> &str {
        match self.runtime.as_str() {
            "io.containerd.runc.v2" => "runc",
            "io.containerd.vial.v2" => "vial",
            _ => &self.name,
        }
    }

    /// Runs a shell line in a container until it ends, with more options of `ctr run`.
    pub(crate) fn run(&self, image: &str, options: &[&str], line: &str) -> Result<Ran> {
        self.configure()?;
        let name = format!("bench-{}", self.name);
        let mut command = Command::new("ctr");
        command.args(["run", "--rm", "--runtime", &self.runtime]).args(options);
        command.args([image, &name, "sh", "-c", line]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().context("start ctr")?;
        let mut stdout = child.stdout.take().context("its standard output")?;
        let (mut lines, mut bytes) = (Vec::new(), [0; 4096]);
        // A reader that counts lines, not one that waits for full buffers.
        while let length @ 1.. = stdout.read(&mut bytes)? {
            let ends = bytes[..length].iter().filter(|&&byte| byte == b'\n').count();
            lines.extend(std::iter::repeat_n(since(start), ends));
        }
        ended(child, &format!("a container of {}", self.name))?;
        Ok(Ran { lines, end: since(start) })
    }

    /// Starts a container in the background that sleeps: one of several at once, told apart by a number of one digit.
    pub(crate) fn idle(&self, image: &str, number: usize) -> Result<Idle> {
        self.configure()?;
        let name = format!("bench-idle-{}-{number}", self.name);
        ctr(&[
            "run",
            "-d",
            "--null-io",
            "--runtime",
            &self.runtime,
            image,
            &name,
            "sleep",
            "1000",
        ])?;
        Ok(Idle { name })
    }
}

/// A container that does nothing, until it is dropped.
#[derive(Debug)]
pub(crate) struct Idle {
    name: String,
}

/// What the processes of an idle container cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Cost {
    /// Proportional set size, page tables, and the kernel memory of cgroups of their own, which page tables of the
    /// processes in there are part of, in KiB.
    pub(crate) memory_kib: f64,
    /// Time on a CPU since they started, in milliseconds.
    pub(crate) cpu_ms: f64,
}

impl Idle {
    /// The shim that was started for it and all that came of it.
    fn processes(&self) -> Result<BTreeSet<u32>> {
        let mut parents = Vec::new();
        let mut found = BTreeSet::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok())
            else {
                continue;
            };
            // A process may end while it is looked at.
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let parent = after_name.split_whitespace().nth(1).and_then(|word| word.parse().ok());
            parents.push((pid, parent.unwrap_or(0)));
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
            let is_shim = words[0].windows(15).any(|part| part == b"containerd-shim");
            if is_shim && words.contains(&self.name.as_bytes()) {
                found.insert(pid);
            }
        }
        ensure!(!found.is_empty(), "no shim is called for {}", self.name);
        loop {
            let before = found.len();
            found.extend(
                parents
                    .iter()
                    .filter(|(_, parent)| found.contains(parent))
                    .map(|p| p.0)
                    .collect::<Vec<_>>(),
            );
            if found.len() == before {
                return Ok(found);
            }
        }
    }

    /// What it costs now.
    pub(crate) fn cost(&self) -> Result<Cost> {
        let mut cost = Cost::default();
        let mut cgroups = BTreeSet::new();
        for pid in self.processes()? {
            let at = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
            cost.memory_kib += number_after(&at("smaps_rollup")?, "Pss:");
            let cgroup = at("cgroup")?.trim().strip_prefix("0::").map(str::to_owned);
            match cgroup.filter(|path| path.contains(&self.name)) {
                Some(own) => drop(cgroups.insert(own)),
                None => cost.memory_kib += number_after(&at("status")?, "VmPTE:"),
            }
            for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
                let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
                let ns = text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
                cost.cpu_ms += ns.unwrap_or(0.0) / 1e6;
            }
        }
        for cgroup in &cgroups {
            let stat = fs::read_to_string(format!("/sys/fs/cgroup{cgroup}/memory.stat"));
            cost.memory_kib += number_after(&stat.unwrap_or_default(), "kernel ") / 1024.0;
        }
        Ok(cost)
    }

    /// Ends and removes it. Returns how long that took, in milliseconds.
    pub(crate) fn remove(self) -> Result<f64> {
        let start = Instant::now();
        ctr(&["task", "delete", "--force", &self.name])?;
        ctr(&["container", "rm", &self.name])?;
        Ok(since(start))
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // After `remove` both only say that it is not there.
        let _ = ctr(&["task", "delete", "--force", &self.name]);
        let _ = ctr(&["container", "rm", &self.name]);
    }
}

/// The first number behind a word, 0 when the word is not there.
fn number_after(text: &str, word: &str) -> f64 {
    let rest = text.split_once(word).map_or("", |(_, rest)| rest);
    rest.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subject_is_a_name_and_a_runtime() {
        let subject: Subject = "kata=io.containerd.kata.v2".parse().unwrap();
        assert_eq!(
            (subject.name.as_str(), subject.runtime.as_str()),
            ("kata", "io.containerd.kata.v2")
        );
        for wrong in ["kata", "=x", "x=", ""] {
            assert!(wrong.parse::<Subject>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn number_is_found_behind_its_word() {
        assert_eq!(number_after("Rss: 9 kB\nPss:   1234 kB\n", "Pss:"), 1234.0);
        assert_eq!(number_after("Rss: 9 kB", "Pss:"), 0.0);
    }
}

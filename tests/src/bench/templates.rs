//! The node's configuration while a measurement runs: with a template that pods start from, or with none.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// The node's configuration as it has to be for a subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configuration {
    path: PathBuf,
    text: String,
}

impl Configuration {
    /// Puts it in place for the pods that start from here on.
    pub(crate) fn apply(&self) -> Result<()> {
        let beside = self.path.with_extension("new");
        fs::write(&beside, &self.text)
            .and_then(|()| fs::rename(&beside, &self.path))
            .with_context(|| format!("write {}", self.path.display()))
    }
}

/// A template for pods without limits. The configuration is as before when it is dropped.
#[derive(Debug)]
pub(crate) struct Template {
    directory: TempDir,
    before: Configuration,
}

impl Template {
    /// Makes it. `VIAL_CONFIG` has to name a configuration that may be changed.
    pub(crate) fn make() -> Result<Self> {
        let path = PathBuf::from(
            std::env::var_os("VIAL_CONFIG")
                .context("VIAL_CONFIG names no configuration that may be changed; set it")?,
        );
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let directory = tempfile::tempdir_in("/var/tmp")?;
        let template = Self { directory, before: Configuration { path, text } };
        template.used().apply()?;
        vial(&["template", "create"])?;
        let listed: serde_json::Value =
            serde_json::from_str(&vial(&["template", "list", "--json"])?)?;
        ensure!(listed[0]["used"] == true, "pods do not start from the template: {listed}");
        Ok(template)
    }

    fn with(&self, templates: &str) -> Configuration {
        let Configuration { path, text } = &self.before;
        let directory = self.directory.path();
        let text =
            format!("{text}\ntemplates = \"{templates}\"\ntemplate_directory = {directory:?}\n");
        Configuration { path: path.clone(), text }
    }

    /// The configuration with which pods start from it.
    pub(crate) fn used(&self) -> Configuration {
        self.with("auto")
    }

    /// The configuration with which each pod boots.
    pub(crate) fn unused(&self) -> Configuration {
        self.with("off")
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        if let Err(error) = self.before.apply() {
            eprintln!("vial-bench: the configuration is not as it was: {error:#}");
        }
    }
}

fn vial(args: &[&str]) -> Result<String> {
    let output = Command::new("vial").args(args).output().context("run vial")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "vial {} ended: {}", args.join(" "), said.trim());
    Ok(String::from_utf8(output.stdout)?)
}

//! The node's configuration while a measurement runs: with a template that pods start from, or with none.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use vial_tests::node::{self, Configuration};

/// A template. The configuration is as before when it is dropped.
#[derive(Debug)]
pub(crate) struct Template {
    directory: TempDir,
    before: Configuration,
}

impl Template {
    /// Makes it. `VIAL_CONFIG` has to name a configuration that may be changed.
    pub(crate) fn make() -> Result<Self> {
        ensure!(
            std::env::var_os("VIAL_CONFIG").is_some(),
            "VIAL_CONFIG names no configuration that may be changed; set it"
        );
        let template =
            Self { directory: tempfile::tempdir_in("/run")?, before: Configuration::keep() };
        node::write(&template.used())?;
        vial(&["template", "create"])?;
        let listed: serde_json::Value =
            serde_json::from_str(&vial(&["template", "list", "--json"])?)?;
        ensure!(listed[0]["used"] == true, "pods do not start from the template: {listed}");
        Ok(template)
    }

    fn with(&self, templates: &str) -> String {
        let directory = format!("{:?}", self.directory.path());
        let text = node::with(self.before.text(), "template_directory", &directory);
        node::with(&text, "templates", &format!("{templates:?}"))
    }

    /// The configuration with which pods start from it.
    pub(crate) fn used(&self) -> String {
        self.with("manual")
    }

    /// The configuration with which each pod boots.
    pub(crate) fn unused(&self) -> String {
        self.with("off")
    }
}

fn vial(args: &[&str]) -> Result<String> {
    let output = Command::new("vial").args(args).output().context("run vial")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "vial {} ended: {}", args.join(" "), said.trim());
    Ok(String::from_utf8(output.stdout)?)
}

//! Files of this node as block devices.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// One, until dropped.
#[derive(Debug)]
pub struct LoopDevice {
    /// Its node.
    pub path: String,
}

impl LoopDevice {
    /// Of a file that is there, which has to stay as large as it is.
    ///
    /// # Errors
    /// There is no losetup, or none is to be had.
    pub fn new(file: &Path) -> Result<Self> {
        // A kernel without modules has it built in.
        let _ = Command::new("modprobe").arg("loop").status();
        let mut losetup = Command::new("losetup");
        let made = losetup.args(["--find", "--show"]).arg(file).output().context("run losetup")?;
        let said = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "losetup ended with {}: {}", made.status, said.trim());
        Ok(Self { path: String::from_utf8(made.stdout)?.trim().to_owned() })
    }
}

impl Drop for LoopDevice {
    /// One that somebody holds goes when it is let go.
    fn drop(&mut self) {
        let ended = Command::new("losetup").args(["--detach", &self.path]).status();
        if !ended.as_ref().is_ok_and(|status| status.success()) {
            eprintln!("{} stays: {ended:?}", self.path);
        }
    }
}

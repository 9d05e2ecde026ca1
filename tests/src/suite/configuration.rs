//! The node's configuration of Vial: changed for a case, and put back.

use std::fs;
use std::path::Path;

use anyhow::Result;

/// Where it lies.
pub(crate) const PATH: &str = "/etc/vial/config.toml";

/// The configuration as it was, which comes back when this is dropped.
pub(crate) struct Configuration(Option<String>);

impl Configuration {
    /// As it is now; it may be absent.
    pub(crate) fn keep() -> Self {
        Self(fs::read_to_string(PATH).ok())
    }

    /// What it said.
    pub(crate) fn text(&self) -> &str {
        self.0.as_deref().unwrap_or_default()
    }

    /// Puts another in its place.
    pub(crate) fn write(&self, text: &str) -> Result<()> {
        if let Some(directory) = Path::new(PATH).parent() {
            fs::create_dir_all(directory)?;
        }
        Ok(fs::write(PATH, text)?)
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        let _ = match &self.0 {
            Some(text) => fs::write(PATH, text),
            None => fs::remove_file(PATH),
        };
    }
}

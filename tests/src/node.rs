//! What this node's operator configured for Vial.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Where it lies.
pub fn path() -> PathBuf {
    std::env::var_os("VIAL_CONFIG").map_or("/etc/vial/config.toml".into(), PathBuf::from)
}

/// The configuration as it was, which comes back when this is dropped.
#[derive(Debug)]
pub struct Configuration(Option<String>);

impl Configuration {
    /// As it is now; it may be absent.
    pub fn keep() -> Self {
        Self(fs::read_to_string(path()).ok())
    }

    /// What it said.
    pub fn text(&self) -> &str {
        self.0.as_deref().unwrap_or_default()
    }

    /// Puts another in its place.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, text: &str) -> Result<()> {
        write(text)
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        let restored = match &self.0 {
            Some(text) => write(text),
            None => fs::remove_file(path()).map_err(Into::into),
        };
        if let Err(error) = restored {
            eprintln!("the configuration is not as it was: {error:#}");
        }
    }
}

/// Puts a configuration in place for the pods that start from here on.
///
/// # Errors
/// The file cannot be written.
pub fn write(text: &str) -> Result<()> {
    let path = path();
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    // No start may find half of it.
    let beside = path.with_extension("new");
    fs::write(&beside, text)
        .and_then(|()| fs::rename(&beside, &path))
        .with_context(|| format!("write {}", path.display()))
}

/// A setting of the node's configuration, or its default. Only keys whose values are strings.
///
/// # Errors
/// The configuration is no TOML.
pub fn setting(key: &str, default: &str) -> Result<String> {
    let path = path();
    let text = fs::read_to_string(&path).unwrap_or_default();
    let table: toml::Table =
        toml::from_str(&text).with_context(|| format!("read {}", path.display()))?;
    Ok(table.get(key).and_then(|value| value.as_str()).unwrap_or(default).to_owned())
}

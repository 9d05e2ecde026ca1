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

/// `text` with a setting added, in place of one of that key. `value` is as TOML has it.
pub fn with(text: &str, key: &str, value: &str) -> String {
    let other = |line: &&str| line.split_once('=').is_none_or(|(found, _)| found.trim() != key);
    // Before all else: behind a table's heading it would be the table's.
    std::iter::once(format!("{key} = {value}\n"))
        .chain(text.lines().filter(other).map(|line| format!("{line}\n")))
        .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_takes_the_place_of_one_of_that_key() {
        let text = with("a = 1\nab = 2\n[b]\nc = 3\n", "a", "\"x\"");
        assert_eq!(text, "a = \"x\"\nab = 2\n[b]\nc = 3\n");
        assert_eq!(with("", "a", "1"), "a = 1\n");
    }
}

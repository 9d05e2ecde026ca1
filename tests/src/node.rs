//! What this node's operator configured for Vial.

use std::fs;

use anyhow::{Context, Result};

/// A setting of the node's configuration, or its default. Only keys whose values are strings.
///
/// # Errors
/// The configuration is no TOML.
pub fn setting(key: &str, default: &str) -> Result<String> {
    let path = std::env::var("VIAL_CONFIG").unwrap_or_else(|_| "/etc/vial/config.toml".into());
    let text = fs::read_to_string(&path).unwrap_or_default();
    let table: toml::Table = toml::from_str(&text).with_context(|| format!("read {path}"))?;
    Ok(table.get(key).and_then(|value| value.as_str()).unwrap_or(default).to_owned())
}

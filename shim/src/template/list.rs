//! What templates there are, for people and programs that look.

use serde::Serialize;

use super::{disk_bytes, names, read_manifest};
use crate::config::{Config, Templates};

/// A template, as it is listed.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Whether pods start from it.
    pub used: bool,
    /// Why not.
    pub reason: Option<String>,
    /// The fewest vCPUs of a VM that goes on from it.
    pub vcpus: Option<u8>,
    /// The most.
    pub max_vcpus: Option<u8>,
    /// The least memory of such a VM, in MiB.
    pub memory_mib: Option<u32>,
    /// How much of the disk it takes, in bytes.
    pub disk_bytes: u64,
    /// When it was made, in seconds since 1970.
    pub created_unix_seconds: Option<u64>,
}

/// All templates, in the order of their names.
pub fn list(config: &Config) -> Vec<Listed> {
    names(&config.template_directory).into_iter().map(|name| listed(config, name)).collect()
}

fn listed(config: &Config, name: String) -> Listed {
    let path = config.template_directory.join(&name);
    let manifest = read_manifest(&path);
    let reason = match &manifest {
        Err(error) => Some(error.to_string()),
        Ok(_) if config.templates == Templates::Off => Some("`templates` is \"off\"".into()),
        Ok(_) if config.debug_console => Some("`debug_console` is on".into()),
        Ok(manifest) => {
            // Of its size it may be the right one, whatever the configuration's is.
            let (vcpus, memory_mib) = (manifest.vcpus, manifest.memory_mib);
            match manifest.misfit(&Config { vcpus, memory_mib, ..config.clone() }) {
                Ok(None) if !manifest.is_whole(&path) => {
                    Some("its memory was changed after it was made".into())
                }
                Ok(misfit) => misfit.map(|what| format!("made with another {what}")),
                Err(error) => Some(error.to_string()),
            }
        }
    };
    let manifest = manifest.ok();
    Listed {
        used: reason.is_none(),
        reason,
        vcpus: manifest.as_ref().map(|manifest| manifest.vcpus),
        max_vcpus: manifest.as_ref().map(|manifest| manifest.max_vcpus),
        memory_mib: manifest.as_ref().map(|manifest| manifest.memory_mib),
        disk_bytes: disk_bytes(&path),
        created_unix_seconds: manifest.map(|manifest| manifest.created_unix_seconds),
        name,
    }
}

/// A table for people.
pub fn table(listed: &[Listed]) -> String {
    let range = |least: Option<u8>, most: Option<u8>| match (least, most) {
        (Some(least), Some(most)) => format!("{least}-{most}"),
        _ => "-".into(),
    };
    let mut text =
        format!("{:<32} {:>5} {:>10} {:>9}  USED\n", "TEMPLATE", "VCPUS", "MEMORY_MIB", "DISK_MIB");
    for one in listed {
        text += &format!(
            "{:<32} {:>5} {:>10} {:>9.1}  {}\n",
            one.name,
            range(one.vcpus, one.max_vcpus),
            one.memory_mib.map_or("-".into(), |least| format!("{least}+")),
            one.disk_bytes as f64 / f64::from(1 << 20),
            one.reason.as_ref().map_or("yes".into(), |reason| format!("no: {reason}")),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_a_line_each_and_says_why_one_is_not_used() {
        let one = |reason: Option<&str>| Listed {
            name: "1x128-0123456789abcdef".into(),
            used: reason.is_none(),
            reason: reason.map(str::to_owned),
            vcpus: Some(1),
            max_vcpus: Some(8),
            memory_mib: Some(128),
            disk_bytes: 30 << 20,
            created_unix_seconds: Some(1),
        };
        let text = table(&[one(None), one(Some("made with another kernel"))]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].ends_with(" 30.0  yes") && lines[1].contains(" 1-8 "), "{text}");
        assert!(lines[1].contains(" 128+ "), "{text}");
        assert!(lines[2].ends_with("no: made with another kernel"), "{text}");
    }
}

//! The names of the cases that held, in a file that outlives the host they ran on.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// What held, a name a line.
#[derive(Debug, Default)]
pub(crate) struct Record {
    before: BTreeSet<String>,
    file: Option<File>,
}

impl Record {
    /// Reads what there is. Without a path nothing is remembered.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        // A line that the host died in the middle of is no name: its case runs again.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|file| file.set_len(whole.len() as u64).map(|()| file))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { before: whole.lines().map(String::from).collect(), file: Some(file) })
    }

    /// Whether a case held before this run.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.before.contains(name)
    }

    /// A case held. That it cannot be written costs a later run time, and this one nothing.
    pub(crate) fn add(&mut self, name: &str) {
        if let Some(file) = &mut self.file
            && let Err(error) = writeln!(file, "{name}")
        {
            println!("note    {name} is not recorded: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_has_the_whole_names_of_an_earlier_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("held");
        let mut record = Record::open(Some(&path)).unwrap();
        assert!(!record.has("one"));
        record.add("one");
        assert!(!record.has("one"), "it held in this run, not before");
        File::options().append(true).open(&path).unwrap().write_all(b"two").unwrap();
        let mut record = Record::open(Some(&path)).unwrap();
        assert!(record.has("one") && !record.has("two") && !record.has(""));
        record.add("three");
        assert!(Record::open(Some(&path)).unwrap().has("three"));
        assert!(!Record::open(None).unwrap().has("one"));
    }
}

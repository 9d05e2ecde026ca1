//! A container's log file as CRI writes it: `time stream tag text`, a line each, where the tag is
//! F for a full line and P for a part of one.

use anyhow::{Context, Result, ensure};

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// RFC 3339 with nanoseconds.
    pub(crate) time: String,
    /// `stdout` or `stderr`.
    pub(crate) stream: String,
    /// Whether the line goes on in the next entry.
    pub(crate) partial: bool,
    pub(crate) text: String,
}

/// Reads a file's text.
pub(crate) fn parse(text: &str) -> Result<Vec<Entry>> {
    ensure!(text.is_empty() || text.ends_with('\n'), "a log that ends within a line");
    text.lines().map(entry).collect()
}

fn entry(line: &str) -> Result<Entry> {
    let mut words = line.splitn(4, ' ');
    let mut word = || words.next().with_context(|| format!("no CRI log line: {line:?}"));
    let (time, stream, tag, text) = (word()?, word()?, word()?, word()?);
    ensure!(time.len() >= 20 && time.contains('T'), "no time begins {line:?}");
    ensure!(matches!(stream, "stdout" | "stderr"), "no stream in {line:?}");
    ensure!(matches!(tag, "F" | "P"), "no tag in {line:?}");
    Ok(Entry { time: time.into(), stream: stream.into(), partial: tag == "P", text: text.into() })
}

/// What a stream carried, parts joined.
pub(crate) fn stream(entries: &[Entry], name: &str) -> String {
    let mut text = String::new();
    for entry in entries.iter().filter(|entry| entry.stream == name) {
        text.push_str(&entry.text);
        if !entry.partial {
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_told_apart_and_parts_joined() {
        let text = "2026-01-02T03:04:05.000000006Z stdout P a b\n\
                    2026-01-02T03:04:05.000000007Z stderr F  e\n\
                    2026-01-02T03:04:05.000000008Z stdout F c\n\
                    2026-01-02T03:04:05.000000009Z stdout F \n";
        let entries = parse(text).unwrap();
        assert_eq!(stream(&entries, "stdout"), "a bc\n\n");
        assert_eq!(stream(&entries, "stderr"), " e\n");
    }

    #[test]
    fn lines_that_are_none_are_refused() {
        for text in [
            "half a line",
            "plain text\n",
            "2026-01-02T03:04:05.000000006Z stdin F a\n",
            "2026-01-02T03:04:05.000000006Z stdout X a\n",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}

//! What the emulated host's init says over its control port: one line a message, ASCII.

/// A message of the host's init.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Init runs and the control port works.
    Started,
    /// Still running; sent every few seconds.
    Alive,
    /// The command ended with this status; power-off follows.
    Exit(u8),
    /// The host could not be made ready, and why.
    Broken(String),
}

/// Longest line that init sends. More without a line end is noise of a dying host.
const LINE_LIMIT: usize = 4096;

/// Cuts the port's bytes into messages. Unknown lines are dropped: a dying host may write anything.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    /// Takes the bytes that came and returns the messages that they complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                messages.extend(parse(&String::from_utf8_lossy(&self.pending)));
                self.pending.clear();
            } else if self.pending.len() < LINE_LIMIT {
                self.pending.push(byte);
            }
        }
        messages
    }
}

fn parse(line: &str) -> Option<Message> {
    match line.trim().split_once(' ') {
        None if line.trim() == "started" => Some(Message::Started),
        None if line.trim() == "alive" => Some(Message::Alive),
        Some(("exit", status)) => status.parse().ok().map(Message::Exit),
        Some(("broken", reason)) => Some(Message::Broken(reason.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_split_anywhere_give_the_same_messages() {
        let text = b"started\nalive\nexit 42\nbroken no disk here\n";
        for cut in 0..=text.len() {
            let mut lines = Lines::default();
            let mut messages = lines.push(&text[..cut]);
            messages.extend(lines.push(&text[cut..]));
            assert_eq!(
                messages,
                [
                    Message::Started,
                    Message::Alive,
                    Message::Exit(42),
                    Message::Broken("no disk here".to_owned()),
                ],
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn lines_unknown_or_out_of_range_are_dropped() {
        let mut lines = Lines::default();
        assert!(lines.push(b"exit 256\nexit x\nhello\n\xff\xfe\n").is_empty());
    }

    #[test]
    fn lines_without_end_stay_bounded() {
        let mut lines = Lines::default();
        for _ in 0..64 {
            assert!(lines.push(&[b'x'; 1024]).is_empty());
        }
        assert!(lines.pending.len() <= LINE_LIMIT);
        lines.push(b"\n");
        assert_eq!(lines.push(b"alive\n"), [Message::Alive]);
    }
}

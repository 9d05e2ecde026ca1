//! Where log lines go: the kernel's log in the guest, stderr in a test.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::Arc;

use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;

/// The longest line that goes to the kernel's log; the kernel cuts at about 1 KiB.
const MAX_LINE: usize = 900;

/// What the agent itself logs at, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    Kernel,
    Stderr,
}

/// Sends log lines to `sink`: the agent's own from `level` on, everybody else's at warn. A
/// library logs whole specs at debug, which belong in no log.
pub(crate) fn start(sink: Sink, level: Level) {
    let filter = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("vial_agent", LevelFilter::from_level(level));
    let kernel = match sink {
        Sink::Kernel => OpenOptions::new().write(true).open("/dev/kmsg").ok(),
        Sink::Stderr => None,
    };
    match kernel {
        Some(kmsg) => {
            let layer = tracing_subscriber::fmt::layer()
                .with_ansi(false)
                .without_time()
                .with_target(false)
                .with_writer(Kmsg(Arc::new(kmsg)));
            tracing_subscriber::registry().with(filter).with(layer).init();
        }
        None => {
            let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(io::stderr);
            tracing_subscriber::registry().with(filter).with(layer).init();
        }
    }
}

/// For a helper: besides the kernel's log, every error also goes to `errors`, which the server
/// reads when the helper failed. The processes that libcontainer clones write there, too.
pub(crate) fn start_helper(errors: File) {
    let errors = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_level(false)
        .with_writer(Arc::new(errors));
    tracing_subscriber::registry()
        .with(Targets::new().with_default(LevelFilter::ERROR))
        .with(errors)
        .init();
}

/// One write(2) to /dev/kmsg is one record.
#[derive(Clone)]
struct Kmsg(Arc<File>);

impl<'a> MakeWriter<'a> for Kmsg {
    type Writer = Record;

    fn make_writer(&'a self) -> Record {
        Record { kmsg: Arc::clone(&self.0), severity: 6 }
    }

    fn make_writer_for(&'a self, meta: &tracing::Metadata<'_>) -> Record {
        let severity = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        Record { kmsg: Arc::clone(&self.0), severity }
    }
}

struct Record {
    kmsg: Arc<File>,
    severity: u8,
}

impl Write for Record {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = &line[..line.len().min(MAX_LINE)];
        let mut record = format!("<{}>vial-agent: ", self.severity).into_bytes();
        record.extend_from_slice(text);
        // A full or rate-limited log is no reason to fail.
        let _ = (&*self.kmsg).write(&record);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! Standard streams and terminals.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::bed::{Bed, Outcome, Runtime, wait};

/// Writes to a container's standard input, reads back what it answers to that, and only then ends
/// the input: `ctr` forgets an end that comes before the task is there.
fn converse(
    bed: &Bed,
    runtime: Runtime,
    args: &[&str],
    input: &str,
    first: &str,
) -> Result<String> {
    let name = bed.name();
    let mut child = bed
        .command(runtime, &["--rm"], &name, args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("its standard input")?;
    let mut stdout = child.stdout.take().context("its standard output")?;
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).map(|()| stdin));
    let mut answer = vec![0; first.len()];
    stdout.read_exact(&mut answer)?;
    ensure!(answer == first.as_bytes(), "{runtime:?} answers with something else");
    drop(writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest)?;
    let status = wait(&mut child)?;
    ensure!(status == 0, "{runtime:?}: it ended with {status}");
    Ok(rest)
}

pub(crate) fn stdin_reaches_its_end(bed: &Bed) -> Result<()> {
    let text: String = (0..2000).map(|number| format!("line {number}\n")).collect();
    for runtime in Runtime::BOTH {
        let rest = converse(bed, runtime, &["cat"], &text, &text)?;
        ensure!(rest.is_empty(), "{runtime:?}: {} bytes too many", rest.len());
        let count = ["sh", "-c", "echo ready; wc -c"];
        let rest = converse(bed, runtime, &count, &text, "ready\n")?;
        ensure!(rest.trim() == text.len().to_string(), "{runtime:?} counts {rest:?}");
    }
    Ok(())
}

pub(crate) fn hundred_megabytes_arrive_whole_and_in_order(bed: &Bed) -> Result<()> {
    // In pages, as most programs write: busybox takes longer to count than Vial to carry it.
    let name = bed.name();
    let pages = bed.command(Runtime::Vial, &["--rm"], &name, &["seq", "1", "1000000"]);
    let bytes = count_lines(pages, 1_000_000)?;
    ensure!(bytes > 6_000_000, "only {bytes} bytes");

    let directory = tempfile::tempdir_in("/var/tmp")?;
    let mut file = BufWriter::new(File::create(directory.path().join("lines"))?);
    const LAST: u64 = 12_500_000;
    for line in 1..=LAST {
        writeln!(file, "{line}")?;
    }
    file.flush()?;
    let mount = format!("type=bind,src={},dst=/in,options=rbind:ro", directory.path().display());
    let name = bed.name();
    let options = ["--rm", "--mount", &mount];
    let bytes =
        count_lines(bed.command(Runtime::Vial, &options, &name, &["cat", "/in/lines"]), LAST)?;
    ensure!(bytes > 100_000_000, "only {bytes} bytes");
    Ok(())
}

/// Runs a command that prints the numbers from 1 to `last`, a line each: what is lost, doubled or swapped shows. Returns
/// how many bytes there were.
fn count_lines(mut command: Command, last: u64) -> Result<usize> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut output = BufReader::with_capacity(1 << 20, child.stdout.take().context("its output")?);
    let (mut expected, mut bytes, mut line) = (1, 0, String::new());
    while output.read_line(&mut line)? > 0 {
        bytes += line.len();
        let number = line.trim_end().parse::<u64>().with_context(|| format!("{line:?}"))?;
        ensure!(number == expected, "line {expected} is {number}");
        expected += 1;
        line.clear();
    }
    ensure!(expected == last + 1, "the last line was {}", expected - 1);
    let status = wait(&mut child)?;
    ensure!(status == 0, "it ended with {status}");
    Ok(bytes)
}

pub(crate) fn stderr_is_kept_apart(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let outcome = bed.sh(runtime, "echo out; echo err >&2")?.expect(0)?;
        ensure!(
            (outcome.stdout.as_str(), outcome.stderr.as_str()) == ("out\n", "err\n"),
            "{runtime:?}: {outcome:?}"
        );
    }
    Ok(())
}

/// Runs a command on a terminal of 33 rows and 77 columns, as the leader of a session of its own.
fn on_a_terminal(command: &Command) -> Result<Outcome> {
    let quote = |word: &OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    let mut words = vec![quote(command.get_program())];
    words.extend(command.get_args().map(quote));
    let line = format!("stty rows 33 cols 77; exec {}", words.join(" "));

    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.into_string()?;
    let terminal = || File::options().read(true).write(true).open(&name).map(Stdio::from);
    let mut child = Command::new("setsid")
        .args(["--ctty", "--wait", "sh", "-c", &line])
        .stdin(terminal()?)
        .stdout(terminal()?)
        .stderr(terminal()?)
        .spawn()?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        // It ends with an error when nobody has the terminal open any more.
        let _ = File::from(master).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = wait(&mut child)?;
    let stdout = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    Ok(Outcome { status, stdout, stderr: String::new() })
}

pub(crate) fn terminal_is_a_terminal_of_its_size(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let name = bed.name();
        let line = "test -t 0 && test -t 1 && test -t 2 && sleep 1 && stty size; exit 5";
        let command = bed.command(runtime, &["--rm", "-t"], &name, &["sh", "-c", line]);
        let outcome = on_a_terminal(&command)?.expect(5)?;
        ensure!(outcome.stdout.contains("33 77"), "{runtime:?}: {outcome:?}");
    }
    Ok(())
}

pub(crate) fn exec_with_a_terminal_works(bed: &Bed) -> Result<()> {
    for runtime in Runtime::BOTH {
        let container = bed.detached(runtime, &["sleep", "1000"])?;
        let mut command = Command::new("ctr");
        command.args(["task", "exec", "-t", "--exec-id", "terminal", &container.name]);
        command.args(["sh", "-c", "test -t 0 && sleep 1 && stty size; exit 6"]);
        let outcome = on_a_terminal(&command)?.expect(6)?;
        ensure!(outcome.stdout.contains("33 77"), "{runtime:?}: {outcome:?}");
    }
    Ok(())
}

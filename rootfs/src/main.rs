//! `vial-mkimage`: writes the guest image, a read-only file system that holds the agent and nothing that is not needed.
//!
//! The same agent gives the same bytes: times, owners and inode numbers are fixed, entries are sorted. [`vial_rootfs::erofs`] writes
//! the format, [`agent`] looks at the program before it goes in. The VMM maps the image into guests, all of which share its
//! pages; the kernel mounts it as the root and starts `/init`; whatever else the guest needs, the agent mounts.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

mod agent;

use vial_rootfs::erofs::{self, Content, Entry};

/// An agent larger than this is a mistake: it should stay below 6 MB.
const AGENT_LIMIT_BYTES: u64 = 64 * 1024 * 1024;

/// Writes the guest image: an EROFS file system with the agent as /init, byte for byte the same each time.
#[derive(Debug, Parser)]
#[command(name = "vial-mkimage")]
struct Options {
    /// The agent: a static x86-64 program, which becomes /init
    #[arg(long, value_name = "PATH")]
    agent: PathBuf,

    /// The image to write; an existing one is replaced at once, never half
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
}

fn main() -> ExitCode {
    match make_image(&Options::parse()) {
        Ok(bytes) => {
            eprintln!("vial-mkimage: the image has {bytes} bytes");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vial-mkimage: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the image's size in bytes.
fn make_image(options: &Options) -> Result<u64> {
    let program = read_agent(&options.agent)?;
    let image = erofs::image(&entries(program))?;
    replace(&options.output, &image)
        .with_context(|| format!("cannot write the image {}", options.output.display()))?;
    Ok(image.len() as u64)
}

fn read_agent(path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let file = File::open(path)
        .with_context(|| format!("cannot read the agent {shown}; 'make build' builds it"))?;
    if !file.metadata()?.is_file() {
        bail!("the agent {shown} is no regular file; name the vial-agent program");
    }
    let mut program = Vec::new();
    file.take(AGENT_LIMIT_BYTES + 1)
        .read_to_end(&mut program)
        .with_context(|| format!("cannot read the agent {shown}"))?;
    if program.len() as u64 > AGENT_LIMIT_BYTES {
        bail!(
            "the agent {shown} has more than {} MiB; name the stripped release build",
            AGENT_LIMIT_BYTES >> 20
        );
    }
    agent::check(&program).with_context(|| format!("the agent {shown} cannot run as /init"))?;
    Ok(program)
}

/// What the image holds: the agent, and mount points. In `dev` the kernel mounts its devices before it starts the agent.
fn entries(program: Vec<u8>) -> Vec<Entry> {
    let directory = |path: &str, permissions| Entry {
        path: path.to_owned(),
        permissions,
        content: Content::Directory,
    };
    vec![
        directory("dev", 0o755),
        directory("proc", 0o555),
        directory("run", 0o755),
        directory("sys", 0o555),
        directory("tmp", 0o1777),
        Entry { path: "init".to_owned(), permissions: 0o755, content: Content::File(program) },
    ]
}

/// Writes beside the target and renames, so that a reader sees the old image or the new one.
fn replace(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = target.with_file_name(name);
    let written = File::create(&beside)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&beside, target));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn make_image_same_agent_gives_same_bytes_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        fs::write(&agent, agent::tests::static_program()).unwrap();
        let mut images = Vec::new();
        for _ in 0..2 {
            let output = directory.path().join("image");
            let options = Options { agent: agent.clone(), output: output.clone() };
            make_image(&options).unwrap();
            images.push(fs::read(&output).unwrap());
        }
        assert_eq!(images[0], images[1]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn make_image_without_agent_names_the_remedy() {
        let options =
            Options { agent: "/nonexistent/agent".into(), output: "/nonexistent/image".into() };
        let error = format!("{:#}", make_image(&options).unwrap_err());
        assert!(error.contains("/nonexistent/agent") && error.contains("make build"));
    }

    #[test]
    fn make_image_unwritable_output_fails_and_says_where() {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        fs::write(&agent, agent::tests::static_program()).unwrap();
        let options = Options { agent, output: directory.path().join("missing/image") };
        let error = format!("{:#}", make_image(&options).unwrap_err());
        assert!(error.contains("missing/image"));
    }
}

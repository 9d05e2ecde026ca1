//! What wrong input gets: a line that says what is wrong and what to do, and nothing left behind.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vial_tests::node::{self, Configuration};

use super::bed::{Bed, Runtime, run};

pub(crate) fn wrong_configuration_is_named(bed: &Bed) -> Result<()> {
    let configuration = Configuration::keep();
    let text = configuration.text();
    let without = |key: &str| -> String {
        text.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect()
    };
    let path = node::path().display().to_string();
    // Not where it is looked for what VMs leave behind.
    let zeros = tempfile::NamedTempFile::new_in("/var/tmp")?;
    zeros.as_file().set_len(2 << 20)?;
    let zeros = zeros.path().display();
    let theirs = tempfile::tempdir_in("/var/tmp")?;
    chown(theirs.path(), Some(1000), None)?;
    let theirs = theirs.path().display().to_string();
    let cases = [
        (format!("colour = \"blue\"\n{text}"), "colour"),
        (format!("memory_mib = 8\n{}", without("memory_mib")), "memory_mib"),
        (format!("kernel = \"/etc/passwd\"\n{}", without("kernel")), "uncompressed 64-bit ELF"),
        (format!("kernel = \"/no/such/kernel\"\n{}", without("kernel")), "/no/such/kernel"),
        (format!("image = \"{zeros}\"\n{}", without("image")), "no EROFS"),
        (format!("initrd = \"/usr/lib/vial/initrd.img\"\n{}", without("image")), "it is `image`"),
        (format!("state_directory = \"{theirs}/run\"\n{}", without("state_directory")), &theirs),
        ("this is no configuration".to_owned(), &path),
        (text.to_owned(), "belongs to user 1000"),
    ];
    for (config, words) in cases {
        configuration.write(&config)?;
        if words.starts_with("belongs") {
            chown(node::path(), Some(1000), None)?;
        }
        let outcome = bed.run(Runtime::Vial, &[], &["true"])?;
        ensure!(
            outcome.status != 0 && outcome.stderr.contains(words),
            "{words:?} was due in {outcome:?}"
        );
        bed.clear();
        bed.nothing_left()?;
    }
    Ok(())
}

pub(crate) fn wrong_command_lines_are_refused(_: &Bed) -> Result<()> {
    for (program, args, status) in [
        ("vial-vmm", &["--no-such-flag"][..], 2),
        ("vial-vmm", &[], 1),
        ("vial-vmm", &["--api-fd", "0"], 1),
        ("vial-vmm", &["--api-fd", "77"], 1),
        ("vial-vmm", &["probe", "--kvm", "/no/such/device"], 1),
        ("vial-vmm", &["probe", "--kvm", "/dev/null"], 1),
        ("vial", &["--no-such-flag"], 2),
        ("vial", &["no-such-command"], 2),
    ] {
        let program = find(program);
        let outcome = run(Command::new(&program).args(args))?.expect(status)?;
        ensure!(!outcome.stderr.trim().is_empty(), "{program} {args:?} says nothing");
    }
    for program in ["vial-vmm", "vial"] {
        let help = run(Command::new(find(program)).arg("--help"))?.expect(0)?;
        ensure!(help.stdout.contains("Usage"), "{program} --help: {help:?}");
    }
    Ok(())
}

/// `vial-vmm` need not be on the path.
fn find(program: &str) -> String {
    ["/usr/local/bin", "/usr/lib/vial", "/usr/bin"]
        .iter()
        .map(|directory| format!("{directory}/{program}"))
        .find(|path| Path::new(path).exists())
        .unwrap_or_else(|| program.to_owned())
}

pub(crate) fn check_says_that_this_host_is_fit(_: &Bed) -> Result<()> {
    let outcome = run(Command::new(find("vial")).arg("check"))?.expect(0)?;
    ensure!(outcome.stdout.contains("KVM"), "{outcome:?}");
    Ok(())
}

pub(crate) fn check_reads_the_configuration_of_containerd(_: &Bed) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (file, drop_in) =
        (directory.path().join("config.toml"), directory.path().join("vial.toml"));
    fs::write(&file, format!("version = 3\nimports = [\"{}\"]\n", drop_in.display()))?;
    let runtime = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.vial]\n\
                   runtime_type = 'io.containerd.vial.v2'\n";
    let fit = "privileged_without_host_devices = true\npod_annotations = ['io.vial/*']\n";
    for (text, due) in [
        (String::new(), ["missing", "no runtime is of type"]),
        (format!("{runtime}{fit}"), ["ok", "vial (pod sandbox controller)"]),
        (format!("{runtime}{fit}sandboxer = 'shim'\n"), ["CRI handlers", "vial (Sandbox API)"]),
        (runtime.to_owned(), ["broken", "set `pod_annotations = ['io.vial/*']`"]),
        ("plugins = 1\n".to_owned(), ["broken", "containerd"]),
    ] {
        fs::write(&drop_in, format!("version = 3\n{text}"))?;
        let mut check = Command::new(find("vial"));
        // Containers by ctr run without any of it.
        let told = run(check.arg("check").arg("--containerd-config").arg(&file))?.expect(0)?;
        let line = told.stdout.lines().find(|line| line.contains("CRI handlers"));
        let line = line.with_context(|| format!("no line for {text:?}: {told:?}"))?;
        ensure!(due.iter().all(|words| line.contains(words)), "{due:?} was due in {line:?}");
    }
    Ok(())
}

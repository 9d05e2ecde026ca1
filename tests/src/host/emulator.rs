//! The QEMU process: its command line, its shares and sockets in a temporary directory, its start and its end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::devices;
use super::options::Machine;
use super::{process, vmrun};

const QEMU: &str = "qemu-system-x86_64";
/// The host's PID 1, see there.
const INIT: &str = include_str!("../../host/init");
/// Seconds between two signs of life. With counted instructions a busy second takes ten of ours.
const HEARTBEAT_SECONDS: u32 = 5;
const HEARTBEAT_SECONDS_ICOUNT: u32 = 1;

/// What the host's init does once it is up.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Task<'a> {
    /// Run this script with sh.
    Script(&'a str),
    /// Give a shell on our own terminal.
    Shell,
}

/// A running emulated host. Dropping it kills QEMU and removes its directory.
#[derive(Debug)]
pub(crate) struct Emulator {
    /// QEMU.
    pub(crate) child: Child,
    /// Where QEMU connects the control port to.
    pub(crate) control: UnixListener,
    /// Where QEMU connects the command's output to.
    pub(crate) output: UnixListener,
    /// The host's kernel console.
    pub(crate) console: PathBuf,
    directory: TempDir,
}

impl Emulator {
    /// Starts QEMU with the host's disk, the payloads and the task.
    pub(crate) fn start(machine: &Machine, task: Task<'_>) -> Result<Self> {
        let disk = host_directory(machine)?;
        let directory = tempfile::Builder::new()
            .prefix("vial-host.")
            .tempdir()
            .context("cannot make a temporary directory; is TMPDIR writable?")?;
        let share = directory.path().join("control");
        write_control_share(&share, machine, task)?;
        let control = listen(&directory.path().join("control.sock"))?;
        let output = listen(&directory.path().join("output.sock"))?;
        let console = match &machine.console {
            Some(path) => path.clone(),
            None => directory.path().join("console"),
        };
        File::create(&console)
            .with_context(|| format!("cannot write the console to {}", console.display()))?;

        let program = vmrun::emulator(QEMU, directory.path())?;
        let mut command = Command::new(&program);
        command.args(arguments(machine, task, &disk, directory.path(), &console)?);
        let errors = File::create(directory.path().join("qemu.err"))?;
        command.stderr(errors);
        if matches!(task, Task::Script(_)) {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        process::die_with_parent(&mut command);
        let child = command.spawn().with_context(|| {
            let program = program.display();
            format!(
                "cannot start {program}; is the temporary directory mounted noexec? Then set TMPDIR"
            )
        })?;
        Ok(Self { child, control, output, console, directory })
    }

    /// What QEMU wrote to its standard error.
    pub(crate) fn complaints(&self) -> String {
        fs::read_to_string(self.directory.path().join("qemu.err")).unwrap_or_default()
    }

    /// Keeps the console past the end of this run and returns where.
    pub(crate) fn keep_console(&self) -> Option<PathBuf> {
        if !self.console.starts_with(self.directory.path()) {
            return Some(self.console.clone());
        }
        let kept = std::env::temp_dir().join(format!("vial-host.{}.console", std::process::id()));
        fs::copy(&self.console, &kept).ok().map(|_| kept)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Both fail only when QEMU has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The directory with disk.img, vmlinuz and initrd.img.
fn host_directory(machine: &Machine) -> Result<PathBuf> {
    let directory = match (&machine.host, environment("VIAL_HOST")) {
        (Some(directory), _) => directory.clone(),
        (None, Some(directory)) => directory.into(),
        (None, None) => cache_directory()?.join("host-current"),
    };
    for file in ["disk.img", "vmlinuz", "initrd.img"] {
        if !directory.join(file).is_file() {
            bail!(
                "there is no emulated host in {} ({file} is missing); 'make host' builds it",
                directory.display()
            );
        }
    }
    Ok(directory.canonicalize()?)
}

/// An environment variable, unless it is empty.
fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// The cache that the build scripts use; see tests/host/lib.sh.
fn cache_directory() -> Result<PathBuf> {
    if let Some(cache) = environment("VIAL_CACHE") {
        return Ok(cache.into());
    }
    if let Some(cache) = environment("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(cache).join("vial"));
    }
    match environment("HOME") {
        Some(home) => Ok(PathBuf::from(home).join(".cache/vial")),
        None => bail!("neither VIAL_CACHE nor HOME is set; name the host's directory with --host"),
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    UnixListener::bind(path)
        .with_context(|| format!("cannot listen on {}; is TMPDIR very long?", path.display()))
}

/// The share that init reads: itself, its settings, the command.
fn write_control_share(share: &Path, machine: &Machine, task: Task<'_>) -> Result<()> {
    fs::create_dir(share)?;
    let init = share.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let yes_no = |value: bool| if value { "yes" } else { "no" };
    let numbers: Vec<String> = (0..machine.payload.len()).map(|n| n.to_string()).collect();
    let heartbeat = match machine.icount {
        true => HEARTBEAT_SECONDS_ICOUNT,
        false => HEARTBEAT_SECONDS,
    };
    let (rows, columns) = terminal_size();
    let settings = format!(
        "VIAL_CONTAINERD={}\nVIAL_SHELL={}\nVIAL_OUT={}\nVIAL_PAYLOADS='{}'\nVIAL_HEARTBEAT_SECONDS={heartbeat}\n\
         VIAL_ROWS={rows}\nVIAL_COLUMNS={columns}\nVIAL_TERM={}\n",
        yes_no(!machine.no_containerd),
        yes_no(matches!(task, Task::Shell)),
        yes_no(machine.out.is_some()),
        numbers.join(" "),
        shell_quote(&std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned())),
    );
    fs::write(share.join("settings"), settings)?;
    if let Task::Script(script) = task {
        fs::write(share.join("command"), script)?;
    }
    Ok(())
}

/// Rows and columns of our terminal, or those of an old one.
fn terminal_size() -> (u16, u16) {
    let asked = || -> Option<(u16, u16)> {
        if !io::stdin().is_terminal() {
            return None;
        }
        let output = Command::new("stty").arg("size").stdin(Stdio::inherit()).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let (rows, columns) = text.trim().split_once(' ')?;
        Some((rows.parse().ok()?, columns.parse().ok()?))
    };
    asked().filter(|size| size.0 > 0 && size.1 > 0).unwrap_or((24, 80))
}

/// One word for sh, whatever it holds.
pub(crate) fn shell_quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A path inside a comma-separated QEMU option.
pub(crate) fn in_option(path: &Path) -> OsString {
    // A comma ends an option's value unless it is doubled.
    path.to_string_lossy().replace(',', ",,").into()
}

/// One 9p share.
fn share_arguments(tag: &str, path: &Path, read_only: bool) -> [OsString; 2] {
    let mut value = OsString::from(format!(
        "local,mount_tag={tag},id={tag},security_model=none,multidevs=remap,readonly={},path=",
        if read_only { "on" } else { "off" }
    ));
    value.push(in_option(path));
    ["-virtfs".into(), value]
}

/// A character device on a Unix socket that we listen on, and the virtio port in front of it.
fn port_arguments(number: u8, name: &str, socket: &Path) -> [OsString; 4] {
    let mut chardev = OsString::from(format!("socket,id={name},path="));
    chardev.push(in_option(socket));
    [
        "-chardev".into(),
        chardev,
        "-device".into(),
        format!("virtserialport,chardev={name},nr={number},name=vial.{name}").into(),
    ]
}

fn arguments(
    machine: &Machine,
    task: Task<'_>,
    host: &Path,
    directory: &Path,
    console: &Path,
) -> Result<Vec<OsString>> {
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(OsString::from));
    let (board, words) = match machine.devices {
        // Interrupts are remapped, too.
        Some(_) => ("q35,vmport=off,kernel-irqchip=split", devices::APPEND),
        None => ("q35,vmport=off", ""),
    };
    add(&["-name", "vial-host", "-M", board]);
    // mttcg is fast and has two CPUs; counting instructions needs one thread and one CPU.
    if machine.icount {
        add(&["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]);
    } else {
        let threads = if machine.smt { ",threads=2" } else { "" };
        let cpus = format!("{}{threads}", machine.cpus);
        add(&["-accel", "tcg,thread=multi", "-smp", &cpus]);
    }
    let memory_mib = match machine.devices {
        Some(_) => machine.memory.min(devices::MEMORY_MIB_MAX),
        None => machine.memory,
    };
    add(&["-cpu", "max,+svm", "-m", &memory_mib.to_string(), "-nodefaults"]);
    // A panicking kernel reboots at once, and a reboot ends QEMU: a dead host is seen without a wait.
    add(&["-no-user-config", "-display", "none", "-no-reboot"]);
    let append = format!(
        "console=ttyS0 loglevel=4 mitigations=off panic=-1 oops=panic {words} {}",
        machine.append
    );
    add(&["-append", append.trim_end()]);
    add(&["-device", "virtio-blk-pci,drive=root"]);
    add(&["-device", "virtio-serial-pci"]);
    if matches!(task, Task::Shell) {
        add(&[
            "-chardev",
            "stdio,id=terminal,signal=off",
            "-device",
            "virtconsole,chardev=terminal,nr=0",
        ]);
    }

    for (option, file) in [("-kernel", "vmlinuz"), ("-initrd", "initrd.img")] {
        all.push(option.into());
        all.push(host.join(file).into());
    }
    // Writes go to a temporary file that QEMU has unlinked already: the disk is shared by all runs.
    let mut drive =
        OsString::from("if=none,id=root,format=raw,snapshot=on,cache=unsafe,discard=unmap,file=");
    drive.push(in_option(&host.join("disk.img")));
    all.extend(["-drive".into(), drive]);
    let mut serial = OsString::from("file,id=console,path=");
    serial.push(in_option(console));
    all.extend(["-chardev".into(), serial, "-serial".into(), "chardev:console".into()]);
    all.extend(port_arguments(1, "control", &directory.join("control.sock")));
    all.extend(port_arguments(2, "output", &directory.join("output.sock")));
    all.extend(share_arguments("control", &directory.join("control"), true));
    for (number, payload) in machine.payload.iter().enumerate() {
        let path = existing_directory(payload, "--payload")?;
        all.extend(share_arguments(&format!("payload{number}"), &path, true));
    }
    if let Some(out) = &machine.out {
        fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        let path = existing_directory(out, "--out")?;
        all.extend(share_arguments("out", &path, false));
    }
    if let Some(layout) = machine.devices {
        all.extend(devices::arguments(layout, machine.cpus, memory_mib, directory)?);
    }
    all.extend(machine.qemu.iter().map(OsString::from));
    Ok(all)
}

fn existing_directory(path: &Path, option: &str) -> Result<PathBuf> {
    match path.canonicalize() {
        Ok(found) if found.is_dir() => Ok(found),
        _ => bail!("{option} {} is no directory; name an existing one", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_quote_keeps_every_character() {
        let word = "it's \"$HOME\" `x` \\ * \n end";
        let output = Command::new("sh")
            .args(["-c", &format!("printf %s {}", shell_quote(word))])
            .output()
            .expect("sh runs");
        assert_eq!(output.stdout, word.as_bytes());
    }

    #[test]
    fn in_option_doubles_commas() {
        assert_eq!(in_option(Path::new("/a,b/c")), OsString::from("/a,,b/c"));
    }
}

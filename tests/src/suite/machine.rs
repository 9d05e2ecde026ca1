//! The VMM by itself, with a Linux of a few lines instead of the agent: disks, and the ways in which a machine ends.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vial_rootfs::erofs::{self, Content, Entry};
use vial_tests::node::setting;
use vial_tests::vmm::{Files, Vmm};
use vial_vmm_api::{API_VERSION, DeviceConfig, ExitReason, Placement, VmConfig};

use super::bed::{Bed, run};

/// How long a machine may be silent.
const PATIENCE: Duration = Duration::from_secs(120);
const DISK_BYTES: u64 = 64 << 20;
/// What memory a machine has.
const MACHINE_BYTES: u64 = 128 << 20;
/// What the guest finds at the last sector of a disk, where a size that is rounded shows.
const LAST_WORDS: &[u8; 16] = b"the last sector!";

/// A static busybox of this host.
fn busybox() -> Result<Vec<u8>> {
    let places = ["/usr/bin/busybox", "/bin/busybox"];
    let place = places.iter().find(|place| Path::new(place).exists());
    let place = place.context("there is no busybox; install busybox-static")?;
    fs::read(place).with_context(|| format!("read {place}"))
}

/// An image whose first process runs `script` with busybox.
fn image(script: &str) -> Result<Vec<u8>> {
    let entry =
        |path: &str, permissions, content| Entry { path: path.into(), permissions, content };
    let directory = |path| entry(path, 0o755, Content::Directory);
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox mount -t tmpfs tmp /tmp\n/bin/busybox mkdir /tmp/bin\n\
         /bin/busybox --install -s /tmp/bin\nexport PATH=/tmp/bin\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n{script}\n"
    );
    erofs::image(&[
        directory("bin"),
        directory("dev"),
        directory("mnt"),
        directory("proc"),
        directory("sys"),
        directory("tmp"),
        entry("bin/busybox", 0o755, Content::File(busybox()?)),
        entry("init", 0o755, Content::File(init.into_bytes())),
    ])
}

/// What a machine wrote to its console, and how it ended.
struct Ended {
    console: String,
    reason: ExitReason,
    status: i32,
}

/// Runs a machine to its end. A disk is a file and whether the guest can only read it.
fn machine(script: &str, disks: &[(&Path, bool)]) -> Result<Ended> {
    machine_told(script, disks, "")
}

/// As [`machine`], its kernel told some more words.
fn machine_told(script: &str, disks: &[(&Path, bool)], words: &str) -> Result<Ended> {
    let scratch = tempfile::tempdir()?;
    let (mut vmm, console) = started(scratch.path(), script, disks, words)?;
    let (reason, status) = vmm.ended()?;
    let Some(status) = status.code() else {
        bail!("signal {:?} ended the VMM", status.signal());
    };
    let console = String::from_utf8_lossy(&fs::read(&console)?).replace('\r', "");
    Ok(Ended { console, reason, status })
}

/// Starts a machine, with its files in a directory, and tells where its console is.
fn started(
    scratch: &Path,
    script: &str,
    disks: &[(&Path, bool)],
    words: &str,
) -> Result<(Vmm, PathBuf)> {
    let console = scratch.join("console");
    let root = scratch.join("image");
    fs::write(&root, image(script)?)?;
    let mut files = Files::default();
    let both = || OpenOptions::new().read(true).write(true).clone();
    let mut devices = vec![DeviceConfig::Rng];
    for (number, &(path, read_only)) in disks.iter().enumerate() {
        let file = if read_only { File::open(path)? } else { both().open(path)? };
        devices.push(DeviceConfig::Block {
            file: files.add(file),
            read_only,
            serial: format!("disk-{number}"),
        });
    }
    let kernel = setting("kernel", "/usr/lib/vial/vmlinux")?;
    let config = VmConfig {
        version: API_VERSION,
        kvm: files.add(both().open("/dev/kvm")?),
        vcpus: 1,
        memory_mib: (MACHINE_BYTES >> 20) as u32,
        kernel: files.add(File::open(&kernel).with_context(|| format!("open {kernel}"))?),
        image: Some(files.add(File::open(&root)?)),
        command_line: format!(
            "console=ttyS0 quiet panic=-1 {} {words}",
            setting("kernel_arguments", "")?
        ),
        console: Some(files.add(both().create(true).truncate(true).open(&console)?)),
        devices,
        hot_plug: false,
        placement: Placement::default(),
        shared_memory: None,
    };
    let program = setting("vmm", "/usr/lib/vial/vial-vmm")?;
    let mut vmm = Vmm::start(&PathBuf::from(program), PATIENCE)?;
    vmm.boot(config, &files)?;
    Ok((vmm, console))
}

/// A disk of zeros but for its last sector.
fn disk(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    file.set_len(DISK_BYTES)?;
    file.write_all_at(LAST_WORDS, DISK_BYTES - LAST_WORDS.len() as u64)?;
    Ok(())
}

pub(crate) fn disk_keeps_what_the_guest_wrote(_: &Bed) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (raw, formatted) = (scratch.path().join("raw"), scratch.path().join("ext4"));
    disk(&raw)?;
    disk(&formatted)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&formatted))?.expect(0)?;
    let script = r#"
        echo "sectors $(cat /sys/block/vda/size) serial $(cat /sys/block/vda/serial)"
        echo "last $(tail -c 16 /dev/vda)"
        seq 1 200000 > /tmp/text
        dd if=/tmp/text of=/dev/vda bs=3k seek=5 conv=fsync,notrunc 2>/dev/null && echo written
        echo 3 > /proc/sys/vm/drop_caches
        sum=$(dd if=/dev/vda bs=1k skip=15 2>/dev/null | head -c "$(wc -c < /tmp/text)" | md5sum)
        [ "$sum" = "$(md5sum < /tmp/text)" ] && echo same
        mount -t ext4 /dev/vdb /mnt && cp /tmp/text /mnt/counted && mkdir /mnt/dir && umount /mnt && echo unmounted
        dd if=/dev/zero of=/dev/vda bs=1M seek=63 count=2 2>&1 | grep -o 'No space left'
        poweroff -f"#;
    let ended = machine(script, &[(&raw, false), (&formatted, false)])?;
    for words in [
        &format!("sectors {} serial disk-0", DISK_BYTES / 512),
        "last the last sector!",
        "written\nsame\nunmounted\nNo space left",
    ] {
        ensure!(ended.console.contains(words), "{words:?} was due in {:?}", ended.console);
    }
    let counted: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    let mut found = vec![0; counted.len()];
    File::open(&raw)?.read_exact_at(&mut found, 15 << 10)?;
    ensure!(found == counted.as_bytes(), "the file on the host is not what the guest wrote");
    let checked = run(Command::new("e2fsck").args(["-f", "-n"]).arg(&formatted))?;
    checked.expect(0).context("the file system that the guest unmounted")?;
    let copied = scratch.path().join("copied");
    let dump = format!("dump /counted {}", copied.display());
    run(Command::new("debugfs").args(["-R", &dump]).arg(&formatted))?.expect(0)?;
    ensure!(fs::read(copied)? == counted.as_bytes(), "the file in the file system differs");
    Ok(())
}

pub(crate) fn disk_that_is_read_only_stays_as_it_is(_: &Bed) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let raw = scratch.path().join("raw");
    disk(&raw)?;
    let script = r#"
        echo "read only: $(cat /sys/block/vda/ro)"
        echo "last $(tail -c 16 /dev/vda)"
        blockdev --setrw /dev/vda
        dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && echo WRITTEN
        mount -t ext4 -o rw /dev/vda /mnt 2>/dev/null && echo MOUNTED
        poweroff -f"#;
    let ended = machine(script, &[(&raw, true)])?;
    ensure!(
        ended.console.contains("read only: 1") && ended.console.contains("last the last sector!"),
        "{:?}",
        ended.console
    );
    ensure!(
        !ended.console.contains("WRITTEN") && !ended.console.contains("MOUNTED"),
        "{:?}",
        ended.console
    );
    let bytes = fs::read(&raw)?;
    let (data, last) = bytes.split_at(bytes.len() - LAST_WORDS.len());
    ensure!(data.iter().all(|&byte| byte == 0) && last == LAST_WORDS, "the disk has changed");
    Ok(())
}

pub(crate) fn end_of_the_guest_is_told(_: &Bed) -> Result<()> {
    for (script, reason, words) in [
        ("echo 'off now'; poweroff -f", ExitReason::PowerOff, "off now"),
        ("echo 'again now'; reboot -f", ExitReason::Reset, "again now"),
        ("exit 3", ExitReason::Panic, "Attempted to kill init"),
    ] {
        let ended = machine(script, &[])?;
        ensure!(
            ended.reason == reason && ended.status == i32::from(reason.status()),
            "{reason:?} was due and not {:?} with status {}; the console: {:?}",
            ended.reason,
            ended.status,
            ended.console
        );
        ensure!(ended.console.contains(words), "{words:?} was due in {:?}", ended.console);
    }
    Ok(())
}

/// The kernel's own change (`kernel-config/sight.c`) makes no difference but in time, whichever way this processor wants
/// its returns.
pub(crate) fn returns_of_the_guests_kernel_are_all_patched(_: &Bed) -> Result<()> {
    let script = r#"
        echo "returns: $(cat /sys/devices/system/cpu/vulnerabilities/retbleed)"
        echo "left: $(dmesg | grep -c -i -E 'unpatched return thunk|missing return thunk')"
        poweroff -f"#;
    let amd = fs::read_to_string("/proc/cpuinfo")?.contains("AuthenticAMD");
    for (words, told) in [
        ("mitigations=off", ""),
        // Of AMD's processors alone; others choose by themselves.
        ("mitigations=auto retbleed=unret,force", if amd { "untrained return thunk" } else { "" }),
    ] {
        let ended = machine_told(script, &[], words)?;
        let console = &ended.console;
        ensure!(ended.reason == ExitReason::PowerOff, "{words}: {:?}: {console:?}", ended.reason);
        for due in ["returns: ", told, "left: 0"] {
            ensure!(console.contains(due), "{words}: {due:?} was due in {console:?}");
        }
    }
    Ok(())
}

/// The most of a huge page that is brought in where the kernel's file leaves padding out, in KiB: an eighth is worth it.
const MOST_SPARSE_KIB: u64 = 256;

/// What little lies alone in the kernel costs little memory, and the kernel, its text for user processes there, works with
/// and without page tables of their own for those.
pub(crate) fn padding_of_the_guests_kernel_takes_no_memory(_: &Bed) -> Result<()> {
    for words in ["mitigations=off", "mitigations=auto pti=on"] {
        let scratch = tempfile::tempdir()?;
        let (vmm, console) = started(scratch.path(), "echo 'up now'; sleep 1000", &[], words)?;
        let begun = Instant::now();
        while !String::from_utf8_lossy(&fs::read(&console)?).contains("up now") {
            ensure!(begun.elapsed() < PATIENCE, "{words}: the guest says nothing");
            std::thread::sleep(Duration::from_millis(50));
        }
        let path = format!("/proc/{}/smaps", vmm.pid());
        let maps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let kib = small_pages(&maps).with_context(|| format!("{words}: {maps}"))?;
        ensure!((1..=MOST_SPARSE_KIB).contains(&kib), "{words}: {kib} KiB are brought in");
    }
    Ok(())
}

/// How many KiB are brought in of the guest's memory that is to have no huge page: one in the middle of it
/// (Documentation/filesystems/proc.rst, smaps).
fn small_pages(maps: &str) -> Result<u64> {
    #[derive(Default)]
    struct Mapping {
        range: (u64, u64),
        resident_kib: u64,
        small: bool,
    }
    let mut mappings = Vec::<Mapping>::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let mut number = || words.next().context("no size")?.parse().context("a size");
        if let Some((start, end)) = name.split_once('-') {
            let range = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
            mappings.push(Mapping { range, ..Mapping::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            match name {
                "Rss:" => mapping.resident_kib = number()?,
                "VmFlags:" => mapping.small = words.any(|flag| flag == "nh"),
                _ => {}
            }
        }
    }
    let memory = mappings.windows(3).find_map(|mappings| {
        let [before, page, after] = mappings else { return None };
        let together = before.range.1 == page.range.0 && page.range.1 == after.range.0;
        let all = after.range.1.checked_sub(before.range.0)? == MACHINE_BYTES;
        let one = page.range.1 - page.range.0 == 2 << 20;
        let small = [before, page, after].map(|mapping| mapping.small);
        (together && all && one && small == [false, true, false]).then_some(page.resident_kib)
    });
    memory.context("the guest's memory has no part of 2 MiB that is without huge pages")
}

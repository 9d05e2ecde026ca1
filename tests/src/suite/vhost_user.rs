//! Devices that other processes of the host serve: real backends, from the distribution's packages.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vial_tests::node::Configuration;

use super::bed::{Bed, Detached, Runtime, run};
use super::devices::{detached, refused};
use super::faults;
use super::placement::{Reserved, guest_memory};
use crate::cri::pod::eventually;

/// Where backends have their sockets and data. Not where containers leave traces.
const PLACE: &str = "/var/lib/vial-suite-backends";
/// How long a backend may take to begin, and a container to get on.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// A directory for backends, until dropped.
struct Place;

impl Place {
    fn new() -> Result<Self> {
        fs::create_dir_all(PLACE)?;
        Ok(Self)
    }

    fn at(&self, name: &str) -> PathBuf {
        Path::new(PLACE).join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(PLACE);
    }
}

/// A backend's process, until dropped.
struct Backend(Child);

impl Backend {
    fn start(program: &str, arguments: &[String], socket: &Path) -> Result<Self> {
        // One that was killed leaves its socket behind.
        let _ = fs::remove_file(socket);
        let child = Command::new(program)
            .args(arguments)
            // testpmd ends with its input.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("start {program}"))?;
        let mut backend = Self(child);
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = backend.0.try_wait()? {
                bail!("{program} ended with {status}");
            }
            ensure!(start.elapsed() < PATIENCE, "{program} makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(backend)
    }

    /// QEMU's storage daemon, with a file as a disk.
    fn disk(file: &Path, socket: &Path, writable: bool) -> Result<Self> {
        let on = if writable { "on" } else { "off" };
        let arguments = [
            "--blockdev".into(),
            format!("driver=file,node-name=disk,filename={},locking=off", file.display()),
            "--export".into(),
            format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},\
                 num-queues=2,writable={on}",
                socket.display()
            ),
        ];
        Self::start("qemu-storage-daemon", &arguments, socket)
    }

    /// virtiofsd, with a directory. It ends with the connection.
    fn directory(directory: &Path, socket: &Path) -> Result<Self> {
        let arguments = [
            format!("--shared-dir={}", directory.display()),
            format!("--socket-path={}", socket.display()),
            "--sandbox=none".into(),
        ];
        Self::start("/usr/libexec/virtiofsd", &arguments, socket)
    }

    /// DPDK's testpmd, which carries packets between two networks of so many pairs of queues, from each
    /// queue to that of the same number. It polls, and fills a CPU.
    fn switch(sockets: &[PathBuf; 2], pairs: u8) -> Result<Self> {
        for socket in sockets {
            let _ = fs::remove_file(socket);
        }
        let device = |(number, socket): (usize, &PathBuf)| {
            let socket = socket.display();
            ["--vdev".into(), format!("net_vhost{number},iface={socket},queues={pairs}")]
        };
        let fixed = "--lcores 0@0,1@0 --no-huge -m 128 --no-pci --no-shconf --no-telemetry";
        let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
        arguments.extend(sockets.iter().enumerate().flat_map(device));
        arguments.extend(["--", "--total-num-mbufs=2048"].map(str::to_owned));
        arguments.extend(["rxq", "txq"].map(|queues| format!("--{queues}={pairs}")));
        let switch = Self::start("dpdk-testpmd", &arguments, &sockets[0])?;
        let start = Instant::now();
        while !sockets[1].exists() {
            ensure!(start.elapsed() < PATIENCE, "testpmd makes no second socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(switch)
    }

    fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// Waits until it ends by itself.
    fn ends(mut self) -> Result<()> {
        let start = Instant::now();
        while self.0.try_wait()?.is_none() {
            ensure!(start.elapsed() < PATIENCE, "the backend does not end with its pod");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The node's configuration with such a device, until dropped.
fn listed(name: &str, kind: &str, socket: &Path, more: &str) -> Result<Configuration> {
    let configuration = Configuration::keep();
    let socket = socket.display();
    let text = format!(
        "{}\n[[vhost_user]]\nname = \"{name}\"\nkind = \"{kind}\"\nsocket = \"{socket}\"\n{more}\n",
        configuration.text()
    );
    configuration.write(&text)?;
    Ok(configuration)
}

fn sparse(path: &Path, bytes: usize) -> Result<()> {
    Ok(File::create(path)?.set_len(bytes as u64)?)
}

/// Regions of the disk that are written at the same time, and their size.
const REGIONS: usize = 8;
const REGION_BYTES: usize = MIB;
/// How often all of them are written.
const ROUNDS: usize = 4;

fn line(region: usize, round: usize) -> String {
    format!("region {region} in round {round}\n")
}

/// What the disk has to hold when the writers are done.
fn written() -> Vec<u8> {
    (0..REGIONS)
        .flat_map(|region| line(region, ROUNDS).into_bytes().into_iter().cycle().take(REGION_BYTES))
        .collect()
}

/// Writes all regions at once, in rounds, and says what it reads of them in the end.
fn writers() -> String {
    format!(
        "set -e; for round in $(seq {ROUNDS}); do \
           writers=; for region in $(seq 0 {last}); do \
             yes \"region $region in round $round\" | head -c {REGION_BYTES} | \
               dd of=/dev/fast bs=64k seek=$((region * {blocks})) conv=notrunc,fsync 2>/dev/null & \
             writers=\"$writers $!\"; \
           done; \
           for writer in $writers; do wait $writer; done; \
         done; \
         dd if=/dev/fast bs=1M count={REGIONS} 2>/dev/null | sha256sum",
        last = REGIONS - 1,
        blocks = REGION_BYTES / (64 << 10),
    )
}

/// Waits until the disk's file shows that a round has begun, and some of it is not there yet.
fn reaches_round(file: &File, round: usize) -> Result<()> {
    let start = Instant::now();
    loop {
        for region in 0..REGIONS {
            let wanted = line(region, round);
            let mut found = vec![0; wanted.len()];
            file.read_exact_at(&mut found, (region * REGION_BYTES) as u64)?;
            if found == wanted.as_bytes() {
                return Ok(());
            }
        }
        ensure!(start.elapsed() < PATIENCE, "the writers do not get to round {round}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn sha256(bytes: &Path) -> Result<String> {
    let line = format!("head -c {} {} | sha256sum", REGIONS * REGION_BYTES, bytes.display());
    Ok(run(Command::new("sh").args(["-c", &line]))?.expect(0)?.stdout)
}

/// Lets a container write the whole disk while its backend is killed and started again once in each of those rounds, and
/// compares what the guest reads and what the disk has.
fn is_written_while_killed(
    container: &Detached,
    backend: &mut Backend,
    (file, socket): (&Path, &Path),
    mut rounds: Range<usize>,
) -> Result<()> {
    let disk = File::open(file)?;
    let script = writers();
    let outcome = std::thread::scope(|scope| {
        let writing = scope.spawn(|| container.exec(&[], &["sh", "-c", &script]));
        let killed = rounds.try_for_each(|round| -> Result<()> {
            reaches_round(&disk, round)?;
            let killed = std::mem::replace(backend, Backend(Command::new("true").spawn()?));
            killed.kill()?;
            *backend = Backend::disk(file, socket, true)?;
            Ok(())
        });
        let outcome = writing.join().map_err(|_| anyhow::anyhow!("the writers' thread ended"));
        killed.and_then(|()| outcome?)
    })?
    .expect(0)?;
    ensure!(fs::read(file)?[..REGIONS * REGION_BYTES] == written(), "the disk has other data");
    ensure!(outcome.stdout == sha256(file)?, "the guest reads other data: {outcome:?}");
    Ok(())
}

pub(crate) fn vhost_disk_holds_every_byte_though_its_backend_is_killed(bed: &Bed) -> Result<()> {
    let place = Place::new()?;
    let (file, socket) = (place.at("disk.img"), place.at("disk.sock"));
    sparse(&file, 32 * MIB)?;
    let mut backend = Backend::disk(&file, &socket, true)?;
    let _configuration = listed("disk1", "blk", &socket, "path = \"/dev/fast\"\nqueues = 2")?;
    let container = detached(bed, &["--annotation", "io.vial/vhost-user=disk1"])?;
    is_written_while_killed(&container, &mut backend, (&file, &socket), 1..ROUNDS)?;
    let node = container.exec(&[], &["sh", "-c", "test -b /dev/fast && cat /proc/partitions"])?;
    ensure!(node.expect(0)?.stdout.contains("32768"), "the disk has another size");
    drop(container);
    // What another VM reads has not been in this one's memory.
    let read = format!("dd if=/dev/fast bs=1M count={REGIONS} 2>/dev/null | sha256sum");
    let options = ["--annotation", "io.vial/vhost-user=disk1"];
    let outcome = bed.run(Runtime::Vial, &options, &["sh", "-c", &read])?.expect(0)?;
    ensure!(outcome.stdout == sha256(&file)?, "another VM reads other data: {outcome:?}");
    Ok(())
}

/// The memory of such a VM is a file of huge pages, which the backend has mapped as well, each anew.
pub(crate) fn vhost_disk_of_a_vm_in_huge_pages_holds_every_byte(bed: &Bed) -> Result<()> {
    let reserved = Reserved::new("node0", 80)?;
    let place = Place::new()?;
    let (file, socket) = (place.at("disk.img"), place.at("disk.sock"));
    sparse(&file, 32 * MIB)?;
    let mut backend = Backend::disk(&file, &socket, true)?;
    let _configuration = listed("disk1", "blk", &socket, "path = \"/dev/fast\"\nqueues = 2")?;
    let annotations =
        ["--annotation", "io.vial/vhost-user=disk1", "--annotation", "io.vial/hugepages=2Mi"];
    let container = detached(bed, &annotations)?;
    let huge = |process: i32| -> Result<u64> {
        let found = guest_memory(process)?;
        let pages = found.iter().filter(|mapping| mapping.huge).flat_map(|one| one.pages.values());
        Ok(pages.sum())
    };
    let vmm = huge(faults::process("vial-vmm", "")?)?;
    ensure!(vmm == 64, "the VM has {vmm} huge pages");
    ensure!(reserved.count("free_hugepages")? == 16, "others are free");
    is_written_while_killed(&container, &mut backend, (&file, &socket), 2..3)?;
    let mapped = huge(i32::try_from(backend.0.id())?)?;
    ensure!(mapped > 0, "the backend has mapped no huge pages");
    drop(container);
    bed.nothing_left()?;
    // The backend holds the file, too, until it lets go of the connection that has ended.
    eventually(|| {
        ensure!(reserved.count("free_hugepages")? == 80, "they are not given back");
        Ok(())
    })
}

pub(crate) fn vhost_device_that_cannot_be_had_is_refused(bed: &Bed) -> Result<()> {
    let place = Place::new()?;
    let (file, socket) = (place.at("disk.img"), place.at("disk.sock"));
    sparse(&file, MIB)?;
    let options = ["--annotation", "io.vial/vhost-user=disk1"];
    let path = "path = \"/dev/fast\"";
    let asked = |words: &[&str]| refused(bed, &options, words);
    asked(&["disk1", "[[vhost_user]]"])?;
    let configuration = listed("disk1", "blk", &socket, path)?;
    asked(&["has no socket", "start its backend"])?;
    fs::write(&socket, "")?;
    asked(&["which is no socket"])?;
    fs::remove_file(&socket)?;
    drop(std::os::unix::net::UnixListener::bind(&socket)?);
    asked(&["nobody serves", "disk1"])?;
    // Somebody who takes connections, and says nothing.
    fs::remove_file(&socket)?;
    let silent = std::os::unix::net::UnixListener::bind(&socket)?;
    asked(&["does not answer", "serve another VM"])?;
    drop(silent);
    // A backend that has a client already.
    let backend = Backend::disk(&file, &socket, true)?;
    let client = UnixStream::connect(&socket)?;
    asked(&["does not answer", "serve another VM"])?;
    drop(client);
    bed.run(Runtime::Vial, &options, &["test", "-b", "/dev/fast"])?.expect(0)?;
    drop(configuration);
    let configuration = listed("disk1", "blk", &socket, "path = \"/dev/fast\"\nread_only = true")?;
    asked(&["to be read-only", "export the disk read-only"])?;
    drop(backend);
    let _backend = Backend::disk(&file, &socket, false)?;
    let write = "! dd if=/dev/zero of=/dev/fast count=1 conv=fsync 2>/dev/null && \
                 cat /sys/class/block/vda/ro";
    let outcome = bed.run(Runtime::Vial, &options, &["sh", "-c", write])?.expect(0)?;
    ensure!(outcome.stdout.trim() == "1", "the disk is no read-only one: {outcome:?}");
    drop(configuration);
    let _configuration = listed("disk1", "blk", &socket, "path = \"dev/fast\"")?;
    asked(&["vhost_user", "absolute `path`"])
}

pub(crate) fn vhost_file_system_is_the_hosts_directory(bed: &Bed) -> Result<()> {
    let place = Place::new()?;
    let (directory, socket) = (place.at("shared"), place.at("fs.sock"));
    fs::create_dir_all(&directory)?;
    let text = "from the host\n".repeat(100_000);
    fs::write(directory.join("host"), &text)?;
    let backend = Backend::directory(&directory, &socket)?;
    let _configuration = listed("files", "fs", &socket, "path = \"/shared\"")?;
    let script = "set -e; cat /shared/host | sha256sum; mkdir /shared/made; \
                  yes from the guest | head -c 3000000 > /shared/made/guest; \
                  grep ' /shared ' /proc/mounts";
    let options = ["--annotation", "io.vial/vhost-user=files"];
    let outcome = bed.run(Runtime::Vial, &options, &["sh", "-c", script])?.expect(0)?;
    let host = format!("sha256sum < {}", directory.join("host").display());
    let host = run(Command::new("sh").args(["-c", &host]))?.expect(0)?.stdout;
    ensure!(outcome.stdout.starts_with(&host), "the guest reads other data: {outcome:?}");
    ensure!(outcome.stdout.contains("virtiofs"), "it is no file system of its own: {outcome:?}");
    let made = fs::read(directory.join("made/guest"))?;
    let wanted: Vec<u8> = b"from the guest\n".iter().copied().cycle().take(3_000_000).collect();
    ensure!(made == wanted, "the host has other data: {} bytes", made.len());
    backend.ends()
}

/// Addresses of the two pods in their own network.
const FIRST: &str = "10.77.0.10";
const SECOND: &str = "10.77.0.11";

pub(crate) fn vhost_networks_of_two_pods_are_joined_by_a_switch_that_restarts(
    bed: &Bed,
) -> Result<()> {
    let place = Place::new()?;
    let sockets = [place.at("net0.sock"), place.at("net1.sock")];
    let mut switch = Backend::switch(&sockets, 1)?;
    let net = |name: &str, last: u8, address: &str| {
        let more = format!("mac = \"02:00:00:00:00:{last:02x}\"\naddresses = [\"{address}/24\"]");
        listed(name, "net", &sockets[usize::from(last)], &more)
    };
    let _first = net("fast0", 0, FIRST)?;
    let _both = net("fast1", 1, SECOND)?;
    let pod = |name: &str| {
        let annotation = format!("io.vial/vhost-user={name}");
        detached(bed, &["--annotation", &annotation, "--net-host"])
    };
    let (server, client) = (pod("fast0")?, pod("fast1")?);
    let data = "yes 'packets of a switch' | head -c 1000000";
    // What comes before the other side listens is tried again.
    let script = format!(
        "wanted=$({data} | sha256sum); for try in $(seq 60); do \
           [ \"$({data} | nc {FIRST} 7777 | sha256sum)\" = \"$wanted\" ] && echo whole && exit; \
           sleep 1; done; exit 1"
    );
    for round in 0..2 {
        std::thread::scope(|scope| -> Result<()> {
            let serving =
                scope.spawn(|| server.exec(&[], &["nc", "-l", "-p", "7777", "-e", "cat"]));
            let sent = client.exec(&[], &["sh", "-c", &script])?.expect(0);
            let served =
                serving.join().map_err(|_| anyhow::anyhow!("the server's thread ended"))?;
            served?.expect(0).and(sent)?;
            Ok(())
        })
        .with_context(|| format!("round {round}"))?;
        if round == 0 {
            let killed = std::mem::replace(&mut switch, Backend(Command::new("true").spawn()?));
            killed.kill()?;
            switch = Backend::switch(&sockets, 1)?;
        }
    }
    Ok(())
}

/// What a queue of the guest's networks has interrupted it for, by the kernel's names.
const INTERRUPTS: &str = "awk '/input/ { n = 0; for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) n += $i; \
     print $NF, n }' /proc/interrupts";

pub(crate) fn vhost_network_of_several_cpus_has_its_packets_in_several_queues(
    bed: &Bed,
) -> Result<()> {
    let place = Place::new()?;
    let sockets = [place.at("net0.sock"), place.at("net1.sock")];
    let mut switch = Backend::switch(&sockets, 2)?;
    // The one has as many as its vCPUs, of those that it could have; the other has what it asks for.
    let net = |name: &str, last: u8, address: &str, queues: u8| {
        let more = format!(
            "mac = \"02:00:00:00:00:{last:02x}\"\naddresses = [\"{address}/24\"]\nqueues = {queues}"
        );
        listed(name, "net", &sockets[usize::from(last)], &more)
    };
    let _first = net("fast0", 0, FIRST, 8)?;
    let _both = net("fast1", 1, SECOND, 2)?;
    let pod = |name: &str| {
        let annotation = format!("io.vial/vhost-user={name}");
        detached(bed, &["--annotation", &annotation, "--net-host", "--cpus", "2"])
    };
    let (server, client) = (pod("fast0")?, pod("fast1")?);
    for (container, name) in [(&server, "fast0"), (&client, "fast1")] {
        let count = format!("ls -d /sys/class/net/{name}/queues/rx-* | wc -l");
        let count = container.exec(&[], &["sh", "-c", &count])?.expect(0)?.stdout;
        ensure!(count.trim() == "2", "{name} uses {} pairs of queues", count.trim());
    }
    let ports = (7770..7776).collect::<Vec<_>>();
    let data = "yes \"packets of flow $1\" | head -c 300000";
    // What comes before the other side listens is tried again.
    let script = format!(
        "flow() {{ wanted=$({data} | sha256sum); for try in $(seq 60); do \
           [ \"$({data} | taskset -c $(($1 % 2)) nc {FIRST} $1 | sha256sum)\" = \"$wanted\" ] && \
           return; sleep 1; done; return 1; }}; flows=; \
         for port in $(seq {first} {last}); do flow $port & flows=\"$flows $!\"; done; \
         for flow in $flows; do wait $flow || exit 1; done; {INTERRUPTS}",
        first = ports[0],
        last = ports[ports.len() - 1],
    );
    let serving = format!(
        "for port in $(seq {} {}); do taskset -c $((port % 2)) nc -l -p $port -e cat & done; wait; \
         {INTERRUPTS}",
        ports[0],
        ports[ports.len() - 1],
    );
    for round in 0..2 {
        let told = std::thread::scope(|scope| -> Result<[String; 2]> {
            let serving = scope.spawn(|| server.exec(&[], &["sh", "-c", &serving]));
            let sent = client.exec(&[], &["sh", "-c", &script])?.expect(0);
            let served =
                serving.join().map_err(|_| anyhow::anyhow!("the server's thread ended"))?;
            Ok([served?.expect(0)?.stdout, sent?.stdout])
        })
        .with_context(|| format!("round {round}"))?;
        for told in &told {
            for queue in ["input.0", "input.1"] {
                let busy = told.lines().filter_map(|line| line.split_once(' ')).any(|(name, n)| {
                    name.ends_with(queue) && n.parse::<u64>().is_ok_and(|count| count > 3)
                });
                ensure!(busy, "nothing has come by {queue}: {told}");
            }
        }
        if round == 0 {
            let killed = std::mem::replace(&mut switch, Backend(Command::new("true").spawn()?));
            killed.kill()?;
            switch = Backend::switch(&sockets, 2)?;
        }
    }
    Ok(())
}

//! PCI functions of the host in containers. The host has to have what `vial-host run --devices` gives it: a card with
//! SR-IOV, an NVMe disk, an IOMMU.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vial_tests::node::Configuration;

use super::bed::{Bed, Detached, Runtime, run};
use super::{faults, ways};

/// Where functions are.
pub(super) const FUNCTIONS: &str = "/sys/bus/pci/devices";
/// The card's physical function, and its virtual ones, as vendor and device.
const PHYSICAL: &str = "0x8086 0x10c9";
const VIRTUAL: &str = "0x8086 0x10ca";
/// Classes: Ethernet, NVMe, a bridge to ISA.
pub(super) const CLASS_NVME: &str = "0x010802";
const CLASS_ISA: &str = "0x060100";
/// The host's address on the card, and a guest's.
pub(super) const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2";
pub(super) const PORT: u16 = 7099;
/// How long a driver may take to have bound a function.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn text(function: &str, name: &str) -> Result<String> {
    let path = Path::new(FUNCTIONS).join(function).join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

fn link(function: &str, name: &str) -> Option<String> {
    let target = fs::read_link(Path::new(FUNCTIONS).join(function).join(name)).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

pub(super) fn driver(function: &str) -> Option<String> {
    link(function, "driver")
}

fn group(function: &str) -> Result<String> {
    link(function, "iommu_group").with_context(|| format!("{function} has no IOMMU group"))
}

fn write(path: impl AsRef<Path>, words: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, words).with_context(|| format!("write {words:?} to {}", path.display()))
}

/// The functions for which `is` holds, in order.
fn functions(is: impl Fn(&str) -> Result<bool>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(FUNCTIONS)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if is(&name)? {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

fn with_ids(ids: &str) -> Result<Vec<String>> {
    functions(|name| Ok(format!("{} {}", text(name, "vendor")?, text(name, "device")?) == ids))
}

pub(super) fn with_class(class: &str) -> Result<String> {
    let found = functions(|name| Ok(text(name, "class")? == class))?;
    found.into_iter().next().with_context(|| format!("there is no function of class {class}"))
}

pub(super) fn virtual_function(number: usize) -> Result<String> {
    with_ids(VIRTUAL)?.into_iter().nth(number).context("the card has too few virtual functions")
}

/// The card's physical function.
pub(super) fn physical() -> Result<String> {
    with_ids(PHYSICAL)?.into_iter().next().context("there is no SR-IOV card")
}

/// The name of a function's interface in the host's own namespace.
pub(super) fn interface(function: &str) -> Result<String> {
    let interfaces = fs::read_dir(Path::new(FUNCTIONS).join(function).join("net"));
    let interface = interfaces.into_iter().flatten().flatten().next();
    let interface = interface.with_context(|| format!("{function} has no interface here"))?;
    Ok(interface.file_name().to_string_lossy().into_owned())
}

pub(super) fn reaches_driver(function: &str, wanted: Option<&str>) -> Result<()> {
    let start = Instant::now();
    while driver(function).as_deref() != wanted {
        ensure!(
            start.elapsed() < PATIENCE,
            "{function} has the driver {:?} and not {wanted:?}",
            driver(function)
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Loads the drivers, makes two virtual functions and gives the card an address. Once.
pub(crate) fn begin() -> Result<()> {
    run(Command::new("modprobe").args(["-a", "igb", "igbvf", "nvme", "vfio-pci"]))?.expect(0)?;
    let card = physical()?;
    reaches_driver(&card, Some("igb"))?;
    write(Path::new(FUNCTIONS).join(&card).join("sriov_numvfs"), "2")?;
    for number in 0..2 {
        reaches_driver(&virtual_function(number)?, Some("igbvf"))?;
    }
    let name = interface(&card)?;
    for line in [format!("address add {HOST}/24 dev {name}"), format!("link set {name} up")] {
        run(Command::new("ip").args(line.split(' ')))?.expect(0)?;
    }
    Ok(())
}

/// A function with vfio-pci in place of its driver, as a device plugin would have bound it, until dropped.
pub(super) struct Bound {
    pub(super) function: String,
    driver: Option<String>,
}

impl Bound {
    pub(super) fn new(function: String) -> Result<Self> {
        let bound = Self { driver: driver(&function), function };
        bound.give_to(Some("vfio-pci"))?;
        reaches_driver(&bound.function, Some("vfio-pci"))?;
        Ok(bound)
    }

    fn give_to(&self, wanted: Option<&str>) -> Result<()> {
        let at = Path::new(FUNCTIONS).join(&self.function);
        write(at.join("driver_override"), wanted.unwrap_or("\n"))?;
        if driver(&self.function).is_some() {
            write(at.join("driver/unbind"), &self.function)?;
        }
        match wanted.or(self.driver.as_deref()) {
            Some(_) => write("/sys/bus/pci/drivers_probe", &self.function),
            None => Ok(()),
        }
    }

    /// What a device plugin names: its group, or itself where the kernel makes no devices of groups.
    pub(super) fn node(&self) -> Result<String> {
        let nodes = self.nodes().into_iter().next();
        nodes.with_context(|| format!("{} has no device of VFIO's", self.function))
    }

    /// All that device plugins can name it by.
    pub(super) fn nodes(&self) -> Vec<String> {
        [ways::group_node(&self.function), ways::own_node(&self.function)]
            .into_iter()
            .flatten()
            .collect()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = self.give_to(None) {
            println!("    | {error:#}");
        }
    }
}

/// A server for one connection. Its port is free again when this is dropped, whether somebody came or not.
pub(super) struct Echo(JoinHandle<std::io::Result<()>>);

/// Sends back what comes, once all of it has.
pub(super) fn echo() -> Result<Echo> {
    let listener = TcpListener::bind((HOST, PORT))?;
    Ok(Echo(std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        drop(listener);
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        stream.write_all(&bytes)
    })))
}

impl Echo {
    /// Whether it has sent all back.
    pub(super) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        if !self.is_finished() {
            // It may still wait for somebody.
            let _ = TcpStream::connect((HOST, PORT));
        }
    }
}

/// What a container does with a virtual function: tells its driver, and exchanges data with the host through it.
pub(super) fn script() -> String {
    format!(
        "for at in /sys/bus/pci/devices/*; do \
           [ $(cat $at/vendor) = 0x8086 ] && [ $(cat $at/device) = 0x10ca ] && function=$at; done; \
         echo driver $(basename $(readlink $function/driver)); \
         link=$(ls $function/net); \
         ip address add {GUEST}/24 dev $link && ip link set $link up; \
         until [ $(cat /sys/class/net/$link/carrier) = 1 ]; do sleep 0.1; done; \
         data() {{ yes 'packets of a function' | head -c 3000000; }}; \
         data | sha256sum; data | nc {HOST} {PORT} | sha256sum; \
         grep $link /proc/interrupts"
    )
}

/// Whether what it printed says that all of that worked.
pub(super) fn checks_out(stdout: &str) -> Result<()> {
    ensure!(stdout.contains("driver igbvf"), "no driver: {stdout}");
    let sums: Vec<&str> = stdout.lines().filter(|line| line.ends_with("  -")).collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "the data has changed: {stdout}");
    // A number for the CPU, after the line's own number.
    let count =
        |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    let interrupts: u64 =
        stdout.lines().filter(|line| line.contains("MSI")).filter_map(count).sum();
    ensure!(interrupts > 100, "{interrupts} interrupts: {stdout}");
    Ok(())
}

/// Options of `ctr run` for a container in the guest's own network that may change it.
const NETWORK: [&str; 3] = ["--net-host", "--cap-add", "CAP_NET_ADMIN"];

pub(crate) fn virtual_function_of_a_device_plugin_works(bed: &Bed) -> Result<()> {
    let bound = Bound::new(virtual_function(0)?)?;
    let (nodes, beside) = (bound.nodes(), ways::beside());
    let named = format!("PCIDEVICE_SUITE={}", bound.function);
    let script = format!("{}; cat /sys/bus/pci/devices/$PCIDEVICE_SUITE/device", script());
    for round in 0..2 {
        let server = echo()?;
        let node = nodes.get(round % nodes.len().max(1)).context("it has no device of VFIO's")?;
        let mut options = [&["--device", node, "--env", &named], &NETWORK[..]].concat();
        beside.iter().for_each(|path| options.extend(["--device", path]));
        let outcome = bed.run(Runtime::Vial, &options, &["sh", "-c", &script])?.expect(0)?;
        let address = outcome.stdout.lines().last();
        ensure!(address == Some("0x10ca"), "the environment names {address:?}: {outcome:?}");
        ensure!(server.is_finished(), "the host was not reached in round {round}: {outcome:?}");
        checks_out(&outcome.stdout).with_context(|| format!("round {round}"))?;
    }
    // It was not bound by Vial, and so it is not given back.
    ensure!(driver(&bound.function).as_deref() == Some("vfio-pci"), "it was unbound");
    Ok(())
}

/// The node's configuration with functions that pods may name, until dropped.
pub(super) fn listed(functions: &[&str]) -> Result<Configuration> {
    let configuration = Configuration::keep();
    let text = format!("{}\npci_devices = {functions:?}\n", configuration.text());
    configuration.write(&text)?;
    Ok(configuration)
}

pub(super) fn annotation(functions: &[&str]) -> String {
    format!("io.vial/pci-devices={}", functions.join(","))
}

pub(crate) fn virtual_function_that_a_pod_names_works_and_is_given_back(bed: &Bed) -> Result<()> {
    let function = virtual_function(1)?;
    let _configuration = listed(&[&function])?;
    let server = echo()?;
    let annotation = annotation(&[&function]);
    let options = [&["--annotation", annotation.as_str()], &NETWORK[..]].concat();
    let outcome = bed.run(Runtime::Vial, &options, &["sh", "-c", &script()])?.expect(0)?;
    ensure!(server.is_finished(), "the host was not reached: {outcome:?}");
    checks_out(&outcome.stdout)?;
    reaches_driver(&function, Some("igbvf"))
}

pub(super) fn detached(bed: &Bed, options: &[&str]) -> Result<Detached> {
    let name = bed.name();
    let options = [&["-d", "--null-io"], options].concat();
    run(&mut bed.command(Runtime::Vial, &options, &name, &["sleep", "1000"]))?.expect(0)?;
    let container = Detached { name };
    container.reaches("RUNNING")?;
    Ok(container)
}

pub(crate) fn function_is_given_back_when_vmm_or_shim_is_killed(bed: &Bed) -> Result<()> {
    let function = virtual_function(1)?;
    let _configuration = listed(&[&function])?;
    for (process, word) in [("vial-vmm", ""), ("containerd-shim", "vial")] {
        let container = detached(bed, &["--annotation", &annotation(&[&function])])?;
        reaches_driver(&function, Some("vfio-pci"))?;
        ways::is_by_the_hosts_way(&function)?;
        faults::kill(faults::process(process, word)?)?;
        if process == "vial-vmm" {
            container.reaches("STOPPED")?;
        }
        drop(container);
        bed.clear();
        reaches_driver(&function, Some("igbvf")).with_context(|| process)?;
        let word = text(&function, "driver_override")?;
        ensure!(word == "(null)", "its driver is still overridden by {word}");
        bed.nothing_left().with_context(|| process)?;
    }
    Ok(())
}

/// Runs a container that has to be refused with these words.
pub(super) fn refused(bed: &Bed, options: &[&str], words: &[&str]) -> Result<()> {
    let outcome = bed.run(Runtime::Vial, options, &["true"])?;
    let told = words.iter().all(|word| outcome.stderr.contains(word));
    ensure!(outcome.status != 0 && told, "{words:?} were due: {outcome:?}");
    bed.clear();
    bed.nothing_left().with_context(|| format!("{options:?}"))
}

pub(crate) fn function_that_cannot_be_given_is_refused_and_left_alone(bed: &Bed) -> Result<()> {
    let (first, second) = (virtual_function(0)?, virtual_function(1)?);
    // Of several functions in one group.
    let bridge = with_class(CLASS_ISA)?;
    let before = (driver(&second), driver(&bridge));
    let configuration = listed(&[&first, &bridge, "0000:7f:1f.7"])?;
    let by_name = |function: &str| annotation(&[function]);
    refused(bed, &["--annotation", &by_name(&second)], &[&second, "pci_devices"])?;
    refused(
        bed,
        &["--annotation", &by_name("0000:7f:1f.7")],
        &["0000:7f:1f.7", "no PCI function"],
    )?;
    refused(bed, &["--annotation", &by_name("/etc/passwd")], &["lspci"])?;
    refused(
        bed,
        &["--annotation", &by_name(&bridge)],
        &["IOMMU group", "which the pod does not get"],
    )?;
    refused(
        bed,
        &["--annotation", "io.vial/devices=x"],
        &["io.vial/devices", "io.vial/pci-devices"],
    )?;
    ensure!(before == (driver(&second), driver(&bridge)), "drivers have changed");

    // One that another pod has.
    let container = detached(bed, &["--annotation", &by_name(&first)])?;
    let outcome = bed.run(Runtime::Vial, &["--annotation", &by_name(&first)], &["true"])?;
    ensure!(outcome.status != 0 && outcome.stderr.contains("in use by another"), "{outcome:?}");
    container.exec(&[], &["true"])?.expect(0).context("the pod that has it")?;
    drop(container);
    bed.clear();
    reaches_driver(&first, Some("igbvf"))?;
    drop(configuration);
    Ok(())
}

pub(crate) fn function_that_cannot_be_reset_is_refused_and_left_alone(bed: &Bed) -> Result<()> {
    let found = functions(|name| {
        let at = Path::new(FUNCTIONS).join(name);
        let alone = fs::read_dir(at.join("iommu_group/devices")).map_or(0, Iterator::count) == 1;
        // What no driver of the host's has, nobody misses if it is taken after all.
        Ok(alone && !at.join("reset").exists() && driver(name).is_none())
    })?;
    let function = found.first().context("all functions can be reset")?;
    let _configuration = listed(&[function])?;
    let words = [function.as_str(), "cannot be reset", "virtual functions"];
    refused(bed, &["--annotation", &annotation(&[function])], &words)?;
    ensure!(driver(function).is_none(), "{function} has a driver now");
    Ok(())
}

/// On a host without an IOMMU.
pub(crate) fn function_behind_no_iommu_is_refused_and_left_alone(bed: &Bed) -> Result<()> {
    let found = functions(|name| Ok(group(name).is_err() && driver(name).is_none()))?;
    let function = found.first().context("all functions are behind an IOMMU, or in use")?;
    let _configuration = listed(&[function])?;
    let words = [function.as_str(), "behind no IOMMU", "amd_iommu=on"];
    refused(bed, &["--annotation", &annotation(&[function])], &words)?;
    ensure!(driver(function).is_none(), "{function} has a driver now");
    Ok(())
}

pub(crate) fn group_with_a_function_of_another_driver_is_refused(bed: &Bed) -> Result<()> {
    let members = {
        let group = group(&with_class(CLASS_ISA)?)?;
        let at = format!("/sys/kernel/iommu_groups/{group}/devices");
        let names = fs::read_dir(at)?.flatten().map(|entry| entry.file_name());
        let mut names: Vec<String> =
            names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    ensure!(members.len() > 1, "{members:?} is a group of one");
    let bound = Bound::new(members[members.len() - 1].clone())?;
    if let Some(node) = ways::group_node(&bound.function) {
        refused(bed, &["--device", &node], &[&members[0], "not bound to vfio-pci"])?;
    }
    match ways::own_node(&bound.function) {
        Some(node) => {
            refused(bed, &["--device", &node], &[&members[0], "which the pod does not get"])
        }
        None => Ok(()),
    }
}

/// Has `disk` be the name of what the guest has of an NVMe function's first namespace. The kernel looks at all of
/// them at once and numbers them as they answer.
pub(super) const FIRST: &str =
    "for at in /sys/block/nvme*; do [ \"$(cat $at/nsid)\" = 1 ] && disk=${at##*/}; done;";

/// The disk of the NVMe function's first namespace, once its driver has made it.
pub(super) fn disk(function: &str) -> Result<PathBuf> {
    let start = Instant::now();
    let at = Path::new(FUNCTIONS).join(function).join("nvme");
    while start.elapsed() < PATIENCE {
        // The controller's first namespace; where several paths can lead to it, it is not below the controller.
        let controller = fs::read_dir(&at).into_iter().flatten().flatten().next();
        if let Some(controller) = controller {
            let of = format!("{}n", controller.file_name().to_string_lossy());
            for entry in fs::read_dir("/sys/block")?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let number = fs::read_to_string(entry.path().join("nsid")).unwrap_or_default();
                let node = Path::new("/dev").join(&name);
                if name.starts_with(&of) && number.trim() == "1" && node.exists() {
                    return Ok(node);
                }
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("{function} has no disk after {PATIENCE:?}");
}

/// A partition of the host's own disk is a container's, past the host's cache, and what is beside it stays.
pub(crate) fn partition_of_the_hosts_nvme_disk_is_a_block_volume(bed: &Bed) -> Result<()> {
    let function = with_class(CLASS_NVME)?;
    reaches_driver(&function, Some("nvme"))?;
    let disk = disk(&function)?;
    // A table with one entry (type 0x83): 4096 sectors from the 2048th on.
    let mut table = [0u8; 512];
    table[450] = 0x83;
    table[454..458].copy_from_slice(&2048u32.to_le_bytes());
    table[458..462].copy_from_slice(&4096u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let whole = File::options().read(true).write(true).open(&disk)?;
    whole.write_all_at(&[0x5a; 4 << 20], 0)?;
    whole.write_all_at(&table, 0)?;
    whole.sync_all()?;
    drop(whole);
    run(Command::new("blockdev").arg("--rereadpt").arg(&disk))?.expect(0)?;
    let part = format!("{}p1", disk.display());
    let start = Instant::now();
    while !Path::new(&part).exists() {
        ensure!(start.elapsed() < PATIENCE, "{part} is not there after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let script = format!(
        "wc -c <{part}; head -c 2097152 /dev/urandom >/tmp/data; \
         dd if=/tmp/data of={part} bs=64k conv=fsync 2>/dev/null; sha256sum </tmp/data; \
         cat /sys/block/vda/queue/logical_block_size"
    );
    let told = bed.run(Runtime::Vial, &["--device", &part], &["sh", "-c", &script])?.expect(0)?;
    let lines: Vec<&str> = told.stdout.lines().collect();
    let sum = run(Command::new("sha256sum").arg(&part))?.expect(0)?.stdout;
    let sum = sum.split(' ').next().unwrap_or_default();
    ensure!(lines.first() == Some(&"2097152"), "the partition has {told:?}");
    ensure!(lines.get(1).is_some_and(|line| line.starts_with(sum)), "{told:?}, and {sum} is there");
    ensure!(lines.get(2) == Some(&"512"), "{told:?}");
    let whole = File::open(&disk)?;
    let mut beside = vec![0; 1 << 20];
    whole.read_exact_at(&mut beside, 0)?;
    ensure!(beside[..512] == table && beside[512..].iter().all(|b| *b == 0x5a), "before it");
    whole.read_exact_at(&mut beside[..512 << 10], 3 << 20)?;
    ensure!(beside[..512 << 10].iter().all(|byte| *byte == 0x5a), "what is behind it has changed");
    // The disk is whole again for the cases that follow.
    File::options().write(true).open(&disk)?.write_all_at(&[0; 512], 0)?;
    run(Command::new("blockdev").arg("--rereadpt").arg(&disk))?.expect(0)?;
    Ok(())
}

pub(crate) fn nvme_disk_holds_what_the_guest_wrote(bed: &Bed) -> Result<()> {
    let function = with_class(CLASS_NVME)?;
    reaches_driver(&function, Some("nvme"))?;
    let data =
        |number: u8| -> Vec<u8> { (0..4 << 20).map(|at: u32| (at / 7) as u8 ^ number).collect() };
    let place = 1 << 20;
    File::options().write(true).open(disk(&function)?)?.write_all_at(&data(1), place)?;
    run(&mut Command::new("sync"))?.expect(0)?;
    let serial =
        run(Command::new("sh")
            .args(["-c", &format!("cat {FUNCTIONS}/{function}/nvme/nvme*/serial")]))?
        .expect(0)?
        .stdout;
    let _configuration = listed(&[&function])?;
    let script = format!(
        "until {FIRST} [ -b \"/dev/$disk\" ]; do sleep 0.1; done; \
         dd if=/dev/$disk bs=1M skip=1 count=4 2>/dev/null | sha256sum; \
         dd if=/dev/$disk of=/dev/$disk bs=1M skip=1 seek=20 count=4 conv=notrunc,fsync 2>/dev/null && echo copied; \
         cat /sys/block/$disk/device/serial"
    );
    let annotation = annotation(&[&function]);
    let options = ["--annotation", annotation.as_str(), "--privileged"];
    let outcome = bed.run(Runtime::Vial, &options, &["sh", "-c", &script])?.expect(0)?;
    ensure!(
        outcome.stdout.contains("copied") && outcome.stdout.contains(serial.trim()),
        "the disk did not work: {outcome:?}"
    );
    reaches_driver(&function, Some("nvme"))?;
    let mut found = vec![0; 4 << 20];
    File::open(disk(&function)?)?.read_exact_at(&mut found, 20 << 20)?;
    ensure!(found == data(1), "the copy on the disk is not what was written");
    Ok(())
}

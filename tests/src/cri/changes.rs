//! What somebody changes in a pod's network namespace on the host while the pod runs.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::network::{addresses, ask, server};
use super::pod::{Container, Pod, eventually, idle, same};
use super::wire::*;
use crate::suite::bed::{Bed, Runtime, run};
use crate::suite::faults::{kill, process};

/// What a container sees of its network, without what every kernel makes by itself.
const LOOK: &str = "cat /sys/class/net/eth0/mtu; \
     ip -o address show dev eth0 | grep -v fe80 | awk '{print $3, $4}' | sort; \
     ip route | sort; ip -6 route | grep -v -e fe80 -e multicast | sort; \
     ip neigh | grep PERMANENT | sed 's, used .*,,' | sort";

/// A neighbour's hardware's address, as `ip` has it.
const NEIGHBOUR: &str = "lladdr 02:00:00:00:00:09";

/// The namespace of the only pod that has one.
pub(super) struct Namespace(String);

impl Namespace {
    pub(super) fn of_the_only_pod() -> Result<Self> {
        let names: Vec<String> = fs::read_dir("/run/netns")?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with("cni-"))
            .collect();
        ensure!(names.len() == 1, "there are the namespaces {names:?}");
        Ok(Self(names.concat()))
    }

    /// Runs `ip` in it.
    fn ip(&self, line: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.0]).args(line.split_whitespace());
        run(&mut command)?.expect(0).with_context(|| line.to_owned())?;
        Ok(())
    }

    /// Runs `ip` once for many lines.
    fn ip_batch(&self, lines: &str) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.0, "-batch", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("start ip")?;
        child.stdin.take().context("its input")?.write_all(lines.as_bytes())?;
        ensure!(child.wait()?.success(), "ip does not do all of it");
        Ok(())
    }
}

/// What the container sees as soon as all of `there` is, and none of `gone`.
fn sees(container: &Container, there: &[&str], gone: &[&str]) -> Result<String> {
    eventually(|| {
        let seen = container.exec(LOOK)?;
        for line in there {
            ensure!(seen.contains(line), "no {line:?} in {seen:?}");
        }
        for line in gone {
            ensure!(!seen.contains(line), "still {line:?} in {seen:?}");
        }
        Ok(seen + "\n")
    })
}

fn net_admin(config: ContainerConfig) -> ContainerConfig {
    config.security(|security| {
        security.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: Vec::new(),
        });
    })
}

/// A pod's own addresses are others each time.
fn without_addresses(mut told: String, own: &[IpAddr]) -> String {
    for (ip, word) in own.iter().zip(["IPV4", "IPV6"]) {
        for end in ["/", " ", "\n"] {
            told = told.replace(&format!("{ip}{end}"), &format!("{word}{end}"));
        }
    }
    told
}

pub(crate) fn changes_of_a_network_are_seen_as_with_runc(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let own = addresses(&pod)?;
        let namespace = Namespace::of_the_only_pod()?;
        let server = server(&pod, "from-the-pod")?;
        let container = pod.start(net_admin(idle()))?;
        let told = change_addresses(&namespace, &server)?
            + &change_routes(&namespace, &container)?
            + &change_links(&namespace, &container)?;
        // Whatever was done, the first address is what it was.
        let text = eventually(|| ask(SocketAddr::new(own[0], 80)))?;
        ensure!(text == "from-the-pod\n", "it says {text:?}");
        Ok(without_addresses(told, &own))
    })
}

/// Addresses come and go, and the host reaches the pod by them.
fn change_addresses(namespace: &Namespace, server: &Container) -> Result<String> {
    let [four, six] = ["10.88.200.7", "fd88::200:7"];
    namespace.ip(&format!("address add {four}/16 dev eth0"))?;
    namespace.ip(&format!("address add {six}/64 dev eth0 nodad"))?;
    let mut told = sees(server, &[four, six], &[])?;
    for ip in [four, six] {
        let text = eventually(|| ask(SocketAddr::new(ip.parse()?, 80)))?;
        ensure!(text == "from-the-pod\n", "{ip} says {text:?}");
    }
    namespace.ip(&format!("address delete {four}/16 dev eth0"))?;
    namespace.ip(&format!("address delete {six}/64 dev eth0"))?;
    told += &sees(server, &[], &[four, six])?;
    for ip in [four, six] {
        ensure!(ask(SocketAddr::new(ip.parse()?, 80)).is_err(), "{ip} still answers");
    }
    Ok(told)
}

/// Routes come, are replaced and go, and what the container has set itself stays.
fn change_routes(namespace: &Namespace, container: &Container) -> Result<String> {
    container
        .exec("ip route add 10.222.0.0/16 via 10.88.0.1; ip address add 10.88.201.9/16 dev eth0")?;
    namespace.ip("route add 10.221.0.0/16 via 10.88.0.1")?;
    namespace.ip("route add 10.220.0.0/16 via 10.88.250.9 metric 50")?;
    namespace.ip("-6 route add fd99::/64 via fd88::1")?;
    namespace.ip(&format!("neighbour add 10.88.250.9 {NEIGHBOUR} dev eth0 nud permanent"))?;
    let mut told =
        sees(container, &["10.221.0.0/16", "10.220.0.0/16", "fd99::/64", NEIGHBOUR], &[])?;
    namespace.ip("route replace 10.221.0.0/16 via 10.88.250.9")?;
    namespace.ip("-6 route replace fd99::/64 via fd88::250:9")?;
    namespace.ip("route replace default via 10.88.250.9")?;
    told += &sees(
        container,
        &["10.221.0.0/16 via 10.88.250.9", "fd99::/64 via fd88::250:9", "default via 10.88.250.9"],
        &["10.221.0.0/16 via 10.88.0.1", "fd99::/64 via fd88::1", "default via 10.88.0.1"],
    )?;
    namespace.ip("route replace default via 10.88.0.1")?;
    namespace.ip("route delete 10.221.0.0/16")?;
    namespace.ip("route delete 10.220.0.0/16 metric 50")?;
    namespace.ip("-6 route delete fd99::/64")?;
    namespace.ip("neighbour delete 10.88.250.9 dev eth0")?;
    told += &sees(
        container,
        &["default via 10.88.0.1", "10.222.0.0/16 via 10.88.0.1", "10.88.201.9"],
        &["10.221.0.0", "10.220.0.0", "fd99::", NEIGHBOUR],
    )?;
    container.exec("ip route delete 10.222.0.0/16; ip address delete 10.88.201.9/16 dev eth0")?;
    Ok(told)
}

/// The MTU changes; the interface goes down and comes up again.
fn change_links(namespace: &Namespace, container: &Container) -> Result<String> {
    let mtu = |bytes: &str| {
        namespace.ip(&format!("link set eth0 mtu {bytes}"))?;
        eventually(|| {
            let seen = container.exec(LOOK)?;
            ensure!(seen.starts_with(bytes), "another MTU than {bytes} in {seen:?}");
            Ok(seen)
        })
    };
    // Beyond what it began with, too.
    let mut told = mtu("1300")? + &mtu("9000")? + &mtu("1500")?;
    namespace.ip("link set eth0 down")?;
    let up = |up: bool| {
        eventually(|| {
            let flags = container.exec("cat /sys/class/net/eth0/flags")?;
            let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16)?;
            ensure!((flags & 1 != 0) == up, "the flags are {flags:x}");
            Ok(())
        })
    };
    up(false)?;
    namespace.ip("link set eth0 up")?;
    up(true)?;
    // The kernel has forgotten the routes through gateways.
    namespace.ip("route add default via 10.88.0.1")?;
    told += &sees(container, &["default via 10.88.0.1"], &["default via fd88::1"])?;
    Ok(told)
}

/// How many routes a container has.
fn count_routes(container: &Container) -> Result<usize> {
    Ok(container.exec("ip route | wc -l")?.trim().parse()?)
}

/// That many routes in the container's network, in a short time.
fn has_routes(container: &Container, wanted: usize) -> Result<()> {
    eventually(|| {
        let count = count_routes(container)?;
        ensure!(count == wanted, "{count} routes, not {wanted}");
        Ok(())
    })
}

fn routes(verb: &str, numbers: std::ops::Range<u32>) -> String {
    let line =
        |n: u32| format!("route {verb} 10.{}.{}.0/24 via 10.88.0.1\n", 100 + n / 256, n % 256);
    numbers.map(line).collect()
}

/// More at once than the shim is told of one by one, and more than a guest can have.
pub(crate) fn bursts_of_changes_of_a_network_arrive(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let namespace = Namespace::of_the_only_pod()?;
        let container = pod.start(idle())?;
        let before = count_routes(&container)?;
        namespace.ip_batch(&routes("add", 0..1000))?;
        has_routes(&container, before + 1000)?;
        namespace.ip_batch(&routes("add", 1000..1100))?;
        if runtime == Runtime::Vial {
            // The guest keeps what it has, and follows again when it can.
            std::thread::sleep(Duration::from_secs(2));
            ensure!(count_routes(&container)? == before + 1000, "more than the bound were told");
        }
        namespace.ip_batch(&routes("delete", 50..1100))?;
        has_routes(&container, before + 50)?;
        // Changes without a pause are told meanwhile.
        let start = Instant::now();
        for n in 0..40 {
            namespace.ip(&format!("route replace 10.99.0.0/24 via 10.88.0.1 metric {}", n + 1))?;
            namespace.ip(&format!("route delete 10.99.0.0/24 metric {}", n + 1))?;
        }
        namespace.ip_batch(&routes("delete", 0..50))?;
        has_routes(&container, before)?;
        println!("40 changes took {:?}", start.elapsed());
        Ok(String::new())
    })
}

/// Deletes the bridge's end of the only pod's cable, and so both.
fn cut_off() -> Result<()> {
    let links = run(Command::new("ip").args(["-o", "link", "show", "master", "cni0"]))?;
    let links = links.expect(0)?.stdout;
    let name = links.split(": ").nth(1).and_then(|name| name.split('@').next());
    let name = name.with_context(|| format!("no link in {links:?}"))?;
    run(Command::new("ip").args(["link", "delete", name]))?.expect(0)?;
    Ok(())
}

/// The pod runs on, and ends as any other.
pub(crate) fn pod_whose_network_is_taken_away_runs_on_and_goes(bed: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let own = addresses(&pod)?;
        let namespace = Namespace::of_the_only_pod()?;
        let server = server(&pod, "from-the-pod")?;
        eventually(|| ask(SocketAddr::new(own[0], 80)))?;
        // Its name goes; what is in it lives as long as somebody is in it.
        run(Command::new("ip").args(["netns", "delete", &namespace.0]))?.expect(0)?;
        let text = ask(SocketAddr::new(own[0], 80))?;
        ensure!(text == "from-the-pod\n", "it says {text:?}");
        let mut told = server.exec("echo alive")?;
        cut_off()?;
        ensure!(ask(SocketAddr::new(own[0], 80)).is_err(), "it is reached without a network");
        told += &server.exec("echo alive")?;
        pod.end()?;
        bed.nothing_left()?;
        Ok(told)
    })
}

/// A cable from the host to the pod, until dropped. It has the network `10.77.n.0/24`.
pub(super) struct Cable(String);

impl Cable {
    pub(super) fn new(namespace: &Namespace, n: u32) -> Result<Self> {
        Self::named(namespace, n, &format!("net{n}"))
    }

    /// One whose end in the pod has that name.
    fn named(namespace: &Namespace, n: u32, inside: &str) -> Result<Self> {
        let host = |line: &str| -> Result<()> {
            let mut command = Command::new("ip");
            run(command.args(line.split_whitespace()))?
                .expect(0)
                .with_context(|| line.to_owned())?;
            Ok(())
        };
        let name = format!("vialc{n}");
        host(&format!(
            "link add {name} mtu 1400 type veth peer name {inside} mtu 1400 netns {}",
            namespace.0
        ))?;
        let cable = Self(name);
        host(&format!("address add 10.77.{n}.1/24 dev {}", cable.0))?;
        host(&format!("link set {} up", cable.0))?;
        namespace.ip(&format!("address add 10.77.{n}.2/24 dev {inside}"))?;
        namespace.ip(&format!("link set {inside} up"))?;
        namespace.ip(&format!("route add 10.78.{n}.0/24 via 10.77.{n}.1"))?;
        Ok(cable)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // What stays is found by the next look at the host; its other end may have taken it along.
        let _ = run(Command::new("ip").args(["link", "delete", &self.0]));
    }
}

/// The pod's interfaces but its first, with what they have.
const MORE: &str = "for i in $(ls /sys/class/net | grep -v -e lo -e eth0 -e bonding); do \
         echo $i $(cat /sys/class/net/$i/mtu); \
         ip -o -4 address show dev $i | awk '{print $3, $4}'; done; ip route | grep net; true";

pub(super) fn has_more(container: &Container, wanted: &[&str], gone: &[&str]) -> Result<String> {
    eventually(|| {
        let seen = container.exec(MORE)?;
        ensure!(wanted.iter().all(|one| seen.contains(one)), "not all of {wanted:?} in {seen:?}");
        ensure!(!gone.iter().any(|one| seen.contains(one)), "one of {gone:?} in {seen:?}");
        Ok(seen + "\n")
    })
}

pub(crate) fn interfaces_of_a_network_come_and_go(bed: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::new(runtime)?;
        let own = addresses(&pod)?;
        let namespace = Namespace::of_the_only_pod()?;
        let server = server(&pod, "from-the-pod")?;
        let answers = |ip: String| -> Result<()> {
            let text = eventually(|| ask(SocketAddr::new(ip.parse()?, 80)))?;
            ensure!(text == "from-the-pod\n", "{ip} says {text:?}");
            Ok(())
        };
        let mut told = String::new();
        // The second time under a name that was there already.
        for _ in 0..2 {
            let cables = [Cable::new(&namespace, 1)?, Cable::new(&namespace, 2)?];
            let there = ["net1 1400", "net2 1400", "10.77.2.2/24", "10.78.1.0/24", "10.78.2.0/24"];
            told += &has_more(&server, &there, &[])?;
            answers("10.77.1.2".into())?;
            answers("10.77.2.2".into())?;
            namespace.ip("link set net1 mtu 1300")?;
            told += &has_more(&server, &["net1 1300"], &[])?;
            drop(cables);
            told += &has_more(&server, &[], &["net1", "net2"])?;
        }
        answers(own[0].to_string())?;
        if runtime == Runtime::Vial {
            beyond_the_bound(&namespace, &server)?;
            answers(own[0].to_string())?;
        }
        // The first goes as well, and another comes in its place.
        cut_off()?;
        let _cable = Cable::named(&namespace, 4, "eth0")?;
        told += &sees(&server, &["1400", "10.77.4.2/24", "10.78.4.0/24"], &["10.88.0.0"])?;
        answers("10.77.4.2".into())?;
        pod.end()?;
        bed.nothing_left()?;
        Ok(told)
    })
}

/// What has come to a pod is cleaned up after like what it began with. Not by the name of this list: its VMs boot.
pub(crate) fn cri_interfaces_that_came_are_let_go_when_something_is_killed(
    bed: &Bed,
) -> Result<()> {
    for (victim, word) in [("vial-vmm", ""), ("containerd-shim", "vial")] {
        let pod = Pod::new(Runtime::Vial)?;
        let namespace = Namespace::of_the_only_pod()?;
        let container = pod.start(idle())?;
        let cable = Cable::new(&namespace, 3)?;
        has_more(&container, &["10.78.3.0/24"], &[])?;
        kill(process(victim, word)?)?;
        container.reaches(ContainerState::Exited)?;
        pod.end()?;
        drop(cable);
        bed.nothing_left().with_context(|| format!("{victim} killed"))?;
    }
    Ok(())
}

/// A guest has eight interfaces at most; those that go make room.
fn beyond_the_bound(namespace: &Namespace, container: &Container) -> Result<()> {
    let mut cables = (1..=9).map(|n| Cable::new(namespace, n)).collect::<Result<Vec<_>>>()?;
    let count = || -> Result<usize> {
        Ok(container.exec("ls -d /sys/class/net/net* | wc -l")?.trim().parse()?)
    };
    eventually(|| {
        let count = count()?;
        ensure!(count == 7, "{count} interfaces have come, not 7");
        Ok(())
    })?;
    // Those beyond are not taken in by and by.
    std::thread::sleep(Duration::from_secs(1));
    ensure!(count()? == 7, "more than the bound have come");
    cables.clear();
    has_more(container, &[], &["net"])?;
    Ok(())
}

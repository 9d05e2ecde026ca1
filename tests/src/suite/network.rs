//! A network that CNI would have made: a namespace with one end of a veth pair, and a bridge.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bed::{Bed, Detached, Runtime, run};
use super::faults;

pub(super) const NAMESPACE: &str = "vial-suite";
const PORT: u16 = 7097;

/// A network namespace, until dropped.
pub(super) struct Namespace {
    /// Whether `ip` made the directory of the namespaces a mount of its own for this one.
    mounted: bool,
}

/// The namespace and the bridge, until dropped.
pub(super) struct Network(Namespace);

pub(super) fn ip(line: &str) -> Result<String> {
    let words = line.split_whitespace();
    Ok(run(Command::new("ip").args(words))?.expect(0).with_context(|| line.to_owned())?.stdout)
}

fn namespaces_are_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some("/run/netns"))
}

impl Namespace {
    pub(super) fn new() -> Result<Self> {
        let namespace = Self { mounted: !namespaces_are_mounted() };
        ip(&format!("netns add {NAMESPACE}"))?;
        Ok(namespace)
    }

    /// What `ctr run --with-ns` takes for it.
    pub(super) fn option(&self) -> String {
        format!("network:/run/netns/{NAMESPACE}")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What stays is found by the next look at the host.
        let _ = ip(&format!("netns delete {NAMESPACE}"));
        if self.mounted {
            let _ = run(Command::new("umount").arg("/run/netns"));
        }
    }
}

impl Network {
    pub(super) fn new() -> Result<Self> {
        let network = Self(Namespace::new()?);
        for line in [
            "link add vialbr0 type bridge",
            "address add 10.97.0.1/24 dev vialbr0",
            "address add fd97::1/64 dev vialbr0 nodad",
            "link set vialbr0 up",
            "link add vialv0 mtu 1400 type veth peer name eth0 mtu 1400 netns vial-suite",
            "link set vialv0 master vialbr0 up",
            "-n vial-suite link set eth0 address 02:97:00:00:00:02",
            "-n vial-suite link set lo up",
            "-n vial-suite address add 10.97.0.2/24 dev eth0",
            "-n vial-suite address add fd97::2/64 dev eth0 nodad",
            "-n vial-suite link set eth0 up",
            "-n vial-suite route add default via 10.97.0.1",
            "-n vial-suite route add 10.98.0.0/16 via 10.97.0.9 metric 7",
            "-n vial-suite -6 route add default via fd97::1",
            "-n vial-suite neighbour add 10.97.0.9 lladdr 02:97:00:00:00:09 dev eth0 nud permanent",
        ] {
            ip(line)?;
        }
        Ok(network)
    }

    /// What is in the namespace beside what its interfaces count.
    fn look(&self) -> Result<String> {
        let qdiscs =
            run(Command::new("ip").args(["netns", "exec", NAMESPACE, "tc", "qdisc", "show"]))?
                .expect(0)?
                .stdout;
        let all = qdiscs
            + &ip("-n vial-suite -o link")?
            + &ip("-n vial-suite -o address")?
            + &ip("-n vial-suite route")?;
        // The link-local address becomes final by itself a second after the interface is up.
        Ok(all.replace(" tentative", ""))
    }

    pub(super) fn option(&self) -> String {
        self.0.option()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // What stays is found by the next look at the host.
        let _ = ip("link delete vialbr0");
        let _ = ip("link delete vialv0");
    }
}

/// Answers that many connections at once, as [`echo`] does.
pub(crate) fn echo_at_once(
    listener: TcpListener,
    connections: u32,
) -> std::thread::JoinHandle<std::io::Result<()>> {
    std::thread::spawn(move || {
        let mut answering = Vec::new();
        for _ in 0..connections {
            answering.push(echo(listener.try_clone()?, 1));
        }
        let ended = |one: std::thread::JoinHandle<_>| {
            one.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked")))
        };
        answering.into_iter().try_for_each(ended)
    })
}

/// Answers that many connections, one after the other, with what came in, once all of it has.
pub(crate) fn echo(
    listener: TcpListener,
    connections: u32,
) -> std::thread::JoinHandle<std::io::Result<()>> {
    std::thread::spawn(move || {
        for _ in 0..connections {
            let (mut stream, _) = listener.accept()?;
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            stream.write_all(&bytes)?;
        }
        Ok(())
    })
}

pub(crate) fn network_of_the_namespace_is_the_containers(bed: &Bed) -> Result<()> {
    let network = Network::new()?;
    let before = network.look()?;
    let line = format!(
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; \
         ip -o address show dev eth0 | grep -v fe80 | awk '{{print $3, $4}}' | sort; \
         ip route | sort; ip -6 route | grep -v fe80 | sort; ip neigh | grep PERMANENT | sed 's, used .*,,'; \
         data() {{ yes 'packets of a pod' | head -c 5000000; }}; data | sha256sum; \
         for host in 10.97.0.1 fd97::1; do data | nc $host {PORT} | sha256sum; done"
    );
    let mut shown = Vec::new();
    for runtime in Runtime::BOTH {
        let listener = TcpListener::bind(("::", PORT))?;
        let server = echo(listener, 2);
        let options = ["--with-ns", &network.option()];
        let outcome = bed.run(runtime, &options, &["sh", "-c", &line])?.expect(0)?;
        ensure!(server.is_finished(), "{runtime:?} did not reach the host: {outcome:?}");
        let sums: Vec<&str> = outcome.stdout.lines().filter(|line| line.ends_with("  -")).collect();
        ensure!(
            sums.len() == 3 && sums.iter().all(|sum| *sum == sums[0]),
            "{runtime:?} changed what it carried: {outcome:?}"
        );
        ensure!(outcome.stdout.starts_with("02:97:00:00:00:02\n1400\n"), "{outcome:?}");
        shown.push(outcome.stdout);
        let after = network.look()?;
        ensure!(before == after, "{runtime:?} left {after:?} in the namespace, not {before:?}");
    }
    ensure!(shown[0] == shown[1], "runc shows {:?}, Vial {:?}", shown[0], shown[1]);
    Ok(())
}

pub(crate) fn network_is_released_after_a_killed_shim(bed: &Bed) -> Result<()> {
    let network = Network::new()?;
    let before = network.look()?;
    let name = bed.name();
    let options = ["-d", "--null-io", "--with-ns", &network.option()];
    run(&mut bed.command(Runtime::Vial, &options, &name, &["sleep", "1000"]))?.expect(0)?;
    let container = Detached { name };
    container.reaches("RUNNING")?;
    let during = network.look()?;
    ensure!(during.contains("ingress") && during.contains("vtap0"), "not joined: {during:?}");
    faults::kill(faults::process("containerd-shim", "vial")?)?;
    drop(container);
    bed.clear();
    let after = network.look()?;
    ensure!(before == after, "left {after:?} in the namespace, not {before:?}");
    Ok(())
}

//! The network of pods, made by CNI: addresses, names, ports, and rules of the pod's own.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::pod::{Container, Pod, eventually, idle, same, sh};
use super::wire::*;
use crate::suite::bed::Bed;

/// The bridge's address in `tests/host/containerd/net.d`.
pub(super) const GATEWAY: &str = "10.88.0.1";
/// A port of the host that the suite gives to a pod.
const HOST_PORT: u16 = 18080;

/// The pod's addresses, IPv4 first.
pub(super) fn addresses(pod: &Pod) -> Result<Vec<IpAddr>> {
    let network = pod.status()?.network.context("the pod has no network")?;
    let mut all = vec![network.ip.parse()?];
    for more in &network.additional_ips {
        all.push(more.ip.parse::<IpAddr>()?);
    }
    Ok(all)
}

/// Starts a container that says `text` to whoever connects to port 80.
pub(super) fn server<'pod>(pod: &'pod Pod, text: &str) -> Result<Container<'pod>> {
    let line = format!(
        "echo 'echo {text}' >/tmp/answer; chmod +x /tmp/answer; \
         exec nc -ll -p 80 -e /bin/sh /tmp/answer"
    );
    pod.start(sh(&line))
}

/// What the other side says before it ends.
pub(super) fn ask(address: SocketAddr) -> Result<String> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, limit)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(limit))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

pub(crate) fn pods_reach_each_other_and_the_host(_: &Bed) -> Result<()> {
    same(|runtime| {
        let pod = Pod::with(runtime, |config| {
            config.port_mappings =
                vec![PortMapping { container_port: 80, host_port: HOST_PORT.into() }];
        })?;
        let ips = addresses(&pod)?;
        ensure!(
            ips.len() == 2 && ips[0].is_ipv4() && ips[1].is_ipv6(),
            "a pod of both families has {ips:?}"
        );
        let _server = server(&pod, "from-the-pod")?;
        for ip in &ips {
            let text = eventually(|| ask(SocketAddr::new(*ip, 80)))?;
            ensure!(text == "from-the-pod\n", "{ip} says {text:?}");
        }
        // The host's own address, as a client on the node uses it.
        let text = eventually(|| ask(SocketAddr::new(GATEWAY.parse()?, HOST_PORT)))?;
        ensure!(text == "from-the-pod\n", "the host's port says {text:?}");

        let other = Pod::new(runtime)?;
        let client = other.start(idle())?;
        let mut told = String::new();
        for ip in &ips {
            told += &eventually(|| client.exec(&format!("nc -w 5 {ip} 80 </dev/null")))?;
        }
        // The pod's own address and its loopback.
        told += &client.exec("nc -ll -p 81 -e echo looped >/dev/null 2>&1 </dev/null & sleep 1; nc -w 5 127.0.0.1 81 </dev/null")?;
        told += &client.exec(
            "ip -o address show dev eth0 | grep -v fe80 | awk '{print $3, $4}' | sed 's,[.:][0-9a-f]*/, /,' | sort; \
             ip route | sed 's,src .*,,'",
        )?;
        told += &format!("{}\n", addresses(&other)?.iter().any(|ip| ips.contains(ip)));
        Ok(told)
    })
}

/// A name server on the host that knows one name, until dropped.
struct Names {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

const NAME: &str = "db.suite.svc.cluster.local";
const KNOWN: [u8; 4] = [10, 88, 77, 66];

impl Names {
    fn start() -> Result<Self> {
        let socket = UdpSocket::bind((GATEWAY, 53)).context("serve names on the host")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut query = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut query) else { continue };
                if let Some(answer) = answer(&query[..length]) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An answer to a query with one question (RFC 1035, 4.1): the address of [`NAME`], no address
/// of another family, and no such name for everything else.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let (head, mut rest) = query.split_at_checked(12)?;
    let mut name = Vec::new();
    while let (&[length], after) = rest.split_at_checked(1)? {
        let (label, after) = after.split_at_checked(length.into())?;
        rest = after;
        if length == 0 {
            break;
        }
        name.push(String::from_utf8_lossy(label).to_lowercase());
    }
    let kind = rest.get(..4)?;
    let question = &query[12..query.len() - rest.len() + 4];
    let known = name.join(".") == NAME;
    let answers = u8::from(known && kind == [0, 1, 0, 1]);
    let mut bytes = head[..2].to_vec();
    // A response that recursion is available for; 3 is: no such name.
    bytes.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, answers, 0, 0, 0, 0]);
    bytes.extend(question);
    if answers == 1 {
        bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        bytes.extend(KNOWN);
    }
    Some(bytes)
}

pub(crate) fn names_and_rules_are_those_of_the_pod(_: &Bed) -> Result<()> {
    let _names = Names::start()?;
    same(|runtime| {
        let pod = Pod::with(runtime, |config| {
            config.dns_config = Some(DnsConfig {
                servers: vec![GATEWAY.into()],
                searches: vec!["suite.svc.cluster.local".into()],
                options: vec!["ndots:5".into()],
            });
        })?;
        Ok(names(&pod)? + &redirection(&pod)?)
    })
}

fn names(pod: &Pod) -> Result<String> {
    let container = pod.start(idle())?;
    let told = container.exec(&format!(
        "nslookup {NAME} | grep -A1 Name; ping -c 1 -W 1 db | head -n 1; \
         nslookup absent.suite | grep -c NXDOMAIN"
    ))?;
    ensure!(told.contains("10.88.77.66"), "the name was not found: {told:?}");
    Ok(told)
}

/// The host's programs and libraries, for what the image has not.
fn with_host_programs(mut config: ContainerConfig) -> ContainerConfig {
    for (host, inside) in [("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64")] {
        config = config.volume(host.as_ref(), inside, true);
    }
    config
}

/// What an init container with NET_ADMIN sets up holds for those after it.
fn redirection(pod: &Pod) -> Result<String> {
    let rules = with_host_programs(sh(
            "export PATH=/usr/sbin:/usr/bin:/bin; mkdir -p /run; \
             iptables-nft -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 80 && \
             iptables-nft -t nat -A OUTPUT -p tcp -d 127.0.0.1 --dport 8081 -j REDIRECT --to-ports 80 && \
             iptables-nft -t nat -S | grep REDIRECT",
        ))
        .security(|security| {
            security.capabilities = Some(Capability {
                add_capabilities: vec!["NET_ADMIN".into(), "NET_RAW".into()],
                drop_capabilities: Vec::new(),
            });
        });
    let mut told = pod.prints(rules)?;
    let server = server(pod, "redirected")?;
    let ip = addresses(pod)?[0];
    told += &eventually(|| ask(SocketAddr::new(ip, 8080)))?;
    told += &server.exec("nc -w 5 127.0.0.1 8081 </dev/null")?;
    ensure!(ask(SocketAddr::new(ip, 8082)).is_err(), "a port that nobody serves answers");
    Ok(told)
}

//! A network as CNI's bridge plugin makes it, and what a container and the host say to each other through it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const NAMESPACE: &str = "vial-bench";
const BRIDGE: &str = "vial-bench0";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 95, 0, 1);
const PORT: u16 = 7095;
/// What is moved in each direction, and in pieces of what size.
const BYTES: usize = 16 << 20;
const PIECE: usize = 128 << 10;
/// How often a byte goes there and back.
const ROUND_TRIPS: usize = 100;
/// How long a peer may be silent, so that a measurement that failed comes to its end.
const PATIENCE: Duration = Duration::from_secs(60);

/// What [`exchange`] does, in its order: a connection each.
pub(crate) const ROWS: [&str; 3] = ["net_send_16m", "net_receive_16m", "net_round_trips_100"];

/// Where the host listens.
pub(crate) fn peer() -> SocketAddr {
    (HOST, PORT).into()
}

/// A network namespace that is joined to a bridge of the host, and somebody who answers there. Until it is dropped.
#[derive(Debug)]
pub(crate) struct Network;

impl Network {
    /// Makes it.
    pub(crate) fn new() -> Result<Self> {
        // From here on, what is made goes.
        let network = Self;
        for line in [
            format!("netns add {NAMESPACE}"),
            format!("link add {BRIDGE} type bridge"),
            format!("address add {HOST}/24 dev {BRIDGE}"),
            format!("link set {BRIDGE} up"),
            format!("link add vial-bench1 type veth peer name eth0 netns {NAMESPACE}"),
            format!("link set vial-bench1 master {BRIDGE} up"),
            format!("-n {NAMESPACE} address add 10.95.0.2/24 dev eth0"),
            format!("-n {NAMESPACE} link set eth0 up"),
        ] {
            ip(&line)?;
        }
        let listener =
            TcpListener::bind(peer()).with_context(|| format!("listen at {}", peer()))?;
        // It ends with its last connection, or with this program.
        std::thread::spawn(move || {
            if let Err(error) = answer(&listener) {
                eprintln!("the host's side of a measurement of networks failed: {error}");
            }
        });
        Ok(network)
    }

    /// What `ctr run --with-ns` takes for it.
    pub(crate) fn option(&self) -> String {
        format!("network:/run/netns/{NAMESPACE}")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // With the namespace both ends of the pair go.
        for line in [format!("netns delete {NAMESPACE}"), format!("link delete {BRIDGE}")] {
            if let Err(error) = ip(&line) {
                eprintln!("something of the network stays: {error:#}");
            }
        }
    }
}

fn ip(line: &str) -> Result<()> {
    let output = Command::new("ip").args(line.split(' ')).output().context("run ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {line} ended with {}: {}", output.status, said.trim());
    Ok(())
}

/// The host's side.
fn answer(listener: &TcpListener) -> io::Result<()> {
    receive(&mut accept(listener)?)?;
    send(&mut accept(listener)?)?;
    let mut stream = accept(listener)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let (stream, _) = listener.accept()?;
    prepare(&stream)?;
    Ok(stream)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)
}

/// Sends all there is, and waits until the other side has it.
fn send(stream: &mut TcpStream) -> io::Result<()> {
    let piece = vec![0x5a; PIECE];
    for _ in 0..BYTES / PIECE {
        stream.write_all(&piece)?;
    }
    stream.read_exact(&mut [0])
}

/// Receives all there is, and says so.
fn receive(stream: &mut TcpStream) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut left = BYTES;
    while left > 0 {
        let most = left.min(PIECE);
        match stream.read(&mut piece[..most])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => left -= bytes,
        }
    }
    stream.write_all(&[1])
}

fn echoed(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [0];
    for _ in 0..ROUND_TRIPS {
        stream.write_all(&[1])?;
        stream.read_exact(&mut byte)?;
    }
    Ok(())
}

/// The container's side: a line on the standard output before each step, and one after the last.
pub(crate) fn exchange(address: SocketAddr) -> Result<()> {
    for (id, step) in ROWS.iter().zip([send, receive, echoed]) {
        let connected = TcpStream::connect_timeout(&address, PATIENCE)
            .and_then(|stream| prepare(&stream).map(|()| stream));
        let mut stream = connected.with_context(|| format!("connect to {address}"))?;
        println!();
        step(&mut stream).with_context(|| format!("{id} with {address}"))?;
    }
    println!();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_come_to_their_end() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let host = std::thread::spawn(move || answer(&listener));
        exchange(address).unwrap();
        host.join().unwrap().unwrap();
    }

    #[test]
    fn peer_that_goes_is_an_error() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let host = std::thread::spawn(move || drop(listener.accept()));
        let error = exchange(address).unwrap_err();
        assert!(format!("{error:#}").contains("net_send_16m"), "{error:#}");
        host.join().unwrap();
    }
}

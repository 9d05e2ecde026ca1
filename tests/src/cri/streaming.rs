//! Streams of execs and containers, as `kubectl` has them: a WebSocket whose messages begin
//! with the number of a channel (Kubernetes' `v4.channel.k8s.io`).

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Error, Message, WebSocket};

const PROTOCOL: &str = "v4.channel.k8s.io";
/// The channels of a command's standard streams, in their order.
pub(crate) const STDOUT: u8 = 1;
pub(crate) const STDERR: u8 = 2;
const STDIN: u8 = 0;
/// The channels of the first forwarded port: its bytes, and what went wrong. Both begin with the port.
pub(crate) const DATA: u8 = 0;
pub(crate) const WRONG: u8 = 1;
/// How an exec ended, as JSON.
const ENDED: u8 = 3;
const RESIZE: u8 = 4;
const CHANNELS: usize = 5;

/// How long something may take to arrive.
const PATIENCE: Duration = Duration::from_secs(60);

/// An open stream, and what came from it.
pub(crate) struct Stream {
    socket: WebSocket<TcpStream>,
    came: [Vec<u8>; CHANNELS],
}

impl Stream {
    /// Opens what an answer of CRI names.
    pub(crate) fn open(url: &str) -> Result<Self> {
        let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", PROTOCOL.parse()?);
        let host = request.uri().authority().context("a URL without a host")?.to_string();
        let tcp = TcpStream::connect(&host).with_context(|| format!("connect to {host}"))?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let (socket, _) =
            tungstenite::client(request, tcp).map_err(|error| anyhow!("open {url}: {error}"))?;
        socket.get_ref().set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(Self { socket, came: Default::default() })
    }

    /// Writes to a command's standard input.
    pub(crate) fn write(&mut self, text: &[u8]) -> Result<()> {
        self.send(STDIN, text)
    }

    /// Sets the size of the terminal.
    pub(crate) fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let size = serde_json::json!({"Width": columns, "Height": rows});
        self.send(RESIZE, size.to_string().as_bytes())
    }

    fn send(&mut self, channel: u8, text: &[u8]) -> Result<()> {
        let message = [&[channel], text].concat();
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// Takes in what has arrived. False when nothing will any more.
    fn take_in(&mut self) -> Result<bool> {
        match self.socket.read() {
            Ok(Message::Binary(message)) => {
                let (&channel, text) = message.split_first().context("an empty message")?;
                let came = self.came.get_mut(usize::from(channel)).context("no such channel")?;
                came.extend_from_slice(text);
                Ok(true)
            }
            Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => {
                Ok(false)
            }
            Ok(_) => Ok(true),
            Err(Error::Io(error))
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
            {
                Ok(true)
            }
            // The server may close the connection without a word.
            Err(Error::Io(_) | Error::Protocol(_)) => Ok(false),
            Err(error) => bail!(error),
        }
    }

    /// What came on a channel so far.
    pub(crate) fn text(&self, channel: u8) -> String {
        self.came
            .get(usize::from(channel))
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .unwrap_or_default()
    }

    /// Reads until a channel has these words.
    pub(crate) fn until(&mut self, channel: u8, words: &str) -> Result<()> {
        let start = Instant::now();
        while !self.text(channel).contains(words) {
            let open = self.take_in()?;
            let late = start.elapsed() > PATIENCE;
            let came = || (self.text(channel), self.text(ENDED));
            ensure!(open && !late, "no {words:?} on channel {channel} but {:?}", came());
        }
        Ok(())
    }

    /// Reads to the end.
    pub(crate) fn end(mut self) -> Result<Self> {
        let start = Instant::now();
        while self.take_in()? {
            ensure!(start.elapsed() < PATIENCE, "no end within {PATIENCE:?}");
        }
        Ok(self)
    }

    /// Reads to the end. Returns the exit status that was told.
    pub(crate) fn finish(self) -> Result<(i32, Self)> {
        let ended = self.end()?;
        let status = exit_status(&ended.text(ENDED))?;
        Ok((status, ended))
    }
}

/// The exit status in a Kubernetes `Status`.
fn exit_status(json: &str) -> Result<i32> {
    let told: serde_json::Value =
        serde_json::from_str(json).with_context(|| format!("its end was told as {json:?}"))?;
    if told["status"] == "Success" {
        return Ok(0);
    }
    let causes = told["details"]["causes"].as_array().cloned().unwrap_or_default();
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
    let code = code.and_then(|cause| cause["message"].as_str()).context(json.to_owned())?;
    Ok(code.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_is_read_from_a_status() {
        assert_eq!(exit_status(r#"{"status": "Success"}"#).unwrap(), 0);
        let failed = r#"{"status": "Failure", "reason": "NonZeroExitCode", "details":
            {"causes": [{"reason": "ExitCode", "message": "42"}]}}"#;
        assert_eq!(exit_status(failed).unwrap(), 42);
        assert!(exit_status(r#"{"status": "Failure", "message": "no such container"}"#).is_err());
        assert!(exit_status("").is_err());
    }
}

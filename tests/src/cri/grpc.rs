//! One gRPC call at a time over a Unix socket: a request, an answer and a status
//! (gRPC over HTTP/2, PROTOCOL-HTTP2.md). Each call has a connection of its own, so that
//! calls can be made from many threads, and across restarts of the server.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use h2::client;
use http::{HeaderMap, Request};
use prost::Message;
use prost::bytes::{BufMut, Bytes, BytesMut};
use tokio::net::UnixStream;

/// Flag and length before each message.
const PREFIX_BYTES: usize = 5;
/// The longest answer that is read.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// What the server answered instead of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    /// A gRPC status code, see the constants below.
    pub(crate) code: u32,
    /// What the server says about it.
    pub(crate) message: String,
}

impl Refused {
    /// The time that the client gave is over.
    pub(crate) const DEADLINE_EXCEEDED: u32 = 4;
    /// There is no such pod or container.
    pub(crate) const NOT_FOUND: u32 = 5;
}

impl fmt::Display for Refused {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "refused with gRPC code {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refused {}

/// Calls `method` (`package.Service/Method`) of the server at `socket`. The server may know a
/// `deadline` by which it has to answer.
///
/// # Errors
/// [`Refused`] when the server did answer, anything else when it did not within `patience`.
pub(crate) fn call<Answer: Message + Default>(
    socket: &Path,
    method: &str,
    request: &impl Message,
    (deadline, patience): (Option<Duration>, Duration),
) -> Result<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let talk = async {
        tokio::time::timeout(patience, exchange(socket, method, request, deadline))
            .await
            .map_err(|_| anyhow!("no answer within {patience:?}"))?
    };
    runtime.block_on(talk).with_context(|| method.to_owned())
}

async fn exchange<Answer: Message + Default>(
    socket: &Path,
    method: &str,
    message: &impl Message,
    deadline: Option<Duration>,
) -> Result<Answer> {
    let stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("connect to {}", socket.display()))?;
    let (client, connection) = client::Builder::new()
        .initial_window_size(1 << 24)
        .initial_connection_window_size(1 << 24)
        .handshake::<_, Bytes>(stream)
        .await?;
    // It ends with the runtime; what goes wrong shows in the call as well.
    tokio::spawn(connection);
    let mut request = Request::post(format!("http://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(deadline) = deadline {
        request = request.header("grpc-timeout", format!("{}m", deadline.as_millis()));
    }
    let request = request.body(())?;
    let (response, mut body) = client.ready().await?.send_request(request, false)?;
    body.send_data(framed(message)?, true)?;

    let (head, mut body) = response.await?.into_parts();
    ensure!(head.status == 200, "HTTP status {}", head.status);
    let mut answer = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        ensure!(answer.len() + chunk.len() <= MAX_ANSWER_BYTES, "an answer without end");
        answer.extend_from_slice(&chunk);
    }
    // Without a message the trailers are the headers.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    succeeded(&trailers)?;
    Ok(Answer::decode(unframed(&answer)?)?)
}

fn framed(message: &impl Message) -> Result<Bytes> {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.encoded_len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len())?);
    message.encode(&mut frame)?;
    Ok(frame.freeze())
}

fn unframed(frame: &[u8]) -> Result<&[u8]> {
    match frame {
        [0, a, b, c, d, message @ ..]
            if message.len() == u32::from_be_bytes([*a, *b, *c, *d]) as usize =>
        {
            Ok(message)
        }
        _ => bail!("an answer of {} bytes that is not one message", frame.len()),
    }
}

fn succeeded(trailers: &HeaderMap) -> Result<()> {
    let text = |name| trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let code = text("grpc-status").context("an answer without a status")?.parse()?;
    match code {
        0 => Ok(()),
        _ => bail!(Refused { code, message: unescaped(&text("grpc-message").unwrap_or_default()) }),
    }
}

/// The percent-encoding of `grpc-message` taken away.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = (first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_framed_and_unframed() {
        let frame = framed(&"pod".to_owned()).unwrap();
        assert_eq!(frame[..PREFIX_BYTES], [0, 0, 0, 0, 5]);
        assert_eq!(unframed(&frame).unwrap(), &frame[PREFIX_BYTES..]);
        assert!(unframed(&frame[..frame.len() - 1]).is_err());
        assert!(unframed(&[]).is_err());
        assert!(unframed(&[1, 0, 0, 0, 0]).is_err(), "compressed");
    }

    #[test]
    fn status_of_an_answer_is_read() {
        let mut trailers = HeaderMap::new();
        assert!(succeeded(&trailers).is_err());
        trailers.insert("grpc-status", "0".parse().unwrap());
        assert!(succeeded(&trailers).is_ok());
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "no%20such 100% pod%2".parse().unwrap());
        let error = succeeded(&trailers).unwrap_err();
        let refused = error.downcast_ref::<Refused>().unwrap();
        assert_eq!(refused.code, Refused::NOT_FOUND);
        assert_eq!(refused.message, "no such 100% pod%2");
    }
}

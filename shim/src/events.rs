//! Events for containerd, in order and each once.
//!
//! One task sends them over a connection to containerd's ttrpc socket. An event that containerd
//! did not take, since it restarts perhaps, is tried again before the next one is sent.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim::event::Event;
use containerd_shim_protos::{
    events::task::TaskExit,
    protobuf::{
        self, Message,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
};
use tokio::sync::{mpsc, oneshot};
use ttrpc::context::with_duration;

use crate::life::Exit;

/// Events that may wait. Whoever publishes waits when there are more.
const WAITING_EVENTS: usize = 1024;
/// How often an event is tried, a second apart.
const TRIES: u32 = 10;
/// How long containerd may take for one event.
const PATIENCE: Duration = Duration::from_secs(5);
/// The package of all events of tasks (containerd's api/events/task.proto).
const PACKAGE: &str = "containerd.events";

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Where events are put.
#[derive(Clone)]
pub struct EventSink {
    queue: mpsc::Sender<Item>,
    namespace: String,
}

impl EventSink {
    /// Sends to the ttrpc socket at `address`, for containers of `namespace`.
    pub fn new(address: String, namespace: String) -> Self {
        let (queue, items) = mpsc::channel(WAITING_EVENTS);
        tokio::spawn(send_all(address, items));
        Self { queue, namespace }
    }

    /// Adds an event to those that are to be sent.
    pub async fn publish<E: Event + Message>(&self, event: E) {
        let topic = event.topic();
        let event = match packed(&event) {
            Ok(event) => event,
            Err(error) => return tracing::error!("cannot encode the event {topic}: {error}"),
        };
        let envelope = Envelope {
            topic,
            namespace: self.namespace.clone(),
            timestamp: Some(timestamp(SystemTime::now())).into(),
            event: Some(event).into(),
            ..Default::default()
        };
        if self.queue.send(Item::Event(Box::new(envelope))).await.is_err() {
            tracing::error!("an event was lost: nothing sends events any more");
        }
    }

    /// Waits until all events so far have been sent, or given up, or `patience` is at its end.
    pub async fn flush(&self, patience: Duration) {
        let (done, wait) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).await.is_ok() {
            let _ = tokio::time::timeout(patience, wait).await;
        }
    }
}

/// The event as what it is, and its name. A message's descriptor knows that name, too, but the
/// first one that is asked for builds those of its file and of all that this imports: 350 KiB,
/// which stay.
fn packed<E: Message>(event: &E) -> protobuf::Result<Any> {
    let type_url = format!("{PACKAGE}.{}", E::NAME);
    Ok(Any { type_url, value: event.write_to_bytes()?, ..Default::default() })
}

async fn send_all(address: String, mut items: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Event(envelope) => send(&address, &mut client, *envelope).await,
            // Whoever asked may have lost patience.
            Item::Flush(done) => drop(done.send(())),
        }
    }
}

async fn send(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
    for attempt in 1..=TRIES {
        let result = match client {
            Some(client) => client.forward(with_duration(PATIENCE), &request).await.map(drop),
            None => match connect(address).await {
                Ok(connected) => {
                    let forwarded = connected.forward(with_duration(PATIENCE), &request).await;
                    *client = Some(connected);
                    forwarded.map(drop)
                }
                Err(error) => Err(error),
            },
        };
        match result {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!("containerd did not take {topic} (try {attempt}): {error}");
                *client = None;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
    tracing::error!("gave up telling containerd of {topic}");
}

async fn connect(address: &str) -> ttrpc::Result<EventsClient> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    let stream = tokio::net::UnixStream::connect(path)
        .await
        .map_err(|error| ttrpc::Error::Socket(format!("connect to {path}: {error}")))?;
    Ok(EventsClient::new(Client::new(stream.into())))
}

/// A moment as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}

/// The event of a process's end. `id` is the container's own for its init process.
pub fn task_exit(container_id: &str, id: &str, pid: u32, exit: Exit) -> TaskExit {
    TaskExit {
        container_id: container_id.into(),
        id: id.into(),
        pid,
        exit_status: exit.status,
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim::util::convert_to_any;
    use containerd_shim_protos::{
        events::task::{
            TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskOOM, TaskPaused,
            TaskResumed, TaskStart,
        },
        protobuf::MessageDyn,
    };

    use super::*;

    #[test]
    fn events_are_named_as_their_descriptors_say() {
        fn check<E: Message + MessageDyn + Clone>(event: E) {
            assert_eq!(packed(&event).unwrap(), convert_to_any(Box::new(event)).unwrap());
        }
        let container_id = || "one".to_owned();
        check(TaskCreate { container_id: container_id(), ..Default::default() });
        check(TaskStart { container_id: container_id(), ..Default::default() });
        check(TaskExecAdded { container_id: container_id(), ..Default::default() });
        check(TaskExecStarted { container_id: container_id(), ..Default::default() });
        check(TaskPaused { container_id: container_id(), ..Default::default() });
        check(TaskResumed { container_id: container_id(), ..Default::default() });
        check(TaskDelete { container_id: container_id(), ..Default::default() });
        check(TaskOOM { container_id: container_id(), ..Default::default() });
        let exit = Exit { status: 137, at: UNIX_EPOCH + Duration::from_millis(1_500) };
        check(task_exit("one", "other", 7, exit));
    }
}

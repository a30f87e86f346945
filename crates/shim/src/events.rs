//! Events to containerd: one ordered queue, bounded, sent one after the other
//! (containerd: pkg/shim/publisher.go, api/services/ttrpc/events/v1/events.proto).
//!
//! containerd may restart while a pod runs, so a failed send is tried again on a new connection. CRI-O gives no address:
//! then nobody listens and nothing is kept.

use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task as messages;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::well_known_types::{any::Any, timestamp::Timestamp};
use protobuf::{MessageDyn, MessageField, MessageFull};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use ttrpc::asynchronous::transport::Socket;

use crate::deadlines::{Deadline, Operation};

/// Events that wait at most; containerd's own publisher keeps as many.
const QUEUE: usize = 2048;

/// Attempts for one event; containerd's own publisher makes as many.
const ATTEMPTS: u32 = 5;

/// Time between attempts: containerd takes about so long to listen again after its restart. No descriptor says when it does:
/// its socket's file is made by bind(2), and may be an old one, before anybody listens.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Where events are put. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher(mpsc::Sender<Queued>, String);

/// What is in the queue.
#[derive(Debug)]
enum Queued {
    Event(Envelope),
    /// Somebody who waits for all that is before it.
    Mark(oneshot::Sender<()>),
}

impl Publisher {
    /// Starts the sender. The handle ends when every publisher is dropped and the queue is empty.
    pub fn start(namespace: String, address: Option<String>) -> (Self, JoinHandle<()>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self(sender, namespace), tokio::spawn(forward_all(queue, address)))
    }

    /// Queues an event. Never waits: when the queue is full the event is lost, and that is logged.
    pub fn publish(&self, event: &impl Event) {
        let Ok(value) = event.write_to_bytes() else { return };
        let type_url = event.descriptor_dyn().full_name().to_owned();
        let envelope = Envelope {
            timestamp: MessageField::some(Timestamp::now()),
            namespace: self.1.clone(),
            topic: event.topic().to_owned(),
            event: MessageField::some(Any { type_url, value, ..Any::default() }),
            ..Envelope::default()
        };
        if self.0.try_send(Queued::Event(envelope)).is_err() {
            tracing::error!(
                topic = event.topic(),
                "an event for containerd is lost: containerd has not taken events for so long that the queue is full"
            );
        }
    }

    /// Returns when containerd has taken what was published so far, or does not within a few seconds.
    pub async fn delivered(&self) {
        let (mark, reached) = oneshot::channel();
        if self.0.try_send(Queued::Mark(mark)).is_ok() {
            let _ = Deadline::begin(Operation::DeliverEvents).timeout(reached).await;
        }
    }
}

async fn forward_all(mut queue: mpsc::Receiver<Queued>, address: Option<String>) {
    let mut client = None;
    while let Some(queued) = queue.recv().await {
        match (queued, &address) {
            (Queued::Event(envelope), Some(address)) => forward(&mut client, address, envelope).await,
            (Queued::Event(_), None) => {}
            (Queued::Mark(waiting), _) => drop(waiting.send(())),
        }
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, envelope: Envelope) {
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    for attempt in 1..=ATTEMPTS {
        if attempt > 1 {
            tokio::time::sleep(RETRY_AFTER).await;
        }
        match try_forward(client, address, &request).await {
            Ok(()) => return,
            Err(error) => {
                *client = None;
                tracing::warn!(%error, attempt, "cannot forward an event to containerd");
            }
        }
    }
    tracing::error!(topic = %request.envelope.topic, "an event for containerd is lost: containerd did not take it after {ATTEMPTS} attempts");
}

async fn try_forward(client: &mut Option<EventsClient>, address: &str, request: &ForwardRequest) -> ttrpc::Result<()> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(connect(address).await?),
    };
    connected.forward(ttrpc::context::with_duration(Operation::ForwardEvent.budget()), request).await.map(|_| ())
}

/// Not by ttrpc's own connect(2), which waits while containerd's queue of connections is full, and the whole daemon with it.
/// Here that is an error at once (EAGAIN, unix(7)), and tried again like any other.
async fn connect(address: &str) -> ttrpc::Result<EventsClient> {
    let stream = UnixStream::connect(address).await;
    let stream = stream.map_err(|error| ttrpc::Error::Others(format!("cannot connect to {address}: {error}")))?;
    Ok(EventsClient::new(Client::new(Socket::from(stream))))
}

/// A message that is an event of containerd's.
pub trait Event: MessageFull {
    /// Its topic (containerd: core/runtime/events.go).
    fn topic(&self) -> &'static str;
}

macro_rules! topics {
    ($($message:ident => $topic:ident),* $(,)?) => {
        $(impl Event for messages::$message {
            fn topic(&self) -> &'static str {
                topics::$topic
            }
        })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn queue_is_bounded_while_containerd_is_away_and_nobody_waits() {
        let (publisher, _) = Publisher::start("k8s.io".into(), Some("/nonexistent/sock".into()));
        for _ in 0..QUEUE + 10 {
            publisher.publish(&messages::TaskStart::new());
        }
        assert_eq!(publisher.0.capacity(), 0);
    }

    #[tokio::test]
    async fn without_an_address_nothing_is_kept() {
        let (publisher, drained) = Publisher::start("default".into(), None);
        publisher.publish(&messages::TaskStart::new());
        publisher.delivered().await;
        drop(publisher);
        drained.await.unwrap();
    }

    #[test]
    fn containerd_that_accepts_no_connection_stops_nobody() {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let address = SocketAddrUnix::new(&path).unwrap();
        let socket = || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        let listener = socket();
        bind(&listener, &address).unwrap();
        listen(&listener, 0).unwrap();
        let mut waiting = vec![socket()];
        while connect(waiting.last().unwrap(), &address).is_ok() {
            waiting.push(socket());
        }
        let (tell, told) = std::sync::mpsc::channel();
        let publish = async move {
            let (publisher, _) = Publisher::start("k8s.io".into(), Some(path.display().to_string()));
            publisher.publish(&messages::TaskStart::new());
            publisher.delivered().await;
            tell.send(()).unwrap();
        };
        // On a clock of its own, which is ahead whenever everybody waits for it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        std::thread::spawn(move || runtime.block_on(publish));
        // What takes no time, on a machine that is busy; a thread that waits in connect(2) never comes back.
        assert!(told.recv_timeout(Duration::from_secs(20)).is_ok());
    }
}

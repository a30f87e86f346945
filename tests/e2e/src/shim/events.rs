//! The end of the events: what a shim forwards, in the order in which it comes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim_async::{Events as Service, create_events};
use protobuf::Message;
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use ttrpc::asynchronous::{Server, TtrpcContext};

/// A listener for events.
pub struct Events {
    path: String,
    received: Mutex<UnboundedReceiver<Event>>,
    _server: Server,
}

/// Its topic, and its message, encoded.
struct Event(String, Vec<u8>);

struct Sink(UnboundedSender<Event>);

#[async_trait]
impl Service for Sink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope;
        // Nobody may be listening any more.
        let _ = self.0.send(Event(envelope.topic.clone(), envelope.event.value.clone()));
        Ok(Empty::new())
    }
}

impl Events {
    /// Listens at a path.
    pub async fn listen(path: &Path) -> Result<Self> {
        let (sender, received) = unbounded_channel();
        let services: HashMap<_, _> = create_events(Arc::new(Sink(sender)));
        let path = path.display().to_string();
        let mut server = Server::new().bind(&format!("unix://{path}"))?.register_service(services);
        server.start().await?;
        Ok(Self { path, received: Mutex::new(received), _server: server })
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The topics that have come, and that nobody has asked for yet.
    pub async fn seen(&self) -> Vec<String> {
        let mut received = self.received.lock().await;
        std::iter::from_fn(|| received.try_recv().ok()).map(|Event(topic, _)| topic).collect()
    }

    /// The next `count` topics.
    pub async fn next(&self, count: usize) -> Result<Vec<String>> {
        let mut got = Vec::new();
        while got.len() < count {
            let Event(topic, _) = self.one().await.with_context(|| format!("of {count} events came only {got:?}"))?;
            got.push(topic);
        }
        Ok(got)
    }

    /// The next `count` exits, in their order; what else comes meanwhile is passed over.
    pub async fn next_exits(&self, count: usize) -> Result<Vec<TaskExit>> {
        let mut got = Vec::new();
        while got.len() < count {
            let Event(topic, value) =
                self.one().await.with_context(|| format!("of {count} exits came only {got:?}"))?;
            if topic == "/tasks/exit" {
                got.push(TaskExit::parse_from_bytes(&value)?);
            }
        }
        Ok(got)
    }

    async fn one(&self) -> Result<Event> {
        let mut received = self.received.lock().await;
        tokio::time::timeout(crate::PATIENCE, received.recv()).await?.context("no more events")
    }
}

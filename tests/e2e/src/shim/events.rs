//! The end of the events: what a shim forwards, in the order in which it comes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::shim_async::{Events as Service, create_events};
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use ttrpc::asynchronous::{Server, TtrpcContext};

/// A listener for events.
pub struct Events {
    path: String,
    topics: Mutex<UnboundedReceiver<String>>,
    _server: Server,
}

struct Sink(UnboundedSender<String>);

#[async_trait]
impl Service for Sink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        // Nobody may be listening any more.
        let _ = self.0.send(request.envelope.topic.clone());
        Ok(Empty::new())
    }
}

impl Events {
    /// Listens at a path.
    pub async fn listen(path: &Path) -> Result<Self> {
        let (sender, topics) = unbounded_channel();
        let services: HashMap<_, _> = create_events(Arc::new(Sink(sender)));
        let path = path.display().to_string();
        let mut server = Server::new().bind(&format!("unix://{path}"))?.register_service(services);
        server.start().await?;
        Ok(Self { path, topics: Mutex::new(topics), _server: server })
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The topics that have come, and that nobody has asked for yet.
    pub async fn seen(&self) -> Vec<String> {
        let mut topics = self.topics.lock().await;
        std::iter::from_fn(|| topics.try_recv().ok()).collect()
    }

    /// The next `count` topics.
    pub async fn next(&self, count: usize) -> Result<Vec<String>> {
        let mut topics = self.topics.lock().await;
        let mut got = Vec::new();
        while got.len() < count {
            let next = tokio::time::timeout(crate::PATIENCE, topics.recv()).await;
            let next = next.with_context(|| format!("of {count} events came only {got:?}"))?;
            got.push(next.context("no more events")?);
        }
        Ok(got)
    }
}

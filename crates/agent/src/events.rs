//! What happens in the sandbox by itself and the shim wants to know of: out-of-memory kills.
//!
//! The queue is bounded. An event that finds it full is dropped: events say that something happened at least once.

use bulkhead_protocol::agent::{Event, OomEvent};
use tokio::sync::{Mutex, mpsc};

/// Events that wait for the shim.
const CAPACITY: usize = 64;

/// The sending half, one for whoever has something to tell.
#[derive(Clone, Debug)]
pub struct Sender(mpsc::Sender<Event>);

impl Sender {
    /// The kernel killed a process of the container for want of memory.
    pub fn oom(&self, container_id: &str) {
        let mut event = Event::new();
        event.set_oom(OomEvent { container_id: container_id.to_owned(), ..Default::default() });
        if self.0.try_send(event).is_err() {
            tracing::warn!(container_id, "event queue is full, an OOM event is dropped");
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver(Mutex<mpsc::Receiver<Event>>);

impl Receiver {
    /// The next event. `None` when nothing can send any more.
    pub async fn next(&self) -> Option<Event> {
        self.0.lock().await.recv().await
    }
}

/// A queue.
pub fn channel() -> (Sender, Receiver) {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    (Sender(sender), Receiver(Mutex::new(receiver)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn flood_keeps_the_first_events_and_does_not_block() {
        let (sender, receiver) = channel();
        for n in 0..CAPACITY * 2 {
            sender.oom(&n.to_string());
        }
        assert_eq!(receiver.next().await.unwrap().oom().container_id, "0");
    }
}

//! Work on a thread of its own, beside the reactor and its pool: what moves the thread to another namespace, and what must
//! not wait for a thread of the pool.

use std::io;
use std::thread::Builder;

use tokio::sync::oneshot;

/// Runs `work` to its end on a new thread with a stack of so many bytes. Fails if there is none to be had.
pub async fn run<T: Send + 'static>(
    name: &str,
    stack: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = oneshot::channel();
    Builder::new().name(name.to_owned()).stack_size(stack).spawn(move || {
        let _ = tell.send(work());
    })?;
    told.await.map_err(io::Error::other)
}

//! Work on a thread of its own, beside the reactor and its pool: what moves the thread to another namespace, and what must
//! not wait for a thread of the pool.

use std::io;
use std::thread::Builder;

use tokio::sync::oneshot;

/// Enough for system calls, the names that they take, and netlink messages.
const STACK: usize = 512 << 10;

/// Runs `work` to its end on a new thread. Fails if there is none to be had.
pub async fn run<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    run_or_undo(name, work, || ()).await
}

/// As [`run`]; if the caller has given up when `work` is done, the thread runs `undo`.
pub async fn run_or_undo<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    undo: impl FnOnce() + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = oneshot::channel();
    let whose = tracing::Span::current();
    Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
        let _entered = whose.enter();
        if tell.send(work()).is_err() {
            undo();
        }
    })?;
    told.await.map_err(io::Error::other)
}

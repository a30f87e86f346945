//! Where helpers come from: a process without threads that forks one whenever the agent asks.
//!
//! The agent has threads, and what a threaded process forks may not go on as it likes (fork(2)). To execute this program anew
//! costs more than all else that a helper does. So this process is forked off before the agent starts its first thread, and
//! waits. Its helpers are the agent's children, not its own (CLONE_PARENT, clone(2)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_protocol::control;
use rustix::process::setpgid;
use rustix::thread::set_name;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use super::channel::{control_pair, receive};
use super::error::RuntimeError;
use super::helper;
use crate::guest_time;
use crate::sys::{self, Forked, Parent};

/// How long a helper may take to be there: fork(2) waits for nothing but memory.
const FORK_TIMEOUT: Duration = Duration::from_secs(5);

/// The agent's end.
#[derive(Debug)]
pub struct Zygote(Mutex<Channel>);

#[derive(Debug)]
struct Channel {
    socket: AsyncFd<OwnedFd>,
    orders: u64,
}

/// A zygote that no event loop knows yet.
#[derive(Debug)]
pub struct Unwatched(OwnedFd);

/// Agent to zygote, with a helper's end of its socket to the agent.
#[derive(Debug, Deserialize, Serialize)]
struct Order {
    number: u64,
}

/// A new helper to the agent, or the zygote in its place.
#[derive(Debug, Deserialize, Serialize)]
struct Answer {
    number: u64,
    born: Born,
}

#[derive(Debug, Deserialize, Serialize)]
enum Born {
    Helper { pid: u32 },
    Failed { errno: i32 },
}

/// Forks the zygote off. The caller has no thread beside its own, and has set up all that helpers inherit, but not its log.
pub fn start() -> io::Result<Unwatched> {
    let (ours, theirs) = control_pair()?;
    match sys::fork(Parent::Caller)? {
        Forked::Child => {
            drop(ours);
            let _ = set_name(c"agent-zygote");
            std::process::exit(serve(&theirs))
        }
        Forked::Parent { .. } => Ok(Unwatched(ours)),
    }
}

/// Forks until the agent's end closes. Helpers never return from here.
fn serve(agent: &OwnedFd) -> i32 {
    loop {
        let Ok(Some((Order { number }, descriptors))) = control::receive(agent) else { return 1 };
        let Some(socket) = descriptors.into_iter().next() else { return 1 };
        let answer = |born| control::send(agent, &Answer { number, born }, &[]);
        let answered = match sys::fork(Parent::CallersParent) {
            Ok(Forked::Child) => {
                // The agent ends a helper with all that it has started.
                let _ = setpgid(None, None);
                let _ = set_name(c"agent-helper");
                let answered = answer(Born::Helper { pid: std::process::id() });
                std::process::exit(if answered.is_ok() { helper::main(&socket) } else { 1 });
            }
            Ok(Forked::Parent { .. }) => Ok(()),
            Err(error) => answer(Born::Failed { errno: error.raw_os_error().unwrap_or(libc::EAGAIN) }),
        };
        if answered.is_err() {
            return 1;
        }
    }
}

impl Unwatched {
    /// Has this thread's event loop watch for answers.
    pub fn watch(self) -> io::Result<Zygote> {
        let socket = sys::watch(self.0, Interest::READABLE)?;
        Ok(Zygote(Mutex::new(Channel { socket, orders: 0 })))
    }
}

impl Zygote {
    /// Makes a helper that has this end of a socket; answers its pid.
    pub async fn helper(&self, socket: OwnedFd) -> Result<u32, RuntimeError> {
        let born = async {
            let mut channel = self.0.lock().await;
            channel.orders += 1;
            let order = Order { number: channel.orders };
            control::send(channel.socket.get_ref(), &order, &[socket.as_fd()]).map_err(RuntimeError::Talk)?;
            loop {
                // Whoever asked before may have gone before the answer.
                let (answer, _) = receive::<Answer>(&channel.socket).await?;
                if answer.number == order.number {
                    return Ok(answer.born);
                }
            }
        };
        match guest_time::timeout(FORK_TIMEOUT, born).await.unwrap_or(Err(RuntimeError::Slow))? {
            Born::Helper { pid } => Ok(pid),
            Born::Failed { errno } => Err(RuntimeError::Spawn(io::Error::from_raw_os_error(errno))),
        }
    }
}

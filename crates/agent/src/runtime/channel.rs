//! The socket pair to a helper, or to the zygote: one message in a packet each way.

use std::os::fd::OwnedFd;

use bulkhead_protocol::control::{self, ControlError};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

use super::error::RuntimeError;

/// A socket pair for one helper. The agent's end does not block.
pub fn control_pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Waits for the helper's answer.
pub async fn receive<T: DeserializeOwned>(channel: &AsyncFd<OwnedFd>) -> Result<(T, Vec<OwnedFd>), RuntimeError> {
    loop {
        let mut ready = channel.readable().await.map_err(RuntimeError::Spawn)?;
        match control::receive(channel.get_ref()) {
            Err(ControlError::Receive(rustix::io::Errno::AGAIN)) => ready.clear_ready(),
            // It ended with the request unread.
            Err(ControlError::Receive(rustix::io::Errno::CONNRESET)) | Ok(None) => {
                return Err(RuntimeError::HelperEnded { code: None });
            }
            Err(error) => return Err(RuntimeError::Talk(error)),
            Ok(Some(reply)) => return Ok(reply),
        }
    }
}

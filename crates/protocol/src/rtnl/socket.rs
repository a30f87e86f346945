//! Asking a kernel over rtnetlink(7).

use std::future::Future;
use std::io;

use futures::StreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_proto::sys::{SocketAddr, protocols::NETLINK_ROUTE};
use netlink_proto::{ConnectionHandle, new_connection};

use super::Message;

/// How often a dump is asked for anew that something has changed meanwhile. The last one is taken as it is: whoever follows
/// the changes learns of them.
const DUMPS: usize = 3;

/// A connection to the kernel of the network namespace in which it was made.
#[derive(Clone, Debug)]
pub struct Socket(ConnectionHandle<Message>);

impl Socket {
    /// Opens one in the calling thread's namespace. The future has to be run as long as the socket is used.
    pub fn open() -> io::Result<(Self, impl Future<Output = ()> + Send)> {
        let (connection, handle, _) = new_connection(NETLINK_ROUTE)?;
        Ok((Self(handle), connection))
    }

    /// Has something done.
    pub async fn change(&self, message: Message, flags: u16) -> io::Result<()> {
        self.ask(message, NLM_F_ACK | flags).await.map(drop)
    }

    /// One object.
    pub async fn get(&self, message: Message) -> io::Result<Option<Message>> {
        Ok(self.ask(message, NLM_F_ACK).await?.0.into_iter().next())
    }

    /// All objects of a kind.
    pub async fn dump(&self, message: &Message) -> io::Result<Vec<Message>> {
        let mut tries = 1;
        loop {
            let (found, interrupted) = self.ask(message.clone(), NLM_F_DUMP).await?;
            if !interrupted || tries == DUMPS {
                return Ok(found);
            }
            tries += 1;
        }
    }

    async fn ask(&self, message: Message, flags: u16) -> io::Result<(Vec<Message>, bool)> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        let mut answers = self.0.request(request, SocketAddr::new(0, 0)).map_err(io::Error::other)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        while let Some(answer) = answers.next().await {
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => found.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Overrun(_) => return Err(io::Error::from(io::ErrorKind::WouldBlock)),
                _ => {}
            }
        }
        Ok((found, interrupted))
    }
}

//! The pod's network: the rules and steps that the shim has written, taken over nfnetlink and rtnetlink(7).

use std::collections::HashMap;
use std::fmt::Write;
use std::io;

use bulkhead_netfilter::ReplayError;
use bulkhead_protocol::agent::network_step::Step;
use bulkhead_protocol::agent::{
    AddNetworkRequest, AddNetworkResponse, InterfaceStats, Netlink, NetworkDevice, NetworkStep, Sysctls,
};
use bulkhead_protocol::rtnl::{self, IFLA_IFNAME, Message, NEW_LINK, Socket};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::sysctl;
use crate::devices;
use crate::netns::Netns;

mod stats;

/// `IFLA_NET_NS_PID` of linux/if_link.h.
const IFLA_NET_NS_PID: u16 = 19;

/// `IFF_UP` of linux/if.h.
const IFF_UP: u32 = 1;

/// Loopback's index, in the namespace on the host as in the guest.
const LOOPBACK_INDEX: u32 = 1;

/// Most failures that an answer tells of, and most bytes of each: an answer is bounded (`MAX_ANSWER`).
const MAX_FAILURES: usize = 32;
const MAX_FAILURE_LEN: usize = 256;

/// The pod's links: where those of the namespace on the host, which the steps name, are in the guest.
#[derive(Debug, Default)]
pub struct Links(Mutex<HashMap<u32, u32>>);

impl Links {
    /// Sets rules of the packet filter and takes the steps of a request. Answers with the rules and the optional steps that the
    /// kernel did not take. The links are held meanwhile: requests take effect one after the other.
    pub async fn change(
        &self,
        netns: &Netns,
        mut request: AddNetworkRequest,
    ) -> Result<AddNetworkResponse, NetworkError> {
        let mut held = self.0.lock().await;
        // Before the interfaces, so that no packet passes without.
        let mut rules = Vec::new();
        if let Some(firewall) = request.firewall.take() {
            let replay = move || bulkhead_netfilter::replay(&firewall);
            rules = netns.run(replay).await.map_err(NetworkError::Namespace)??;
        }
        let links = held.clone();
        Kernel::connect()?.prepare(&request.devices, netns.holder()).await?;
        let (links, failed) = if netns.holder().is_some() {
            let work = move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
                runtime.map_err(NetworkError::Socket)?.block_on(take(links, request))
            };
            netns.run(work).await.map_err(NetworkError::Namespace)??
        } else {
            take(links, request).await?
        };
        *held = links;
        Ok(AddNetworkResponse { failed, rules, ..AddNetworkResponse::default() })
    }
}

async fn take(
    mut links: HashMap<u32, u32>,
    request: AddNetworkRequest,
) -> Result<(HashMap<u32, u32>, Vec<String>), NetworkError> {
    let kernel = Kernel::connect()?;
    if links.insert(LOOPBACK_INDEX, LOOPBACK_INDEX).is_none() {
        // Nothing works without it, whatever else a pod has.
        let up = kernel.socket.change(link(LOOPBACK_INDEX, IFF_UP), 0).await;
        up.map_err(|source| NetworkError::Step { what: "bring up loopback".to_owned(), source })?;
    }
    for device in &request.devices {
        let index = kernel.index(&temporary_name(device.slot)).await;
        links.insert(device.index, index.map_err(|source| NetworkError::Device { slot: device.slot, source })?);
    }
    let mut failed = Vec::new();
    // Steps that the kernel does not take may need another's effect.
    let mut pending: Vec<_> = request.steps.iter().collect();
    while !pending.is_empty() {
        let (before, mut refused) = (pending.len(), Vec::new());
        for step in pending {
            match kernel.take(&mut links, step, &mut failed).await {
                Ok(()) => {}
                Err(error) => refused.push((step, error)),
            }
        }
        if refused.len() == before {
            for (step, source) in refused {
                let what = step.what.clone();
                if !step.optional {
                    return Err(NetworkError::Step { what, source });
                }
                failed.push(format!("{what}: {source}"));
            }
            break;
        }
        pending = refused.into_iter().map(|(step, _)| step).collect();
    }
    failed.truncate(MAX_FAILURES);
    for text in &mut failed {
        text.truncate(text.floor_char_boundary(MAX_FAILURE_LEN));
    }
    Ok((links, failed))
}

/// The kernel of the namespace of the thread that makes it.
struct Kernel {
    socket: Socket,
    connection: JoinHandle<()>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Kernel {
    fn connect() -> Result<Self, NetworkError> {
        let (socket, connection) = Socket::open().map_err(NetworkError::Socket)?;
        Ok(Self { socket, connection: tokio::spawn(connection) })
    }

    /// Devices appear in the guest's own namespace, under names that the pod's may want for others.
    async fn prepare(&self, devices: &[NetworkDevice], holder: Option<u32>) -> Result<(), NetworkError> {
        for device in devices {
            let failed = |source| NetworkError::Device { slot: device.slot, source };
            let name = devices::interface(device.slot).map_err(failed)?;
            let index = self.index(&name).await.map_err(failed)?;
            let mut message = link(index, 0);
            message.push(IFLA_IFNAME, &c_string(&temporary_name(device.slot)));
            if let Some(holder) = holder {
                message.push(IFLA_NET_NS_PID, &holder.to_ne_bytes());
            }
            self.socket.change(message, 0).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn index(&self, name: &str) -> io::Result<u32> {
        let mut message = Message { kind: rtnl::GET_LINK, ..link(0, 0) };
        message.push(IFLA_IFNAME, &c_string(name));
        let found = self.socket.get(message).await?;
        found.and_then(|link| rtnl::u32_at(&link.payload, 4)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    async fn take(
        &self,
        links: &mut HashMap<u32, u32>,
        step: &NetworkStep,
        failed: &mut Vec<String>,
    ) -> io::Result<()> {
        match &step.step {
            Some(Step::Netlink(netlink)) => self.change(links, netlink).await,
            Some(Step::Sysctls(sysctls)) => {
                failed.extend(set(sysctls));
                Ok(())
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    async fn change(&self, links: &mut HashMap<u32, u32>, netlink: &Netlink) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let kind = u16::try_from(netlink.type_).map_err(invalid)?;
        let flags = u16::try_from(netlink.flags).map_err(invalid)?;
        let mut message = Message { kind, payload: netlink.payload.clone() };
        message
            .translate(|index| links.get(&index).copied())
            .map_err(|index| io::Error::new(io::ErrorKind::NotFound, format!("the guest has no link {index}")))?;
        let name = message.attribute(IFLA_IFNAME).map(text);
        let done = self.socket.change(message, flags).await;
        match done {
            Err(error) if !is_done_already(kind, netlink.makes != 0, &error) => return Err(error),
            _ => {}
        }
        if let Some(name) = name.filter(|_| netlink.makes != 0) {
            links.insert(netlink.makes, self.index(&name).await?);
        }
        Ok(())
    }
}

/// Whether it is as the step wants it. The kernel makes routes for addresses by itself, and removes them with them.
fn is_done_already(kind: u16, makes: bool, error: &io::Error) -> bool {
    let removes = kind & 3 == 1;
    match error.raw_os_error() {
        // Any other link of that name is in the way.
        Some(libc::EEXIST) => kind != NEW_LINK || makes,
        Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL) => removes,
        _ => false,
    }
}

/// Sets the parameters in which the guest differs. One that the guest's kernel does not have is left out.
fn set(sysctls: &Sysctls) -> Vec<String> {
    let one = |sysctl: &bulkhead_protocol::agent::Sysctl| {
        if sysctl::read(&sysctl.name).is_none_or(|value| value == sysctl.value) {
            return None;
        }
        let error = sysctl::set(&sysctl.name, &sysctl.value).err()?;
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            let _ = write!(text, ": {source}");
        }
        Some(text)
    };
    sysctls.sysctls.iter().filter_map(one).collect()
}

/// A message about a link, with flags to be set.
fn link(index: u32, flags: u32) -> Message {
    Message::new(NEW_LINK, &[&[0; 4][..], &[index, flags, flags].map(u32::to_ne_bytes).concat()].concat())
}

fn temporary_name(slot: u32) -> String {
    format!("slot-{slot}")
}

fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// Counters of the pod's interfaces; loopback is left out.
pub fn interface_stats(netns: &Netns) -> Vec<InterfaceStats> {
    stats::interfaces(&netns.counters().unwrap_or_default())
}

/// The network cannot be what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// netlink(7).
    #[error("cannot open a netlink socket")]
    Socket(#[source] io::Error),
    /// setns(2).
    #[error("cannot enter the network namespace of the pod's user namespace")]
    Namespace(#[source] io::Error),
    /// No such interface was plugged in.
    #[error("the guest has no network device in slot {slot}")]
    Device { slot: u32, source: io::Error },
    /// nfnetlink.
    #[error(transparent)]
    Rules(#[from] ReplayError),
    /// The kernel refuses.
    #[error("the guest cannot {what}")]
    Step { what: String, source: io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_wanted_counts_as_done() {
        let error = io::Error::from_raw_os_error;
        assert!(is_done_already(rtnl::NEW_ROUTE, false, &error(libc::EEXIST)));
        assert!(is_done_already(NEW_LINK, true, &error(libc::EEXIST)));
        assert!(!is_done_already(NEW_LINK, false, &error(libc::EEXIST)), "a name that another link has");
        assert!(is_done_already(rtnl::NEW_ROUTE + 1, false, &error(libc::ESRCH)));
        assert!(!is_done_already(rtnl::NEW_ROUTE, false, &error(libc::ENODEV)));
    }
}

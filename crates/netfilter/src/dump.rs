//! Reads the rules of the calling thread's network namespace.

use std::io;

use bulkhead_protocol::agent::{Firewall, XtTable};

use crate::attributes::{find, put, text};
use crate::modules::would_load;
use crate::netlink::Socket;
use crate::nft::{self, elements, message, set};
use crate::tables::{self, Told};
use crate::{MAX_BYTES, Uncarried, ipset, xtables};

/// How often rules are read that others change meanwhile. Whoever sets a pod's network up is done by now; a daemon that
/// adds a rule at times is met by the second try.
const TRIES: usize = 16;

/// What was read.
#[derive(Debug, Default)]
pub struct Dump {
    /// The rules, for [`crate::replay`].
    pub firewall: Firewall,
    /// What is not among them.
    pub uncarried: Vec<Uncarried>,
}

/// Reads all rules of the calling thread's network namespace. Changes nothing on the node: what has never been asked for is
/// not asked for either, because that would load modules.
pub fn dump() -> Result<Dump, DumpError> {
    let mut dump = Dump::default();
    if !would_load("nfnetlink") && !would_load("nf_tables") {
        let made = tables::made(&told()?, &interface_name);
        (dump.firewall.nft, dump.uncarried) = (made.messages, made.uncarried);
    }
    dump.firewall.sets = ipset::dump().map_err(DumpError::IpSet)?;
    let (tables, uncarried) = xtables::dump().map_err(DumpError::XTables)?;
    dump.firewall.xtables = tables;
    dump.uncarried.extend(uncarried);
    let size: usize = dump.firewall.nft.iter().map(|one| one.attributes.len()).sum();
    let legacy: usize = dump.firewall.xtables.iter().map(|table: &XtTable| table.entries.len()).sum();
    let sets: usize = dump.firewall.sets.iter().map(ipset::size).sum();
    if size + legacy + sets > MAX_BYTES {
        return Err(DumpError::TooLarge);
    }
    Ok(dump)
}

fn interface_name(index: u32) -> Option<String> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::index_to_name(socket, index).ok()
}

/// What nf_tables tells, of one generation of its rules.
fn told() -> Result<Told, DumpError> {
    let mut socket = match Socket::open() {
        Ok(socket) => socket,
        // A kernel without nfnetlink.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Told::default()),
        Err(error) => return Err(DumpError::Nft(error)),
    };
    for _ in 0..TRIES {
        let before = match generation(&mut socket) {
            Ok(generation) => generation,
            // nfnetlink without nf_tables.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Told::default()),
            Err(error) => return Err(DumpError::Nft(error)),
        };
        let told = read(&mut socket).map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge => DumpError::TooLarge,
            _ => DumpError::Nft(error),
        })?;
        let after = generation(&mut socket).map_err(DumpError::Nft)?;
        if let Some(told) = told.filter(|_| before == after) {
            return Ok(told);
        }
    }
    Err(DumpError::Changing)
}

fn generation(socket: &mut Socket) -> io::Result<Vec<u8>> {
    let answer = socket.ask(kind(message::GET_GENERATION), 0, 0, &[])?;
    // NFTA_GEN_ID
    Ok(find(&answer, 1).unwrap_or(&[]).to_vec())
}

fn read(socket: &mut Socket) -> io::Result<Option<Told>> {
    let mut all = |made_by: u8, family, attributes: &[u8]| socket.dump(kind(made_by + 1), family, attributes);
    let Some(tables) = all(message::NEW_TABLE, 0, &[])? else { return Ok(None) };
    if tables.is_empty() {
        return Ok(Some(Told::default()));
    }
    let Some(chains) = all(message::NEW_CHAIN, 0, &[])? else { return Ok(None) };
    let Some(sets) = all(message::NEW_SET, 0, &[])? else { return Ok(None) };
    let Some(objects) = all(message::NEW_OBJECT, 0, &[])? else { return Ok(None) };
    let Some(flowtables) = all(message::NEW_FLOWTABLE, 0, &[])? else { return Ok(None) };
    let Some(rules) = all(message::NEW_RULE, 0, &[])? else { return Ok(None) };
    let mut told = Told { tables, chains, sets, objects, flowtables, rules, elements: Vec::new() };
    let mut size = 0;
    for one in &told.sets {
        let mut of_set = Vec::new();
        for (kind, from) in [(elements::TABLE, set::TABLE), (elements::SET, set::NAME)] {
            put(&mut of_set, kind, find(one.attributes(), from).unwrap_or(&[]));
        }
        let Some(some) = all(message::NEW_ELEMENTS, one.family(), &of_set)? else { return Ok(None) };
        size += some.iter().map(|message| message.attributes().len()).sum::<usize>();
        if size > MAX_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        told.elements.extend(some);
    }
    told.elements.retain(|one| text(one.attributes(), elements::SET).is_some());
    Ok(Some(told))
}

fn kind(message: u8) -> u16 {
    nft::SUBSYSTEM << 8 | u16::from(message)
}

/// The rules cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// nfnetlink.
    #[error("cannot read the nftables rules of the pod's network namespace")]
    Nft(#[source] io::Error),
    /// Socket options.
    #[error("cannot read the iptables rules of the pod's network namespace")]
    XTables(#[source] io::Error),
    /// nfnetlink.
    #[error("cannot read the sets of ipset of the pod's network namespace")]
    IpSet(#[source] io::Error),
    /// Somebody else writes all the time.
    #[error("the nftables rules of the pod's network namespace change all the time; try again when they have settled")]
    Changing,
    /// More than is carried.
    #[error("the rules of the pod's network namespace have more than {} MiB; at most that is carried into a VM", MAX_BYTES >> 20)]
    TooLarge,
}

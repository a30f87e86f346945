//! Puts rules into the calling thread's network namespace.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;

use bulkhead_protocol::agent::{Firewall, FirewallFailure, NftMessage, XtTable};

use crate::attributes::put_text;
use crate::netlink::{APPEND, CREATE, Objection, REQUEST, Socket, put_message};
use crate::nft::{self, message};
use crate::{ipset, tables, xtables};

/// How often a batch is sent again without what the kernel did not take. What depends on that fails at the same time, so
/// the second try is the last one but for rules that fail by what only a whole ruleset shows.
const TRIES: usize = 4;

/// Most failures that are told: the first ones are the causes.
const MAX_FAILURES: usize = 64;

/// Puts rules in. All of nf_tables are there at once, as is each table of x_tables. Returns what the kernel did not take,
/// and has put in the rest.
pub fn replay(firewall: &Firewall) -> Result<Vec<FirewallFailure>, ReplayError> {
    let sets = ipset::replay(&firewall.sets).map_err(ReplayError::IpSet)?;
    let mut failures = if firewall.nft.is_empty() { Vec::new() } else { nf_tables(&firewall.nft)? };
    for (index, table) in firewall.xtables.iter().enumerate() {
        if let Some((errno, offset)) = xtables::replay(table) {
            failures.push(failure(firewall.nft.len() + index, errno, offset));
        }
    }
    let first = firewall.nft.len() + firewall.xtables.len();
    // First, for they are what rules fail by.
    failures.splice(..0, sets.into_iter().map(|(place, errno)| failure(first + place, errno, 0)));
    failures.truncate(MAX_FAILURES);
    Ok(failures)
}

/// What makes one firewall of another: tables that differ go and come as a whole, those of nf_tables in one batch. It may be
/// put in twice. Sets of ipset come with the first firewall alone.
pub fn replacing(old: &Firewall, new: &Firewall) -> Firewall {
    let steady = |firewall: &Firewall| {
        let mut tables: BTreeMap<tables::Key, Vec<NftMessage>> = BTreeMap::new();
        for one in &firewall.nft {
            tables.entry(tables::key(one)).or_default().push(tables::steady(one));
        }
        tables
    };
    let (had, has) = (steady(old), steady(new));
    let changed: BTreeSet<_> = had.keys().chain(has.keys()).filter(|key| had.get(*key) != has.get(*key)).collect();
    let destroy = |(family, name): &tables::Key| {
        let mut attributes = Vec::new();
        put_text(&mut attributes, nft::table::NAME, name);
        NftMessage { kind: u32::from(message::DESTROY_TABLE), family: *family, attributes, ..NftMessage::default() }
    };
    let made = new.nft.iter().filter(|one| changed.contains(&tables::key(one))).cloned();
    let before = |table: &XtTable| old.xtables.iter().find(|one| (one.ipv6, &one.name) == (table.ipv6, &table.name));
    let differs = |table: &&XtTable| match before(table) {
        Some(before) => xtables::steady(before) != xtables::steady(table),
        None => !xtables::is_empty(table),
    };
    Firewall {
        nft: changed.iter().copied().map(destroy).chain(made).collect(),
        xtables: new.xtables.iter().filter(differs).cloned().collect(),
        sets: if *old == Firewall::default() { new.sets.clone() } else { Vec::new() },
        ..Firewall::default()
    }
}

fn failure(message: usize, errno: i32, offset: u32) -> FirewallFailure {
    FirewallFailure {
        message: u32::try_from(message).unwrap_or(u32::MAX),
        errno: u32::try_from(errno).unwrap_or(0),
        offset,
        ..FirewallFailure::default()
    }
}

fn nf_tables(messages: &[NftMessage]) -> Result<Vec<FirewallFailure>, ReplayError> {
    if let Some(one) = messages.iter().find(|one| !is_allowed(one)) {
        return Err(ReplayError::Kind(one.kind));
    }
    let socket = Socket::open().map_err(ReplayError::Nft)?;
    let mut left: Vec<(usize, NftMessage)> = messages.iter().cloned().enumerate().collect();
    let mut failures: Vec<FirewallFailure> = Vec::new();
    for _ in 0..TRIES {
        let objections = batch(&socket, &left).map_err(ReplayError::Nft)?;
        if objections.is_empty() {
            return Ok(failures);
        }
        let at = |objection: &Objection| usize::try_from(objection.sequence).ok()?.checked_sub(FIRST);
        let failed: Vec<_> = objections
            .iter()
            .filter_map(|objection| Some((at(objection)?, left.get(at(objection)?)?.0, objection)))
            .collect();
        if failed.is_empty() {
            // It is the batch as a whole that the kernel does not take.
            let errno = objections.first().map_or(libc::EPROTO, |objection| objection.errno);
            failures.push(failure(0, errno, 0));
            return Ok(failures);
        }
        failures
            .extend(failed.iter().map(|(_, message, objection)| failure(*message, objection.errno, objection.offset)));
        let places: HashSet<usize> = failed.iter().map(|(place, ..)| *place).collect();
        left = left.into_iter().enumerate().filter(|(place, _)| !places.contains(place)).map(|(_, one)| one).collect();
        left.iter_mut().for_each(|(_, one)| tables::loosen(one));
    }
    failures.extend(left.first().map(|(message, _)| failure(*message, libc::EAGAIN, 0)));
    Ok(failures)
}

fn is_allowed(one: &NftMessage) -> bool {
    let kinds = [
        message::NEW_TABLE,
        message::NEW_CHAIN,
        message::NEW_RULE,
        message::NEW_SET,
        message::NEW_ELEMENTS,
        message::NEW_OBJECT,
        message::DESTROY_TABLE,
    ];
    u8::try_from(one.kind).is_ok_and(|kind| kinds.contains(&kind)) && u8::try_from(one.family).is_ok()
}

/// The sequence number of the first message; the batch's own begin comes before it.
const FIRST: usize = 2;

/// Sends messages that the kernel takes all or none of.
fn batch(socket: &Socket, messages: &[(usize, NftMessage)]) -> io::Result<Vec<Objection>> {
    let mut bytes = Vec::new();
    put_message(&mut bytes, nft::BATCH_BEGIN, REQUEST, 1, 0, nft::SUBSYSTEM, &[]);
    let mut sequence = 1;
    for (_, one) in messages {
        sequence += 1;
        let (kind, family) = (u8::try_from(one.kind).unwrap_or(0), u8::try_from(one.family).unwrap_or(0));
        let flags = match kind {
            message::NEW_RULE => CREATE | APPEND,
            message::DESTROY_TABLE => 0,
            _ => CREATE,
        };
        let kind = nft::SUBSYSTEM << 8 | u16::from(kind);
        put_message(&mut bytes, kind, REQUEST | flags, sequence, family, 0, &one.attributes);
    }
    put_message(&mut bytes, nft::BATCH_END, REQUEST, sequence + 1, 0, nft::SUBSYSTEM, &[]);
    socket.send(&bytes)?;
    socket.objections()
}

/// The rules cannot be put in.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// No such message belongs to rules.
    #[error("a message of kind {0} makes no rule of nf_tables")]
    Kind(u32),
    /// nfnetlink.
    #[error("cannot make the pod's sets of ipset")]
    IpSet(#[source] io::Error),
    /// nfnetlink.
    #[error("cannot set the pod's nftables rules")]
    Nft(#[source] io::Error),
}

//! The legacy tables of iptables and ip6tables, which x_tables keeps as one block of bytes each (Linux:
//! include/uapi/linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h and netfilter/x_tables.h).

use std::io;
use std::os::fd::OwnedFd;

use bulkhead_protocol::agent::XtTable;
use rustix::net::ipproto::RAW;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::words::printable;
use crate::{MAX_BYTES, Uncarried, rules, sockopt};

/// `XT_TABLE_MAXNAMELEN`.
const NAME: usize = 32;

/// `struct ipt_getinfo`: the name, the hooks, two offsets for each hook, the number of entries and their bytes.
const INFO: usize = 84;

/// `struct ipt_get_entries` before the entries.
const GET_ENTRIES: usize = 40;

/// `struct ipt_replace` before the entries, and where in it the address of the counters is.
const REPLACE: usize = 96;
const REPLACE_COUNTERS: usize = 88;

/// `struct xt_entry_match` and `struct xt_entry_target` before their data: size, name, revision.
const EXTENSION: usize = 32;
const EXTENSION_NAME: usize = 29;

/// `struct xt_get_revision`.
const REVISION: usize = 30;

/// Hooks of a table.
const HOOKS: usize = 5;

/// `-NF_DROP - 1`, which is how a verdict is told from the place that a rule leads to.
const VERDICT_DROP: i32 = -1;
const VERDICT_ACCEPT: i32 = -2;

const SET_REPLACE: i32 = 64;
const GET_INFO: i32 = 64;
const GET_ENTRIES_OPTION: i32 = 65;

/// One of the two kinds.
struct Family {
    address: AddressFamily,
    level: i32,
    program: &'static str,
    names: &'static str,
    /// Where in `struct ipt_entry` the offset of the target is; that of the next entry comes after it.
    target_offset: usize,
    /// Its length.
    entry: usize,
    /// `IPT_SO_GET_REVISION_MATCH`; that of targets comes after it.
    revision_match: i32,
}

// Of the thread: the process's own are those of its first thread's namespace.
const IPV4: Family = Family {
    address: AddressFamily::INET,
    level: libc::SOL_IP,
    program: "iptables",
    names: "/proc/thread-self/net/ip_tables_names",
    target_offset: 88,
    entry: 112,
    revision_match: 66,
};
const IPV6: Family = Family {
    address: AddressFamily::INET6,
    level: libc::SOL_IPV6,
    program: "ip6tables",
    names: "/proc/thread-self/net/ip6_tables_names",
    target_offset: 140,
    entry: 168,
    revision_match: 68,
};

/// The table of arptables, for which there is no use in a pod but filtering.
const ARP_NAMES: &str = "/proc/thread-self/net/arp_tables_names";

/// The tables that the namespace has. A table that is asked for is made, and its module loaded: only those
/// that are there already are asked for.
pub fn dump() -> io::Result<(Vec<XtTable>, Vec<Uncarried>)> {
    let mut tables = Vec::new();
    for family in [IPV4, IPV6] {
        let names = std::fs::read_to_string(family.names).unwrap_or_default();
        if names.is_empty() {
            continue;
        }
        let socket = open(&family)?;
        // The one made last is the first.
        for name in names.lines().rev() {
            tables.push(read(&socket, &family, name)?);
        }
    }
    let arp = std::fs::read_to_string(ARP_NAMES).unwrap_or_default();
    let uncarried =
        arp.lines().map(|name| Uncarried { what: format!("table {} of arptables", printable(name)), security: true });
    Ok((tables, uncarried.collect()))
}

fn open(family: &Family) -> io::Result<OwnedFd> {
    Ok(socket_with(family.address, SocketType::RAW, SocketFlags::CLOEXEC, Some(RAW))?)
}

fn named(name: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(NAME - 1)) {
        *to = from;
    }
    bytes
}

fn word(bytes: &[u8], place: usize) -> u32 {
    bytes.get(place..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_ne_bytes(*word))
}

fn half(bytes: &[u8], place: usize) -> usize {
    bytes.get(place..).and_then(|rest| rest.first_chunk()).map_or(0, |half| usize::from(u16::from_ne_bytes(*half)))
}

fn info(socket: &OwnedFd, family: &Family, name: &str) -> io::Result<Vec<u8>> {
    let mut info = named(name, INFO);
    sockopt::get(socket, family.level, GET_INFO, &mut info)?;
    Ok(info)
}

fn read(socket: &OwnedFd, family: &Family, name: &str) -> io::Result<XtTable> {
    let info = info(socket, family, name)?;
    let size = usize::try_from(word(&info, INFO - 4)).unwrap_or(usize::MAX);
    if size > MAX_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut entries = named(name, GET_ENTRIES + size);
    entries[NAME..NAME + 4].copy_from_slice(&word(&info, INFO - 4).to_ne_bytes());
    // EAGAIN if the table has changed since: whoever sets a pod's network up is done by now.
    sockopt::get(socket, family.level, GET_ENTRIES_OPTION, &mut entries)?;
    let hooks = |place: usize| (0..HOOKS).map(|hook| word(&info, place + 4 * hook)).collect();
    Ok(XtTable {
        ipv6: family.address == AddressFamily::INET6,
        name: name.to_owned(),
        valid_hooks: word(&info, NAME),
        hook_entries: hooks(NAME + 4),
        underflows: hooks(NAME + 24),
        count: word(&info, NAME + 44),
        entries: entries.split_off(GET_ENTRIES),
        ..XtTable::default()
    })
}

/// A match or a target.
struct Extension {
    name: String,
    /// `struct xt_get_revision`.
    revision: Vec<u8>,
    is_target: bool,
    /// Where in the entries it is.
    offset: usize,
    verdict: i32,
}

impl Extension {
    fn at(entries: &[u8], offset: usize, is_target: bool) -> Option<(Self, usize)> {
        let header = entries.get(offset..offset.checked_add(EXTENSION)?)?;
        let revision = header.get(2..2 + REVISION)?.to_vec();
        let name = revision.iter().take(EXTENSION_NAME).take_while(|byte| **byte != 0).copied().collect::<Vec<u8>>();
        let verdict = entries.get(offset + EXTENSION..).and_then(|rest| rest.first_chunk());
        let extension = Self {
            name: String::from_utf8_lossy(&name).into_owned(),
            revision,
            is_target,
            offset,
            verdict: verdict.map_or(0, |verdict| i32::from_ne_bytes(*verdict)),
        };
        Some((extension, half(header, 0)))
    }

    /// The standard target, whose name is empty, and the mark of a chain are everywhere.
    fn is_own(&self) -> bool {
        !(self.is_target && (self.name.is_empty() || self.name == "ERROR"))
    }

    fn acts(&self) -> bool {
        self.is_target
            && if self.name.is_empty() {
                self.verdict == VERDICT_DROP
            } else {
                self.is_own() && !rules::is_harmless(&self.name)
            }
    }
}

/// All matches and targets, as far as the block is one.
fn extensions(family: &Family, entries: &[u8]) -> Vec<Extension> {
    let (mut found, mut start) = (Vec::new(), 0);
    while let Some(entry) = entries.get(start..).filter(|entry| entry.len() >= family.entry) {
        let (target, next) = (half(entry, family.target_offset), half(entry, family.target_offset + 2));
        let mut place = family.entry;
        while place < target {
            let Some((one, size)) = Extension::at(entries, start + place, false) else { break };
            found.push(one);
            place += size.max(EXTENSION);
        }
        found.extend(Extension::at(entries, start + target, true).map(|(one, _)| one));
        start += next.max(family.entry);
    }
    found
}

fn uses(family: &Family, entries: &[u8], is_it: impl Fn(&Extension) -> bool) -> Option<Extension> {
    extensions(family, entries).into_iter().find(is_it)
}

fn family(table: &XtTable) -> Family {
    if table.ipv6 { IPV6 } else { IPV4 }
}

/// Whether a table lets everything pass: an entry that accepts for each of its hooks, and one that marks the end.
pub fn is_empty(table: &XtTable) -> bool {
    let hooks = table.valid_hooks.count_ones();
    table.count == hooks + 1
        && extensions(&family(table), &table.entries)
            .iter()
            .all(|one| one.name == "ERROR" || one.verdict == VERDICT_ACCEPT)
}

/// A table without the counts of its entries, with which the fixed part of each ends.
pub fn steady(table: &XtTable) -> XtTable {
    const COUNTERS: usize = 16;
    let (family, mut steady, mut start) = (family(table), table.clone(), 0);
    while let Some(entry) = steady.entries.get_mut(start..).filter(|entry| entry.len() >= family.entry) {
        let next = half(entry, family.target_offset + 2);
        if let Some(counters) = entry.get_mut(family.entry - COUNTERS..family.entry) {
            counters.fill(0);
        }
        start += next.max(family.entry);
    }
    steady
}

fn acts(table: &XtTable) -> bool {
    uses(&family(table), &table.entries, Extension::acts).is_some()
}

fn describe(table: &XtTable) -> String {
    format!("table {} of {}", printable(&table.name), family(table).program)
}

/// Puts a table in. If the kernel does not take it: why, and where in the entries is what it has not.
pub fn replay(table: &XtTable) -> Option<(i32, u32)> {
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EINVAL);
    let family = family(table);
    let socket = match open(&family) {
        Ok(socket) => socket,
        Err(error) => return Some((errno(error), 0)),
    };
    let error = errno(replace(&socket, &family, table).err()?);
    let missing = uses(&family, &table.entries, |one| one.is_own() && !knows(&socket, &family, one));
    Some((error, missing.and_then(|one| u32::try_from(one.offset).ok()).unwrap_or(0)))
}

fn replace(socket: &OwnedFd, family: &Family, table: &XtTable) -> io::Result<()> {
    let info = info(socket, family, &table.name)?;
    // As many as the table has now, which is how the kernel knows that it has not changed.
    let old = word(&info, NAME + 44);
    let mut counters = vec![[0_u64; 2]; usize::try_from(old).map_err(io::Error::other)?];
    let mut value = named(&table.name, NAME);
    let size = u32::try_from(table.entries.len()).map_err(io::Error::other)?;
    let hooks = |list: &[u32]| (0..HOOKS).map(|hook| list.get(hook).copied().unwrap_or(0)).collect::<Vec<u32>>();
    let words =
        [vec![table.valid_hooks, table.count, size], hooks(&table.hook_entries), hooks(&table.underflows), vec![old]];
    for word in words.concat() {
        value.extend_from_slice(&word.to_ne_bytes());
    }
    value.resize(REPLACE, 0);
    value.extend_from_slice(&table.entries);
    sockopt::replace(socket, family.level, SET_REPLACE, &mut value, REPLACE_COUNTERS, &mut counters)
}

fn knows(socket: &OwnedFd, family: &Family, one: &Extension) -> bool {
    let option = family.revision_match + i32::from(one.is_target);
    sockopt::get(socket, family.level, option, &mut one.revision.clone()).is_ok()
}

/// A table that the guest did not take.
pub fn failure(table: &XtTable, offset: u32, reason: &io::Error) -> Uncarried {
    let offset = usize::try_from(offset).unwrap_or(0);
    let missing = uses(&family(table), &table.entries, |one| one.offset == offset);
    let reason = match missing.filter(|_| offset > 0) {
        Some(one) => format!(
            "the guest's kernel has no {} \"{}\"",
            if one.is_target { "target" } else { "match" },
            printable(&one.name)
        ),
        None => format!("the guest's kernel does not take it: {reason}"),
    };
    Uncarried { what: format!("{} ({reason})", describe(table)), security: acts(table) }
}

//! Sets of ipset (Linux: include/uapi/linux/netfilter/ipset/ip_set.h). Extensions of x_tables name them by their number in the
//! namespace, so they get the same numbers.

use std::io;

use bulkhead_protocol::agent::IpSet;

use crate::attributes::{self, NESTED, NETWORK_ORDER, all, find, keep, put, put_nested, put_number, text};
use crate::modules::would_load;
use crate::netlink::{ACK, CREATE, EXCLUSIVE, Socket};
use crate::words::printable;
use crate::{MAX_BYTES, Uncarried};

const SUBSYSTEM: u16 = 6;

/// `IPSET_CMD_*`.
const CMD_CREATE: u16 = 2;
const CMD_DESTROY: u16 = 3;
const CMD_LIST: u16 = 7;
const CMD_ADD: u16 = 9;
const CMD_GET_BY_NAME: u16 = 14;

/// `IPSET_ATTR_*` of a command.
const PROTOCOL: u16 = 1;
const NAME: u16 = 2;
const TYPE: u16 = 3;
const REVISION: u16 = 4;
const FAMILY: u16 = 5;
const DATA: u16 = 7;
const ENTRIES: u16 = 8;
const LINE: u16 = 9;
const INDEX: u16 = 11;

/// What is told of a set beside what it was made with: `IPSET_ATTR_ELEMENTS`, `REFERENCES`, `MEMSIZE`.
const TOLD_ONLY: [u16; 3] = [24, 25, 26];

/// `IPSET_ATTR_IP`, `IP_TO`, `IP2`, `IP2_TO`.
const ADDRESSES: [u16; 4] = [1, 2, 20, 22];

/// `IPSET_PROTOCOL`, of Linux 4.18 and later.
const VERSION: u8 = 7;

/// Any family will do in the header: the sets' own are attributes.
const ANY: u8 = 2;

/// Sets that may be made only to be destroyed again, so that the next one gets its number: `CONFIG_IP_SET_MAX` by default.
const MAX_INDEX: u32 = 256;

/// Numbers that are ipset's own errors.
const PRIVATE_ERRORS: i32 = 4096;

fn request(socket: &mut Socket, command: u16, flags: u16, attributes: &[u8]) -> io::Result<Vec<u8>> {
    socket.ask(SUBSYSTEM << 8 | command, ANY, flags, attributes)
}

fn begin(name: &str) -> Vec<u8> {
    let mut attributes = Vec::new();
    put(&mut attributes, PROTOCOL, &[VERSION]);
    put(&mut attributes, NAME, &[name.as_bytes(), &[0]].concat());
    attributes
}

/// The sets of the namespace.
pub fn dump() -> io::Result<Vec<IpSet>> {
    if would_load("nfnetlink") || would_load("ip_set") {
        return Ok(Vec::new());
    }
    let mut socket = match Socket::open() {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut version = Vec::new();
    put(&mut version, PROTOCOL, &[VERSION]);
    let told = match socket.dump(SUBSYSTEM << 8 | CMD_LIST, ANY, &version) {
        // nfnetlink without ipset.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
        told => told?.unwrap_or_default(),
    };
    let mut sets: Vec<IpSet> = Vec::new();
    for one in &told {
        let attributes = one.attributes();
        let Some(name) = text(attributes, NAME) else { continue };
        if find(attributes, TYPE).is_some() {
            let index = index(&mut socket, &name)?;
            sets.push(IpSet { index, create: create(attributes), name: name.clone(), ..IpSet::default() });
        }
        let entries = find(attributes, ENTRIES).filter(|entries| !entries.is_empty());
        if let (Some(entries), Some(set)) = (entries, sets.iter_mut().find(|set| set.name == name)) {
            let mut add = begin(&name);
            put_number(&mut add, LINE, 0);
            put_nested(&mut add, ENTRIES, &attributes::map(entries, |raw, entry| (raw, addressed(entry))));
            set.add.push(add);
        }
    }
    sets.sort_by_key(|set| set.index);
    if sets.iter().map(size).sum::<usize>() > MAX_BYTES { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(sets) }
}

/// Bytes of a set.
pub fn size(set: &IpSet) -> usize {
    set.create.len() + set.add.iter().map(Vec::len).sum::<usize>()
}

fn create(told: &[u8]) -> Vec<u8> {
    let mut attributes = keep(told, &[PROTOCOL, NAME, TYPE, REVISION, FAMILY]);
    let data = find(told, DATA).unwrap_or(&[]);
    let made_with: Vec<u16> =
        all(data).map(|attribute| attribute.kind()).filter(|kind| !TOLD_ONLY.contains(kind)).collect();
    put_nested(&mut attributes, DATA, &addressed(&keep(data, &made_with)));
    attributes
}

/// The kernel tells addresses without the flag by which it wants to be told that they are in network order.
fn addressed(data: &[u8]) -> Vec<u8> {
    let in_order = |raw: u16, value: &[u8]| (raw | NETWORK_ORDER, value.to_vec());
    attributes::map(data, |raw, value| match raw & !NESTED {
        kind if raw & NESTED != 0 && ADDRESSES.contains(&kind) => (raw, attributes::map(value, in_order)),
        _ => (raw, value.to_vec()),
    })
}

fn index(socket: &mut Socket, name: &str) -> io::Result<u32> {
    let answer = request(socket, CMD_GET_BY_NAME, 0, &begin(name))?;
    let index = find(&answer, INDEX).and_then(|value| value.try_into().ok()).map(u16::from_be_bytes);
    index.map(u32::from).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Makes the sets, in the order of their numbers. Answers with those that the kernel does not take, and why.
pub fn replay(sets: &[IpSet]) -> io::Result<Vec<(usize, i32)>> {
    if sets.is_empty() {
        return Ok(Vec::new());
    }
    let mut socket = Socket::open()?;
    let (mut failures, mut fillers) = (Vec::new(), Vec::new());
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EPROTO);
    for (place, set) in sets.iter().enumerate() {
        // One of an earlier try that was given up.
        let _ = request(&mut socket, CMD_DESTROY, ACK, &begin(&set.name));
        if let Err(error) = make(&mut socket, set, &mut fillers) {
            failures.push((place, errno(error)));
        }
    }
    for filler in fillers {
        request(&mut socket, CMD_DESTROY, ACK, &begin(&filler))?;
    }
    // When all are there: some have others as members.
    for (place, set) in sets.iter().enumerate() {
        if failures.iter().any(|(failed, _)| *failed == place) {
            continue;
        }
        for add in &set.add {
            if let Err(error) = request(&mut socket, CMD_ADD, ACK | EXCLUSIVE, add) {
                failures.push((place, errno(error)));
                break;
            }
        }
    }
    Ok(failures)
}

/// Makes a set with its number: the kernel gives the least one that is free, so those below are taken until all are there.
fn make(socket: &mut Socket, set: &IpSet, fillers: &mut Vec<String>) -> io::Result<()> {
    loop {
        request(socket, CMD_CREATE, ACK | CREATE | EXCLUSIVE, &set.create)?;
        let got = index(socket, &set.name)?;
        if got == set.index {
            return Ok(());
        }
        request(socket, CMD_DESTROY, ACK, &begin(&set.name))?;
        if got > set.index || got >= MAX_INDEX {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let filler = format!("bulkhead-{got}");
        let mut create = begin(&filler);
        create.extend(keep(&set.create, &[TYPE, REVISION, FAMILY, DATA]));
        request(socket, CMD_CREATE, ACK | CREATE | EXCLUSIVE, &create)?;
        fillers.push(filler);
    }
}

/// A set that the guest did not take.
pub fn failure(set: &IpSet, errno: i32, security: bool) -> Uncarried {
    let kind = printable(&text(&set.create, TYPE).unwrap_or_default());
    let reason = match errno {
        PRIVATE_ERRORS.. => format!("ipset error {errno}"),
        _ => io::Error::from_raw_os_error(errno).to_string(),
    };
    let name = printable(&set.name);
    Uncarried { what: format!("ipset {name} (the guest's kernel does not take its type {kind}: {reason})"), security }
}

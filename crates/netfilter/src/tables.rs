//! The tables of nf_tables as they were told, and the messages that make them again.

use std::collections::HashSet;

use bulkhead_protocol::agent::NftMessage;

use crate::attributes::{self, Attribute, all, find, keep, map, number, put, put_nested, put_number, text};
use crate::netlink::Message;
use crate::nft::{self, chain, data, elements, flowtable, message, object, rule, set, table};
use crate::{Uncarried, rules, words};

/// Bytes of elements in one message: an attribute, which their list is, has less than 64 KiB.
const ELEMENTS: usize = 32 << 10;

/// Why a chain is left out.
const AT_INGRESS: &str = "at an interface's ingress";

/// All that was told, or what of it belongs to one table.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub tables: Vec<Message>,
    pub chains: Vec<Message>,
    pub sets: Vec<Message>,
    pub elements: Vec<Message>,
    pub objects: Vec<Message>,
    pub flowtables: Vec<Message>,
    pub rules: Vec<Message>,
}

impl Told {
    fn of(&self, family: u8, name: &str) -> Self {
        // The table's name is the first attribute of every kind.
        let ours =
            |one: &&Message| one.family() == family && text(one.attributes(), table::NAME).as_deref() == Some(name);
        let some = |list: &[Message]| list.iter().filter(ours).cloned().collect();
        Self {
            tables: some(&self.tables),
            chains: some(&self.chains),
            sets: some(&self.sets),
            elements: some(&self.elements),
            objects: some(&self.objects),
            flowtables: some(&self.flowtables),
            rules: some(&self.rules),
        }
    }
}

/// What makes the rules again, and what of them it does not.
#[derive(Debug, Default)]
pub struct Made {
    pub messages: Vec<NftMessage>,
    pub uncarried: Vec<Uncarried>,
}

/// A table's family and name.
pub type Key = (u32, String);

/// The table that a message is about.
pub fn key(message: &NftMessage) -> Key {
    (message.family, text(&message.attributes, table::NAME).unwrap_or_default())
}

/// A message without what changes by itself: counts, and times that pass.
pub fn steady(one: &NftMessage) -> NftMessage {
    let attributes = match u8::try_from(one.kind) {
        Ok(message::NEW_RULE) => rules::steady(&one.attributes),
        Ok(message::NEW_OBJECT) => keep(&one.attributes, &object::STEADY),
        Ok(message::NEW_ELEMENTS) => map(&one.attributes, |raw, value| match raw & !attributes::NESTED {
            elements::LIST => (raw, map(value, |raw, element| (raw, keep(element, &elements::STEADY)))),
            _ => (raw, value.to_vec()),
        }),
        _ => return one.clone(),
    };
    NftMessage { attributes, ..one.clone() }
}

/// Those tables that drop, redirect or rewrite traffic.
pub fn acting(messages: &[NftMessage]) -> HashSet<Key> {
    messages.iter().filter(|message| acts(message.kind, &message.attributes)).map(key).collect()
}

fn acts(kind: u32, attributes: &[u8]) -> bool {
    match u8::try_from(kind) {
        Ok(message::NEW_CHAIN) => number(attributes, chain::POLICY) == Some(data::DROP),
        Ok(message::NEW_RULE) => rules::acts(attributes),
        Ok(message::NEW_ELEMENTS) => {
            let verdict =
                |element: Attribute<'_>| find(find(element.value, elements::DATA)?, data::VERDICT).map(rules::is_drop);
            all(find(attributes, elements::LIST).unwrap_or(&[])).any(|element| verdict(element) == Some(true))
        }
        _ => false,
    }
}

/// Makes messages of what was told. `name_of` knows the interfaces by their numbers.
pub fn made(told: &Told, name_of: &dyn Fn(u32) -> Option<String>) -> Made {
    let mut made = Made::default();
    for one in &told.tables {
        let Some(name) = text(one.attributes(), table::NAME) else { continue };
        let mut table = Table::new(one.family(), told.of(one.family(), &name), name_of);
        table.make(one);
        made.messages.append(&mut table.messages);
        made.uncarried.append(&mut table.uncarried);
    }
    made
}

/// A table on its way.
struct Table<'a> {
    family: u8,
    told: Told,
    name_of: &'a dyn Fn(u32) -> Option<String>,
    acts: bool,
    messages: Vec<NftMessage>,
    uncarried: Vec<Uncarried>,
}

impl<'a> Table<'a> {
    fn new(family: u8, told: Told, name_of: &'a dyn Fn(u32) -> Option<String>) -> Self {
        let parts = [
            (message::NEW_CHAIN, &told.chains),
            (message::NEW_RULE, &told.rules),
            (message::NEW_ELEMENTS, &told.elements),
        ];
        let acts = parts.iter().any(|(kind, list)| list.iter().any(|one| acts(u32::from(*kind), one.attributes())));
        Self { family, told, name_of, acts, messages: Vec::new(), uncarried: Vec::new() }
    }

    fn make(&mut self, told: &Message) {
        if self.family == nft::NFPROTO_NETDEV {
            return self.leave_out_ingress();
        }
        let mut attributes = keep(told.attributes(), &[table::NAME, table::USERDATA]);
        let flags = number(told.attributes(), table::FLAGS).unwrap_or(0) & table::DORMANT;
        put_number(&mut attributes, table::FLAGS, flags);
        self.push(message::NEW_TABLE, attributes);
        self.chains();
        self.sets();
        for one in std::mem::take(&mut self.told.objects) {
            self.push(message::NEW_OBJECT, keep(one.attributes(), &object::TAKEN));
        }
        self.elements();
        for one in std::mem::take(&mut self.told.flowtables) {
            // Only faster than without: a packet that it would take goes the way of the first one.
            let name = text(one.attributes(), flowtable::NAME).unwrap_or_default();
            self.leave_out(message::NEW_FLOWTABLE, one.attributes(), &format!("flowtable {name}"), false);
        }
        self.rules();
    }

    /// A table of family netdev. Frames of the guest leave by the interface on the host, and pass its egress there; those to
    /// the guest have left for it before they come to the ingress.
    fn leave_out_ingress(&mut self) {
        for one in std::mem::take(&mut self.told.chains) {
            if at_ingress(self.family, one.attributes()) {
                self.leave_out(message::NEW_CHAIN, one.attributes(), AT_INGRESS, self.acts);
            }
        }
    }

    fn push(&mut self, kind: u8, attributes: Vec<u8>) {
        let (kind, family) = (u32::from(kind), u32::from(self.family));
        self.messages.push(NftMessage { kind, family, attributes, ..NftMessage::default() });
    }

    fn leave_out(&mut self, kind: u8, attributes: &[u8], reason: &str, security: bool) {
        let message = NftMessage {
            kind: u32::from(kind),
            family: u32::from(self.family),
            attributes: attributes.to_vec(),
            ..NftMessage::default()
        };
        self.uncarried.push(Uncarried { what: format!("{} ({reason})", words::message(&message)), security });
    }

    fn chains(&mut self) {
        let all = std::mem::take(&mut self.told.chains);
        let mut left_out = HashSet::new();
        for one in &all {
            let attributes = one.attributes();
            let offloaded = number(attributes, chain::FLAGS).unwrap_or(0) & chain::OFFLOAD != 0;
            if offloaded || at_ingress(self.family, attributes) {
                left_out.insert(text(attributes, chain::NAME));
                self.leave_out(message::NEW_CHAIN, attributes, AT_INGRESS, self.acts);
                continue;
            }
            let taken =
                [chain::TABLE, chain::NAME, chain::HOOK, chain::POLICY, chain::TYPE, chain::FLAGS, chain::USERDATA];
            self.push(message::NEW_CHAIN, keep(attributes, &taken));
        }
        self.told.rules.retain(|one| !left_out.contains(&text(one.attributes(), rule::CHAIN)));
        self.told.chains = all;
    }

    fn sets(&mut self) {
        for (number, one) in (1..).zip(self.told.sets.clone()) {
            let mut attributes = keep(one.attributes(), &set::TAKEN);
            // For who makes a set and refers to it in one batch, which the kernel asks of everybody.
            put_number(&mut attributes, set::ID, number);
            self.push(message::NEW_SET, attributes);
        }
    }

    /// The kernel tells a set's intervals from the last one's end to the first one's beginning, and takes them from the first
    /// one's beginning on. Intervals of several fields come whole; where there are none the order is all the same.
    fn elements(&mut self) {
        let mut of_set: Vec<(Option<String>, Vec<Vec<u8>>)> = Vec::new();
        for one in std::mem::take(&mut self.told.elements) {
            let set = text(one.attributes(), elements::SET);
            let list = all(find(one.attributes(), elements::LIST).unwrap_or(&[])).map(|element| element.value.to_vec());
            match of_set.last_mut() {
                Some((last, all)) if *last == set => all.extend(list),
                _ => of_set.push((set, list.collect())),
            }
        }
        for (set, mut list) in of_set {
            if self.has_ends(set.as_deref()) {
                list.reverse();
            }
            let mut some = Vec::new();
            for element in list {
                if some.len() + element.len() > ELEMENTS {
                    self.push_elements(set.as_deref(), &std::mem::take(&mut some));
                }
                put_nested(&mut some, nft::LIST_ELEMENT, &element);
            }
            if !some.is_empty() {
                self.push_elements(set.as_deref(), &some);
            }
        }
    }

    /// Whether the ends of a set's intervals are elements of their own.
    fn has_ends(&self, set: Option<&str>) -> bool {
        let told = self.told.sets.iter().find(|one| text(one.attributes(), set::NAME).as_deref() == set);
        let flags = told.and_then(|one| number(one.attributes(), set::FLAGS)).unwrap_or(0);
        flags & set::INTERVAL != 0 && flags & set::CONCATENATED == 0
    }

    fn push_elements(&mut self, set: Option<&str>, list: &[u8]) {
        let mut attributes = Vec::new();
        let table = self.told.tables.first().and_then(|one| find(one.attributes(), table::NAME)).unwrap_or(&[]);
        put(&mut attributes, elements::TABLE, table);
        put(&mut attributes, elements::SET, &[set.unwrap_or_default().as_bytes(), &[0]].concat());
        put_nested(&mut attributes, elements::LIST, list);
        self.push(message::NEW_ELEMENTS, attributes);
    }

    /// The rules of a chain that is a part of a rule come before that rule, for afterwards the chain takes none any more.
    fn rules(&mut self) {
        let all = std::mem::take(&mut self.told.rules);
        let is_part = |one: &Message| number(one.attributes(), chain::FLAGS).unwrap_or(0) & chain::BINDING != 0;
        let name = |one: &Message| text(one.attributes(), chain::NAME).unwrap_or_default();
        let mut parts: HashSet<String> = self.told.chains.iter().filter(|one| is_part(one)).map(name).collect();
        let before = self.uncarried.len();
        for one in std::mem::take(&mut self.told.chains).iter().filter(|one| !is_part(one)) {
            self.rules_of(&name(one), &all, &mut parts);
        }
        if self.uncarried.len() > before {
            self.messages.iter_mut().for_each(loosen);
        }
    }

    fn rules_of(&mut self, chain: &str, all: &[Message], parts: &mut HashSet<String>) {
        let ours = all.iter().filter(|one| text(one.attributes(), rule::CHAIN).as_deref() == Some(chain));
        for (number, one) in (1..).zip(ours) {
            for target in rules::targets(one.attributes()) {
                if parts.remove(&target) {
                    self.rules_of(&target, all, parts);
                }
            }
            if rules::is_offload(one.attributes()) {
                // Told with its flowtable.
                continue;
            }
            match rules::translated(one.attributes(), self.name_of) {
                Ok(attributes) => self.push(message::NEW_RULE, attributes),
                Err(reason) => {
                    let reason = format!("number {number}: {reason}");
                    self.leave_out(message::NEW_RULE, one.attributes(), &reason, self.acts);
                }
            }
        }
    }
}

fn at_ingress(family: u8, chain: &[u8]) -> bool {
    let hook = find(chain, chain::HOOK).and_then(|hook| number(hook, chain::HOOK_NUMBER));
    match family {
        nft::NFPROTO_NETDEV => hook == Some(nft::NETDEV_INGRESS),
        nft::NFPROTO_INET => hook == Some(nft::INET_INGRESS),
        _ => false,
    }
}

/// Makes a set or a chain that is a part of one rule one of its own: without that rule the kernel would not take it.
pub fn loosen(one: &mut NftMessage) {
    let (kind, flag) = match u8::try_from(one.kind) {
        Ok(message::NEW_SET) => (set::FLAGS, set::ANONYMOUS),
        Ok(message::NEW_CHAIN) => (chain::FLAGS, chain::BINDING),
        _ => return,
    };
    let Some(flags) = number(&one.attributes, kind) else { return };
    let others: Vec<u16> =
        all(&one.attributes).map(|attribute| attribute.kind()).filter(|other| *other != kind).collect();
    one.attributes = keep(&one.attributes, &others);
    put_number(&mut one.attributes, kind, flags & !flag);
}

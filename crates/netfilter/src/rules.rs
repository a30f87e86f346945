//! What has to be known of a rule of nf_tables: whether it means the same in another namespace, what it refers to, and
//! whether it does more than count and mark.

use crate::attributes::{self, all, find, keep, number, put, put_nested, put_number, put_text, text};
use crate::nft::{LIST_ELEMENT, data, expression, rule};

/// Targets of x_tables that let a packet through as it is, but for marks and header fields that routing does not look at.
const HARMLESS: [&str; 15] = [
    "AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "DSCP", "HL", "LED", "LOG", "MARK", "NFLOG", "TCPMSS", "TOS", "TRACE",
    "TTL", "ULOG",
];

/// Expressions that drop, redirect or rewrite, or leave it to somebody else to do so.
const ACTING: [&str; 9] = ["dup", "fwd", "masq", "nat", "queue", "redir", "reject", "synproxy", "tproxy"];

/// Index of the loopback interface in every namespace.
const LOOPBACK: u32 = 1;

/// `IFNAMSIZ`.
const NAME_SIZE: usize = 16;

/// An expression of a rule.
pub struct Expression<'a> {
    pub name: String,
    data: &'a [u8],
    /// The list's element that it is, as a part of the rule's attributes.
    start: usize,
    end: usize,
}

impl Expression<'_> {
    /// Whether this place of the rule's attributes is in it.
    pub fn covers(&self, place: usize) -> bool {
        (self.start..self.end).contains(&place)
    }

    /// Its name, with that of the extension of x_tables that it may be.
    pub fn full_name(&self) -> String {
        match (self.name.as_str(), text(self.data, expression::XT_NAME)) {
            ("match", Some(name)) => format!("match {name}"),
            ("target", Some(name)) => format!("target {name}"),
            _ => self.name.clone(),
        }
    }

    fn key(&self) -> Option<u32> {
        number(self.data, expression::KEY)
    }

    fn register(&self) -> Option<u32> {
        number(self.data, expression::REGISTER)
    }

    fn verdict(&self) -> Option<&[u8]> {
        if self.name != "immediate" {
            return None;
        }
        find(find(self.data, expression::IMMEDIATE_DATA)?, data::VERDICT)
    }

    /// What the register is compared with, if this is such a comparison, and whether the two must be equal.
    fn compared(&self, register: Option<u32>) -> Option<(u32, &[u8])> {
        if self.name != "cmp" || number(self.data, expression::CMP_REGISTER) != register {
            return None;
        }
        let operation = number(self.data, expression::CMP_OPERATION)?;
        let is_equality = matches!(operation, expression::CMP_EQ | expression::CMP_NEQ);
        let value = find(find(self.data, expression::CMP_DATA)?, data::VALUE)?;
        is_equality.then_some((operation, value))
    }
}

/// The expressions of a rule.
pub fn expressions(attributes: &[u8]) -> Vec<Expression<'_>> {
    let Some(list) = all(attributes).find(|attribute| attribute.kind() == rule::EXPRESSIONS) else { return Vec::new() };
    let base = list.offset + attributes::HEADER;
    let elements = all(list.value).filter(|element| element.kind() == LIST_ELEMENT);
    let parsed = elements.map(|element| Expression {
        name: text(element.value, expression::NAME).unwrap_or_default(),
        data: find(element.value, expression::DATA).unwrap_or(&[]),
        start: base + element.offset,
        end: base + element.offset + attributes::HEADER + element.value.len(),
    });
    parsed.collect()
}

/// A rule without what its expressions count.
pub fn steady(rule: &[u8]) -> Vec<u8> {
    let kept = |one: &[u8]| match text(one, expression::NAME).as_deref() {
        Some("counter" | "last") => keep(one, &[expression::NAME]),
        // NFTA_QUOTA_BYTES and _FLAGS, without what is consumed.
        Some("quota") => {
            let mut quota = keep(one, &[expression::NAME]);
            put_nested(&mut quota, expression::DATA, &keep(find(one, expression::DATA).unwrap_or(&[]), &[1, 2]));
            quota
        }
        _ => one.to_vec(),
    };
    attributes::map(rule, |raw, value| match raw & !attributes::NESTED {
        rule::EXPRESSIONS => (raw, attributes::map(value, |raw, one| (raw, kept(one)))),
        _ => (raw, value.to_vec()),
    })
}

/// The chains that a rule leads to.
pub fn targets(attributes: &[u8]) -> Vec<String> {
    let leads = |expression: &Expression<'_>| text(expression.verdict()?, data::VERDICT_CHAIN);
    expressions(attributes).iter().filter_map(leads).collect()
}

/// Whether a rule drops, redirects or rewrites traffic.
pub fn acts(attributes: &[u8]) -> bool {
    expressions(attributes).iter().any(|expression| {
        expression.verdict().is_some_and(is_drop)
            || ACTING.contains(&expression.name.as_str())
            || (expression.name == "target"
                && !is_harmless(&text(expression.data, expression::XT_NAME).unwrap_or_default()))
    })
}

/// Whether a rule hands connections to a flowtable.
pub fn is_offload(attributes: &[u8]) -> bool {
    expressions(attributes).iter().any(|expression| expression.name == "flow_offload")
}

/// Whether a target of x_tables is one that lets traffic be.
pub fn is_harmless(target: &str) -> bool {
    HARMLESS.contains(&target)
}

/// Whether a verdict takes the packet away.
pub fn is_drop(verdict: &[u8]) -> bool {
    number(verdict, data::VERDICT_CODE).is_some_and(|code| code == data::DROP || code & 0xff == data::QUEUE)
}

/// A rule in words that another namespace understands as this one does, or what in it nobody else would.
pub fn translated(rule: &[u8], name_of: impl Fn(u32) -> Option<String>) -> Result<Vec<u8>, String> {
    let expressions = expressions(rule);
    let mut list = Vec::new();
    let mut at = 0;
    while let Some(one) = expressions.get(at) {
        let next = expressions.get(at + 1);
        let index = interface_index(one);
        let compared = next.and_then(|next| next.compared(one.register()));
        let number = compared.and_then(|(_, value)| Some(u32::from_ne_bytes(value.try_into().ok()?)));
        match (index, number) {
            (None, _) | (Some(_), Some(0 | LOOPBACK)) => copy(&mut list, rule, one),
            (Some(Some(by_name)), Some(number)) => {
                let name = name_of(number).ok_or_else(|| format!("interface number {number}, which is not there"))?;
                let operation = compared.map_or(expression::CMP_EQ, |(operation, _)| operation);
                by_interface_name(&mut list, one.register().unwrap_or(0), by_name, operation, &name);
                at += 1;
            }
            (Some(_), _) => return Err("an interface by its number, which is another one in the guest".to_owned()),
        }
        if one.name == "socket" && number_is(one.data, expression::SOCKET_KEY, expression::SOCKET_CGROUP) {
            return Err("a cgroup of the host".to_owned());
        }
        at += 1;
    }
    let mut made = attributes::keep(rule, &[rule::TABLE, rule::CHAIN]);
    put_nested(&mut made, rule::EXPRESSIONS, &list);
    if let Some(compat) = compat(&expressions) {
        put_nested(&mut made, rule::COMPAT, &compat);
    }
    made.extend(attributes::keep(rule, &[rule::USERDATA]));
    Ok(made)
}

fn number_is(bytes: &[u8], kind: u16, value: u32) -> bool {
    number(bytes, kind) == Some(value)
}

/// Whether an expression yields an interface's number, and if so the key of `meta` that yields its name instead.
fn interface_index(one: &Expression<'_>) -> Option<Option<u32>> {
    match (one.name.as_str(), one.key()) {
        ("meta", Some(expression::META_IIF)) => Some(Some(expression::META_IIFNAME)),
        ("meta", Some(expression::META_OIF)) => Some(Some(expression::META_OIFNAME)),
        ("meta", Some(expression::META_SDIF)) | ("fib", Some(expression::FIB_OIF)) => Some(None),
        _ => None,
    }
}

fn copy(list: &mut Vec<u8>, rule: &[u8], one: &Expression<'_>) {
    list.extend_from_slice(rule.get(one.start..one.end).unwrap_or(&[]));
    list.resize(attributes::aligned(list.len()), 0);
}

fn by_interface_name(list: &mut Vec<u8>, register: u32, key: u32, operation: u32, name: &str) {
    let mut padded = [0; NAME_SIZE];
    for (to, from) in padded.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let (mut meta, mut value, mut cmp) = (Vec::new(), Vec::new(), Vec::new());
    put_number(&mut meta, expression::REGISTER, register);
    put_number(&mut meta, expression::KEY, key);
    put(&mut value, data::VALUE, &padded);
    put_number(&mut cmp, expression::CMP_REGISTER, register);
    put_number(&mut cmp, expression::CMP_OPERATION, operation);
    put_nested(&mut cmp, expression::CMP_DATA, &value);
    for (name, data) in [("meta", meta), ("cmp", cmp)] {
        let mut one = Vec::new();
        put_text(&mut one, expression::NAME, name);
        put_nested(&mut one, expression::DATA, &data);
        put_nested(list, LIST_ELEMENT, &one);
    }
}

/// Extensions of x_tables are told the rule's protocol when they are made, which the kernel does not tell again: it is what
/// the rule compares the packet's with.
fn compat(expressions: &[Expression<'_>]) -> Option<Vec<u8>> {
    expressions.iter().find(|one| matches!(one.name.as_str(), "match" | "target"))?;
    let pairs = expressions.iter().zip(expressions.iter().skip(1));
    let protocol = pairs.filter(|(one, _)| one.name == "meta" && one.key() == Some(expression::META_L4PROTO));
    let (operation, protocol) = protocol.filter_map(|(one, next)| next.compared(one.register())).next()?;
    let flags = if operation == expression::CMP_NEQ { rule::COMPAT_INVERTED } else { 0 };
    let mut made = Vec::new();
    put_number(&mut made, rule::COMPAT_PROTOCOL, u32::from(*protocol.first()?));
    put_number(&mut made, rule::COMPAT_FLAGS, flags);
    Some(made)
}

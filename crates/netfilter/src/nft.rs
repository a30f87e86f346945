//! Numbers of nf_tables (Linux: include/uapi/linux/netfilter/nf_tables.h), and of nfnetlink where they are needed for it.

/// The subsystem, the upper byte of a message's type.
pub const SUBSYSTEM: u16 = 10;

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
pub const BATCH_BEGIN: u16 = 0x10;
pub const BATCH_END: u16 = 0x11;

/// Messages: the lower byte of a type. Each that makes something is followed by the one that asks for all of these.
pub mod message {
    pub const NEW_TABLE: u8 = 0;
    pub const NEW_CHAIN: u8 = 3;
    pub const NEW_RULE: u8 = 6;
    pub const NEW_SET: u8 = 9;
    pub const NEW_ELEMENTS: u8 = 12;
    pub const GET_GENERATION: u8 = 16;
    pub const NEW_OBJECT: u8 = 18;
    pub const NEW_FLOWTABLE: u8 = 22;
    pub const DESTROY_TABLE: u8 = 26;
}

/// `NFTA_TABLE_*`.
pub mod table {
    pub const NAME: u16 = 1;
    pub const FLAGS: u16 = 2;
    pub const USERDATA: u16 = 6;
    /// `NFT_TABLE_F_DORMANT`, the one flag that is not about the process that owns the table.
    pub const DORMANT: u32 = 1;
}

/// `NFTA_CHAIN_*`.
pub mod chain {
    pub const TABLE: u16 = 1;
    pub const NAME: u16 = 3;
    pub const HOOK: u16 = 4;
    pub const POLICY: u16 = 5;
    pub const TYPE: u16 = 7;
    pub const FLAGS: u16 = 10;
    pub const USERDATA: u16 = 12;
    /// `NFTA_HOOK_*`.
    pub const HOOK_NUMBER: u16 = 1;
    /// `NFT_CHAIN_HW_OFFLOAD`.
    pub const OFFLOAD: u32 = 2;
    /// `NFT_CHAIN_BINDING`: the chain is a part of one rule.
    pub const BINDING: u32 = 4;
}

/// `NFTA_RULE_*`.
pub mod rule {
    pub const TABLE: u16 = 1;
    pub const CHAIN: u16 = 2;
    pub const EXPRESSIONS: u16 = 4;
    pub const COMPAT: u16 = 5;
    pub const USERDATA: u16 = 7;
    /// `NFTA_RULE_COMPAT_*`.
    pub const COMPAT_PROTOCOL: u16 = 1;
    pub const COMPAT_FLAGS: u16 = 2;
    /// `NFT_RULE_COMPAT_F_INV`.
    pub const COMPAT_INVERTED: u32 = 2;
}

/// `NFTA_SET_*`.
pub mod set {
    pub const TABLE: u16 = 1;
    pub const NAME: u16 = 2;
    pub const FLAGS: u16 = 3;
    pub const ID: u16 = 10;
    /// All but the handle, and but what later kernels tell of a set's implementation.
    pub const TAKEN: [u16; 16] = [TABLE, NAME, FLAGS, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18, ID];
    /// `NFT_SET_ANONYMOUS`: the set is a part of one rule.
    pub const ANONYMOUS: u32 = 1;
    /// `NFT_SET_INTERVAL` and `NFT_SET_CONCAT`.
    pub const INTERVAL: u32 = 4;
    pub const CONCATENATED: u32 = 0x80;
}

/// `NFTA_SET_ELEM_LIST_*` and `NFTA_SET_ELEM_*`.
pub mod elements {
    pub const TABLE: u16 = 1;
    pub const SET: u16 = 2;
    pub const LIST: u16 = 3;
    pub const DATA: u16 = 2;
    /// `NFTA_SET_ELEM_KEY`, `DATA`, `FLAGS`, `TIMEOUT`, `USERDATA`, `OBJREF` and `KEY_END`: no expirations and counts.
    pub const STEADY: [u16; 7] = [1, DATA, 3, 4, 6, 9, 10];
}

/// `NFTA_OBJ_*`.
pub mod object {
    pub const TABLE: u16 = 1;
    pub const NAME: u16 = 2;
    pub const TAKEN: [u16; 5] = [TABLE, NAME, 3, 4, 8];
    /// Without `NFTA_OBJ_DATA`, which counts.
    pub const STEADY: [u16; 4] = [TABLE, NAME, 3, 8];
}

/// `NFTA_FLOWTABLE_*`.
pub mod flowtable {
    pub const NAME: u16 = 2;
}

/// `NFTA_LIST_ELEM`.
pub const LIST_ELEMENT: u16 = 1;

/// `NFTA_EXPR_*`, and those of the expressions that are looked into.
pub mod expression {
    pub const NAME: u16 = 1;
    pub const DATA: u16 = 2;
    /// `NFTA_META_DREG`, `NFTA_FIB_DREG`.
    pub const REGISTER: u16 = 1;
    /// `NFTA_META_KEY`, `NFTA_FIB_RESULT`.
    pub const KEY: u16 = 2;
    pub const META_IIF: u32 = 4;
    pub const META_OIF: u32 = 5;
    pub const META_IIFNAME: u32 = 6;
    pub const META_OIFNAME: u32 = 7;
    pub const META_L4PROTO: u32 = 16;
    pub const META_SDIF: u32 = 33;
    /// `NFT_FIB_RESULT_OIF`.
    pub const FIB_OIF: u32 = 1;
    /// `NFTA_SOCKET_KEY` and `NFT_SOCKET_CGROUPV2`.
    pub const SOCKET_KEY: u16 = 1;
    pub const SOCKET_CGROUP: u32 = 3;
    /// `NFTA_CMP_*`.
    pub const CMP_REGISTER: u16 = 1;
    pub const CMP_OPERATION: u16 = 2;
    pub const CMP_DATA: u16 = 3;
    pub const CMP_EQ: u32 = 0;
    pub const CMP_NEQ: u32 = 1;
    /// `NFTA_IMMEDIATE_DATA`.
    pub const IMMEDIATE_DATA: u16 = 2;
    /// `NFTA_MATCH_NAME`, `NFTA_TARGET_NAME`.
    pub const XT_NAME: u16 = 1;
}

/// `NFTA_DATA_*` and `NFTA_VERDICT_*`.
pub mod data {
    pub const VALUE: u16 = 1;
    pub const VERDICT: u16 = 2;
    pub const VERDICT_CODE: u16 = 1;
    pub const VERDICT_CHAIN: u16 = 2;
    /// `NF_DROP` and `NF_QUEUE`; the upper bits of the latter say which.
    pub const DROP: u32 = 0;
    pub const QUEUE: u32 = 3;
}

/// Families of linux/netfilter.h whose chains may hang at an interface.
pub const NFPROTO_INET: u8 = 1;
pub const NFPROTO_NETDEV: u8 = 5;

/// `NF_INET_INGRESS`, and `NF_NETDEV_INGRESS` of the family netdev.
pub const INET_INGRESS: u32 = 5;
pub const NETDEV_INGRESS: u32 = 0;

/// A family as nft(8) calls it.
pub fn family(number: u8) -> &'static str {
    match number {
        NFPROTO_INET => "inet",
        2 => "ip",
        3 => "arp",
        NFPROTO_NETDEV => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "unknown",
    }
}

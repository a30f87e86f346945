//! Header of a forwarded connection: what somebody in the pod's network namespace on the host dialled at localhost goes to
//! localhost in the guest, one vsock connection each to [`AGENT_FORWARD_PORT`](crate::guest::AGENT_FORWARD_PORT).
//!
//! The host sends a [`Target`], three bytes. The guest answers with one byte, [`CONNECTED`] or [`REFUSED`], and then the
//! connection carries the bytes of both directions; a half-close ends one.

/// Something in the guest listens there and has accepted.
pub const CONNECTED: u8 = 0;
/// Nothing in the guest listens there.
pub const REFUSED: u8 = 1;
/// Bytes of an encoded target.
pub const TARGET_LEN: usize = 3;

const IPV4: u8 = 4;
const IPV6: u8 = 6;

/// Where a connection was dialled to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Target {
    /// `::1` rather than `127.0.0.1`. The guest tries this family first; a server that listens on the other is as good.
    pub ipv6: bool,
    /// TCP port.
    pub port: u16,
}

impl Target {
    /// The family as a digit, then the port, little-endian.
    pub fn encode(self) -> [u8; TARGET_LEN] {
        let [low, high] = self.port.to_le_bytes();
        [if self.ipv6 { IPV6 } else { IPV4 }, low, high]
    }

    /// Decodes what [`Self::encode`] made.
    pub fn decode([family, low, high]: [u8; TARGET_LEN]) -> Result<Self, UnknownFamily> {
        let ipv6 = match family {
            IPV4 => false,
            IPV6 => true,
            other => return Err(UnknownFamily(other)),
        };
        Ok(Self { ipv6, port: u16::from_le_bytes([low, high]) })
    }
}

/// A target that is neither IPv4 nor IPv6.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("forwarded connection of unknown family {0}; are shim and agent of the same version?")]
pub struct UnknownFamily(u8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_encoded_decodes_to_itself() {
        for target in [Target { ipv6: false, port: 80 }, Target { ipv6: true, port: 65535 }] {
            assert_eq!(Target::decode(target.encode()), Ok(target));
        }
        assert_eq!(Target::decode([5, 0, 0]), Err(UnknownFamily(5)));
    }
}

//! Addresses as the protocol writes them, and /proc/net/dev.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use bulkhead_protocol::agent::InterfaceStats;
use bulkhead_protocol::guest::MAX_STATS_ENTRIES;

use super::NetworkError;

/// A MAC address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Mac([u8; 6]);

impl Mac {
    /// From the kernel's bytes; other link layers have other lengths.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromStr for Mac {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).ok().filter(|_| byte.len() == 2 && !byte.starts_with('+')))
            .collect();
        bytes.and_then(|bytes| Self::from_bytes(&bytes)).ok_or_else(|| syntax("MAC address", text))
    }
}

/// An address with the length of its prefix, "10.22.0.5/16".
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// Bits of it that are the network's.
    pub length: u8,
}

impl Prefix {
    /// The network: the address with the bits behind the prefix cleared.
    pub fn network(self) -> Self {
        let address = match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
                IpAddr::V4((address.to_bits() & mask).into())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
                IpAddr::V6((address.to_bits() & mask).into())
            }
        };
        Self { address, ..self }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Prefix {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            let length = length.parse().ok().filter(|length| *length <= if address.is_ipv4() { 32 } else { 128 })?;
            Some(Self { address, length })
        };
        parse().ok_or_else(|| syntax("address with prefix length", text))
    }
}

/// An address.
pub fn address(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| syntax("IP address", text))
}

fn syntax(what: &'static str, text: &str) -> NetworkError {
    NetworkError::Syntax { what, text: text.into() }
}

/// The table of /proc/net/dev: two lines of headings, then name and sixteen counters. The kernel goes by age, so the pod's own
/// interfaces are before those that containers make.
pub(super) fn interface_stats(table: &str) -> Vec<InterfaceStats> {
    let stats = table.lines().skip(2).filter_map(interface);
    stats.filter(|stats| stats.name != "lo").take(MAX_STATS_ENTRIES).collect()
}

fn interface(line: &str) -> Option<InterfaceStats> {
    let (name, counters) = line.rsplit_once(':')?;
    let counters: Vec<u64> = counters.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let counter = |column: usize| counters.get(column).copied();
    Some(InterfaceStats {
        name: name.trim().into(),
        rx_bytes: counter(0)?,
        rx_packets: counter(1)?,
        rx_errors: counter(2)?,
        rx_dropped: counter(3)?,
        tx_bytes: counter(8)?,
        tx_packets: counter(9)?,
        tx_errors: counter(10)?,
        tx_dropped: counter(11)?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_has_six_bytes_of_two_digits() {
        assert_eq!("02:00:00:00:0a:fF".parse::<Mac>().unwrap(), Mac([2, 0, 0, 0, 10, 255]));
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "2:0:0:0:0:1", "02-00-00-00-00-01", "+2:00:00:00:00:01"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prefix_fits_its_family() {
        assert_eq!("10.22.0.5/16".parse::<Prefix>().unwrap().length, 16);
        assert_eq!("fd00::5/64".parse::<Prefix>().unwrap().address, address("fd00::5").unwrap());
        for bad in ["10.0.0.1", "10.0.0.1/33", "fd00::1/129", "x/8", "10.0.0.1/", "10.0.0.1/-1"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn network_has_no_bits_behind_its_prefix() {
        for (address, network) in [
            ("10.22.7.5/16", "10.22.0.0/16"),
            ("10.22.7.5/32", "10.22.7.5/32"),
            ("10.22.7.5/0", "0.0.0.0/0"),
            ("fd00::7:5/112", "fd00::7:0/112"),
            ("fd00::5/0", "::/0"),
        ] {
            assert_eq!(address.parse::<Prefix>().unwrap().network().to_string(), network);
        }
    }

    #[test]
    fn counters_are_read_by_column() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
                     eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n broken: 1 2\n";
        let stats = interface_stats(table);
        assert_eq!(stats.len(), 1);
        assert_eq!((stats[0].name.as_str(), stats[0].rx_bytes, stats[0].rx_dropped), ("eth0", 100, 4));
        assert_eq!((stats[0].tx_bytes, stats[0].tx_errors, stats[0].tx_dropped), (500, 7, 8));
    }

    #[test]
    fn interfaces_that_a_container_makes_without_end_are_left_out() {
        let line = |name: String| format!("{name}: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n");
        let made = (0..3000).map(|n| line(format!("d{n}")));
        let table: String = ["\n\n".into(), line("eth0".into())].into_iter().chain(made).collect();
        let stats = interface_stats(&table);
        assert_eq!((stats.len(), stats[0].name.as_str()), (MAX_STATS_ENTRIES, "eth0"));
    }
}

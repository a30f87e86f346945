//! struct virtio_net_hdr (section 5.1.6) as a driver sends it: checked against what was negotiated and against the frame,
//! before the host's kernel gets to see it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of a header: with num_buffers, as VIRTIO_F_VERSION_1 has it.
pub const HEADER_LEN: usize = 12;

/// Where num_buffers is.
pub const NUM_BUFFERS: usize = 10;

/// An Ethernet header.
pub const ETHERNET_LEN: usize = 14;

/// Smallest MTU that may be offered, section 5.1.4.1.
pub const MIN_MTU: u16 = 68;

/// Largest frame: 65535 bytes of IP (section 5.1.6.3.1) and an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = 65535 + ETHERNET_LEN + 4;

/// Most segments that the host is made to cut a frame into: the largest frame at Linux's smallest MSS (TCP_MIN_SND_MSS, 48).
/// A bound on a segment's size alone would drop what honest guests send: options come out of the MSS, down to 8 bytes.
const MAX_SEGMENTS: usize = MAX_FRAME / 48;

/// What the driver may ask of the device for a frame.
#[derive(Clone, Copy, Debug)]
pub struct Offloads {
    checksum: bool,
    tcp4: bool,
    tcp6: bool,
    ecn: bool,
}

impl Offloads {
    /// Those that were negotiated.
    pub fn new(features: u64) -> Self {
        let has = |bit: u32| features & (1 << bit) != 0;
        Self {
            checksum: has(VIRTIO_NET_F_CSUM),
            tcp4: has(VIRTIO_NET_F_HOST_TSO4),
            tcp6: has(VIRTIO_NET_F_HOST_TSO6),
            ecn: has(VIRTIO_NET_F_HOST_ECN),
        }
    }

    /// The header as the tap is to get it, or `None` if the frame, of `frame_len` bytes, is to be dropped.
    pub fn check(&self, header: [u8; HEADER_LEN], frame_len: usize) -> Option<[u8; HEADER_LEN]> {
        let [flags, gso_type, hdr0, hdr1, size0, size1, start0, start1, offset0, offset1, _, _] = header;
        let word = |low, high| usize::from(u16::from_le_bytes([low, high]));
        if !(ETHERNET_LEN..=MAX_FRAME).contains(&frame_len) {
            return None;
        }
        // Flags that a driver does not set are to be ignored.
        let flags = flags & bits(VIRTIO_NET_HDR_F_NEEDS_CSUM);
        let needs_checksum = flags != 0;
        let checksum_end = word(start0, start1) + word(offset0, offset1) + size_of::<u16>();
        if needs_checksum && !(self.checksum && checksum_end <= frame_len) {
            return None;
        }
        let segment = gso_type != bits(VIRTIO_NET_HDR_GSO_NONE);
        let segments = frame_len.checked_div(word(size0, size1));
        let fits = segments.is_some_and(|count| count <= MAX_SEGMENTS) && word(hdr0, hdr1) <= frame_len;
        if segment && !(self.may_segment(gso_type) && needs_checksum && fits) {
            return None;
        }
        let (hdr, size) = if segment { ([hdr0, hdr1], [size0, size1]) } else { ([0; 2], [0; 2]) };
        let (start, offset) = if needs_checksum { ([start0, start1], [offset0, offset1]) } else { ([0; 2], [0; 2]) };
        Some([flags, gso_type, hdr[0], hdr[1], size[0], size[1], start[0], start[1], offset[0], offset[1], 0, 0])
    }

    fn may_segment(&self, gso_type: u8) -> bool {
        let ecn = bits(VIRTIO_NET_HDR_GSO_ECN);
        let kind = gso_type & !ecn;
        let known = (kind == bits(VIRTIO_NET_HDR_GSO_TCPV4) && self.tcp4)
            || (kind == bits(VIRTIO_NET_HDR_GSO_TCPV6) && self.tcp6);
        known && (self.ecn || gso_type & ecn == 0)
    }
}

/// The constants are all below 256.
pub const fn bits(constant: u32) -> u8 {
    constant.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TSO4: u64 = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;

    fn header(flags: u8, gso_type: u8, hdr_len: u8, gso_size: u8, start: u8, offset: u8) -> [u8; HEADER_LEN] {
        [flags, gso_type, hdr_len, 0, gso_size, 0, start, 0, offset, 0, 9, 9]
    }

    #[test]
    fn plain_frame_passes_with_everything_else_cleared() {
        let checked = Offloads::new(0).check(header(0xfe, 0, 1, 2, 3, 4), 60);
        assert_eq!(checked, Some([0; HEADER_LEN]));
    }

    #[test]
    fn hostile_09_offloads_that_were_not_negotiated_drop_the_frame() {
        let checksum = header(1, 0, 0, 0, 34, 16);
        assert!(Offloads::new(0).check(checksum, 60).is_none());
        assert!(Offloads::new(TSO4).check(checksum, 60).is_some());
        let tcp6 = header(1, 4, 54, 100, 34, 16);
        assert!(Offloads::new(TSO4).check(tcp6, 200).is_none());
        assert!(Offloads::new(TSO4).check(header(1, 0x81, 54, 100, 34, 16), 200).is_none());
        assert!(Offloads::new(TSO4).check(header(1, 3, 54, 100, 34, 16), 200).is_none());
        assert!(Offloads::new(TSO4).check(header(1, 1, 54, 100, 34, 16), 200).is_some());
    }

    #[test]
    fn hostile_09_frame_that_the_host_would_cut_into_thousands_is_dropped() {
        let passes =
            |size: u8, frame_len| Offloads::new(TSO4).check(header(1, 1, 54, size, 34, 16), frame_len).is_some();
        for size in 1..48 {
            assert!(!passes(size, MAX_FRAME), "{size}");
        }
        assert!(passes(48, MAX_FRAME));
        // What Linux sends to a peer with the smallest MSS: less the time stamps, and less all options that there may be.
        assert!(passes(36, 54 + 1000 * 36) && passes(8, 54 + 1000 * 8));
        assert!(!passes(1, MAX_SEGMENTS + 1) && passes(1, MAX_SEGMENTS));
    }

    #[test]
    fn hostile_09_offsets_beyond_the_frame_drop_it() {
        let offloads = Offloads::new(TSO4);
        assert!(offloads.check(header(1, 0, 0, 0, 50, 9), 60).is_none());
        assert!(offloads.check(header(1, 0, 0, 0, 50, 8), 60).is_some());
        assert!(offloads.check(header(1, 1, 201, 100, 34, 16), 200).is_none());
        assert!(offloads.check(header(1, 1, 54, 0, 34, 16), 200).is_none());
        assert!(offloads.check(header(0, 1, 54, 100, 34, 16), 200).is_none());
        assert!(offloads.check([0; HEADER_LEN], 13).is_none());
        assert!(offloads.check([0; HEADER_LEN], MAX_FRAME + 1).is_none());
    }
}

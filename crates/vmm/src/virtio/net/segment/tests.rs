use super::*;

const BOTH: Kinds = Kinds { v4: true, v6: true };

/// A segment as the host's kernel sends one, and what tests change of it.
#[derive(Clone, Copy)]
pub struct Sent {
    pub v6: bool,
    pub port: u16,
    pub number: u32,
    pub time: Option<u32>,
    pub flags: u8,
    pub payload: usize,
    /// The size of its packets, if it is several.
    pub packet: Option<u16>,
}

pub const SENT: Sent =
    Sent { v6: false, port: 1000, number: 100, time: Some(7), flags: ACK, payload: 2896, packet: Some(1448) };

impl Sent {
    /// The frame with its virtio header. Its payload is what stands at its place in a stream of [`data`].
    pub fn frame(self) -> Vec<u8> {
        let tcp_len = if self.time.is_some() { 32 } else { 20 };
        let (ip_len, at) = if self.v6 { (40, IP + 40) } else { (20, IP + 20) };
        let length = tcp_len + self.payload;
        let mut frame = vec![0; at + tcp_len];
        frame[0] = 1;
        if let Some(packet) = self.packet {
            frame[1] = if self.v6 { 4 } else { 1 };
            frame[2..4].copy_from_slice(&u16::try_from(ETHERNET_LEN + ip_len + tcp_len).unwrap().to_le_bytes());
            frame[4..6].copy_from_slice(&packet.to_le_bytes());
        }
        frame[6..8].copy_from_slice(&u16::try_from(ETHERNET_LEN + ip_len).unwrap().to_le_bytes());
        frame[8] = 16;
        frame[12..24].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        let big = |length: usize| u16::try_from(length).unwrap().to_be_bytes();
        if self.v6 {
            frame[24..26].copy_from_slice(&[0x86, 0xdd]);
            frame[IP] = 0x60;
            frame[IP + 4..IP + 6].copy_from_slice(&big(length));
            frame[IP + 6..IP + 8].copy_from_slice(&[6, 64]);
            frame[IP + 8..IP + 40].copy_from_slice(&(0..32).collect::<Vec<_>>());
        } else {
            frame[24..26].copy_from_slice(&[8, 0]);
            frame[IP] = 0x45;
            frame[IP + 2..IP + 4].copy_from_slice(&big(20 + length));
            frame[IP + 6..IP + 10].copy_from_slice(&[0x40, 0, 64, 6]);
            frame[IP + 12..IP + 20].copy_from_slice(&[10, 88, 0, 1, 10, 88, 0, 9]);
            let sum = !sum(&frame[IP..IP + 20], 0);
            frame[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let tcp = &mut frame[at..];
        tcp[..2].copy_from_slice(&self.port.to_be_bytes());
        tcp[3] = 80;
        tcp[4..8].copy_from_slice(&self.number.to_be_bytes());
        tcp[12] = u8::try_from(tcp_len / 4).unwrap() << 4;
        tcp[13] = self.flags;
        tcp[15] = 200;
        if let Some(time) = self.time {
            tcp[20..24].copy_from_slice(&TIMESTAMPS);
            tcp[24..28].copy_from_slice(&time.to_be_bytes());
            tcp[28..32].copy_from_slice(&time.to_be_bytes());
        }
        let pseudo = pseudo_sum(&frame, self.v6);
        frame[at + 16..at + 18].copy_from_slice(&pseudo.to_be_bytes());
        frame.extend(data(self.number, self.payload));
        frame
    }

    fn segment(self) -> Segment {
        let frame = self.frame();
        Segment::parse(&frame[..frame.len().min(MAX_HEADERS)], frame.len(), BOTH).unwrap()
    }

    /// The one that follows.
    pub fn next(self) -> Self {
        Self { number: self.number.wrapping_add(u32::try_from(self.payload).unwrap()), ..self }
    }
}

/// What a connection carries from byte `number` on.
pub fn data(number: u32, len: usize) -> Vec<u8> {
    (0..len).map(|i| (number.wrapping_add(u32::try_from(i).unwrap()) % 251).to_le_bytes()[0]).collect()
}

fn sum(bytes: &[u8], start: u16) -> u16 {
    bytes.chunks(2).fold(start, |sum, pair| add(sum, u16::from_be_bytes([pair[0], pair[1]])))
}

/// What the kernel leaves in a segment's checksum for the driver: addresses, protocol and length, which are recomputed here.
pub fn pseudo_sum(frame: &[u8], v6: bool) -> u16 {
    let (addresses, length) = if v6 {
        (&frame[IP + 8..IP + 40], u16::from_be_bytes([frame[IP + 4], frame[IP + 5]]))
    } else {
        (&frame[IP + 12..IP + 20], u16::from_be_bytes([frame[IP + 2], frame[IP + 3]]) - 20)
    };
    sum(addresses, add(6, length))
}

/// The headers of what the segments become, if they become one.
fn joined(segments: &[Sent]) -> Option<Vec<u8>> {
    let mut segments = segments.iter().map(|sent| sent.segment());
    let mut first = segments.next().unwrap();
    segments.all(|next| first.append(&next)).then(|| {
        let (headers, len) = first.new_headers().unwrap();
        headers[..len].to_vec()
    })
}

#[test]
fn segments_that_follow_each_other_become_what_the_kernel_would_have_sent_as_one() {
    for (v6, time) in [(false, Some(7)), (true, Some(7)), (false, None), (true, None)] {
        let first = Sent { v6, time, ..SENT };
        // A last one that is short, with the flag that says so.
        let last = Sent { payload: 100, packet: None, flags: ACK | PSH, ..first.next().next() };
        let whole = Sent { payload: 2 * 2896 + 100, flags: ACK | PSH, ..first }.frame();
        let headers = joined(&[first, first.next(), last]).unwrap();
        assert_eq!(headers, whole[..headers.len()], "v6 {v6} {time:?}");
    }
}

#[test]
fn single_packets_become_a_frame_of_several() {
    let first = Sent { payload: 1448, packet: None, ..SENT };
    let headers = joined(&[first, first.next()]).unwrap();
    assert_eq!(headers, SENT.frame()[..headers.len()]);
}

#[test]
fn segment_as_it_came_keeps_its_headers() {
    assert!(SENT.segment().new_headers().is_none());
}

#[test]
fn time_stamps_may_grow_and_the_first_counts() {
    let later = Sent { time: Some(9), ..SENT.next() };
    let headers = joined(&[SENT, later]).unwrap();
    assert_eq!(headers, Sent { payload: 2 * 2896, ..SENT }.frame()[..headers.len()]);
    assert!(joined(&[SENT, Sent { time: Some(6), ..SENT.next() }]).is_none(), "older than what it follows");
    let wrapping = Sent { time: Some(u32::MAX), ..SENT };
    assert!(joined(&[wrapping, Sent { time: Some(1), ..wrapping.next() }]).is_some());
}

#[test]
fn segments_that_differ_in_more_than_place_and_length_stay_apart() {
    let next = SENT.next();
    for (other, why) in [
        (SENT, "the same again"),
        (next.next(), "a gap"),
        (Sent { port: 1001, ..next }, "another connection"),
        (Sent { time: None, ..next }, "other options"),
        (Sent { flags: ACK | 1, ..next }, "the end"),
        (Sent { flags: ACK | 0x80, ..next }, "a sign of congestion"),
        (Sent { flags: 0, ..next }, "no acknowledgement"),
        (Sent { payload: 0, packet: None, ..next }, "nothing but an acknowledgement"),
        (Sent { packet: Some(1000), payload: 2000, ..next }, "smaller packets"),
        (Sent { payload: 1500, packet: None, ..next }, "a larger packet"),
    ] {
        assert!(joined(&[SENT, other]).is_none(), "{why}");
    }
    let short = Sent { payload: 100, packet: None, ..next };
    assert!(joined(&[SENT, short, short.next()]).is_none(), "nothing follows a short packet");

    let (first, frame) = (SENT.segment(), next.frame());
    let changed = |at: usize, byte: u8| {
        let mut frame = frame.clone();
        frame[at] ^= byte;
        Segment::parse(&frame[..MAX_HEADERS], frame.len(), BOTH).is_some_and(|next| first.clone().append(&next))
    };
    assert!(changed(0, 0) && changed(IP + 5, 1), "not for its identification, as it is never cut");
    for (at, byte, why) in [
        (0, 1, "a checksum that is complete"),
        (1, 0x80, "segments with a sign of congestion"),
        (6, 2, "a checksum elsewhere"),
        (8, 1, "a checksum elsewhere"),
        (12, 1, "another station"),
        (24, 1, "no IP"),
        (IP, 1, "options of IP"),
        (IP + 1, 3, "a mark of congestion"),
        (IP + 3, 1, "a length that is not the frame's"),
        (IP + 6, 0x40, "may be cut"),
        (IP + 6, 0x20, "a fragment"),
        (IP + 7, 1, "a fragment"),
        (IP + 8, 1, "another lifetime"),
        (IP + 9, 23, "no TCP"),
        (IP + 19, 1, "another address"),
        (IP + 20 + 11, 1, "another acknowledgement"),
        (IP + 20 + 12, 1, "a bit without a name"),
        (IP + 20 + 15, 1, "another window"),
        (IP + 20 + 22, 1, "another option"),
    ] {
        assert!(!changed(at, byte), "{why}");
    }
}

#[test]
fn frame_grows_no_longer_than_its_length_can_be_told() {
    for v6 in [false, true] {
        let (mut next, mut whole) = (Sent { v6, ..SENT }, Sent { v6, ..SENT }.segment());
        let mut count = 1;
        loop {
            next = next.next();
            if !whole.append(&next.segment()) {
                break;
            }
            count += 1;
        }
        let len = (if v6 { 40 } else { 20 }) + 32 + count * 2896;
        assert!(len <= MAX_IP_LEN && len + 2896 > MAX_IP_LEN, "{count}");
        assert!(whole.is_open() && whole.new_headers().is_some());
    }
}

#[test]
fn what_the_driver_does_not_take_is_not_made() {
    let frame = |v6| Sent { v6, ..SENT }.frame();
    let open = |v6, kinds| Segment::parse(&frame(v6)[..MAX_HEADERS], frame(v6).len(), kinds).unwrap().is_open();
    assert!(!open(false, Kinds { v4: false, v6: true }) && open(true, Kinds { v4: false, v6: true }));
    assert!(open(false, Kinds { v4: true, v6: false }) && !open(true, Kinds { v4: true, v6: false }));
}

#[test]
fn hostile_09_frame_that_ends_anywhere_or_lies_about_its_lengths_is_no_segment_to_append() {
    let frame = SENT.frame();
    for len in 0..MAX_HEADERS.min(frame.len()) {
        if let Some(segment) = Segment::parse(&frame[..len], len, BOTH) {
            assert!(!segment.is_open(), "{len}");
        }
    }
    // Every length of a TCP header, and of the frame.
    for words in 0..16 {
        for len in [0, 12, 40, 66, 78, 98, 98 + 2896, usize::MAX] {
            let mut frame = frame.clone();
            frame[IP + 20 + 12] = words << 4;
            let segment = Segment::parse(&frame[..MAX_HEADERS], len, BOTH);
            assert!(segment.is_none_or(|segment| segment.new_headers().is_none()));
        }
    }
    // Packets of no size.
    let mut none = frame;
    none[4..6].fill(0);
    assert!(!Segment::parse(&none[..MAX_HEADERS], none.len(), BOTH).unwrap().is_open());
}

#[test]
fn hostile_09_random_headers_do_no_harm() {
    let mut seed = 1_u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed >> 8
    };
    let mut grown = 0;
    for _ in 0..20_000 {
        let mut frames = [SENT.frame(), SENT.next().frame()];
        for frame in &mut frames {
            for _ in 0..random() % 3 {
                let at = usize::try_from(random()).unwrap() % MAX_HEADERS;
                frame[at] = random().to_le_bytes()[0];
            }
        }
        let [first, next] = frames.map(|frame| Segment::parse(&frame[..MAX_HEADERS], frame.len(), BOTH));
        if let (Some(mut first), Some(next)) = (first, next)
            && first.append(&next)
        {
            let (headers, len) = first.new_headers().unwrap();
            assert_eq!((len, headers[1]), (78, 1));
            grown += 1;
        }
    }
    assert!(grown > 1000, "{grown}");
}

//! What a VMM has of the host's memory for itself (proc_pid_smaps(5)).

use std::fs;

/// Resident KiB of a process, without the mappings that are the guest's memory: private and as large as one of its
/// parts, or as some parts that lie side by side, or a decoy in the place of a block that is not plugged. The guest decides
/// what is in those.
pub fn own_kib(pid: u32, guest_mib: &[u64]) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut own, mut guest, mut counted_as_guest) = (0, 0, false);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
        if let Some((start, end)) = first.split_once('-') {
            let address = |hex| u64::from_str_radix(hex, 16).unwrap();
            let size = address(end) - address(start);
            counted_as_guest = second == "rw-p" && is_guest(size, guest_mib) || line.contains("/memfd:decoy");
            guest += if counted_as_guest { size >> 20 } else { 0 };
        } else if first == "Rss:" && !counted_as_guest {
            own += second.parse::<u64>().unwrap();
        }
    }
    assert_eq!(guest, guest_mib.iter().sum::<u64>(), "the guest's memory is not found in\n{text}");
    own
}

fn is_guest(size: u64, parts: &[u64]) -> bool {
    (0..parts.len()).any(|from| (from..parts.len()).any(|to| parts[from..=to].iter().sum::<u64>() << 20 == size))
}

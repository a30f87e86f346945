//! A guest that is hostile to the whole path: the real binary in service mode, with one of every device, boots a small
//! kernel of ours (`hostile_guest/*.c`) instead of Linux. It programs the devices by hand, wrongly, and reports on the
//! serial port how they took it. The numbers in the tests' names are those of docs/negative-tests.md.

mod machine;
mod memory;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_protocol::control::{Command, Reply};

use machine::{HostileGuest, Options, REQUESTED_MIB, run};

#[test]
fn hostile_01_registers_written_late_change_nothing() {
    run("late-writes");
}

#[test]
fn hostile_01_reset_with_requests_in_flight_gives_the_rings_back() {
    run("resets-in-flight");
}

#[test]
fn hostile_02_storm_of_accesses_of_every_width_leaves_devices_usable() {
    run("storm");
}

#[test]
fn hostile_02_accesses_that_no_device_answers_do_nothing() {
    run("nowhere");
}

#[test]
fn hostile_03_queues_that_cannot_be_are_refused() {
    run("impossible-queues");
}

#[test]
fn hostile_04_and_07_broken_ring_stops_its_device_only_and_until_a_reset() {
    run("broken-rings");
}

#[test]
fn hostile_05_bad_chains_are_returned_or_stop_their_device() {
    run("bad-chains");
}

#[test]
fn hostile_06_chains_that_change_under_the_device_do_no_harm() {
    run("changing-chains");
}

#[test]
fn hostile_08_disk_requests_out_of_bounds_are_refused() {
    run("block-limits");
}

#[test]
fn hostile_09_network_recovers_from_a_flood_and_drops_odd_frames() {
    let mut guest = HostileGuest::boot("frames");
    guest.wait_for("ok the host may send");
    for _ in 0..5000 {
        // A full queue of the interface is what this is for.
        let _ = guest.wire().send_to(&[0x55; 600], "255.255.255.255:9");
    }
    guest.vmm().send(9, Command::ResizeMemory { mib: REQUESTED_MIB + 2 }, &[]);
    guest.ends_well();
}

#[test]
fn hostile_11_share_is_not_left_by_names_links_or_made_up_numbers() {
    run("share-limits");
}

/// The limit is a low one here, so that a slow guest comes to it; what is under test is that there is one, that other
/// devices start and work beyond it, and what a handle costs.
#[test]
fn hostile_11_files_that_are_never_closed_are_limited_and_harm_nobody() {
    const LIMIT: u64 = 3000;
    const MOST_BYTES_EACH: u64 = 1024;
    let mut guest = HostileGuest::boot_with("hoard", &Options { open_files: Some(LIMIT), ..Options::default() });
    guest.wait_for("ok the hoarding begins");
    let before = memory::own_kib(guest.vmm().pid(), &machine::GUEST_MIB);
    guest.wait_for("ok share refuses more handles");
    let after = memory::own_kib(guest.vmm().pid(), &machine::GUEST_MIB);
    let report = guest.ends_well();
    let [handles] = counts(report.iter().find(|line| line.starts_with("handles ")).unwrap());
    assert!((100..LIMIT).contains(&handles), "{handles}");
    println!("{handles} handles, {before} KiB before, {after} KiB after");
    // Half of the allowance is for what else grows once: the allocator's arenas, code that had not run.
    assert!(after.saturating_sub(before) << 10 < handles * MOST_BYTES_EACH, "{before} KiB, then {after} KiB");
}

#[test]
fn hostile_13_memory_that_is_not_the_guests_is_neither_given_nor_taken() {
    run("memory-limits");
}

#[test]
fn hostile_10_connection_of_the_host_outlives_strays_and_a_peer_that_breaks_its_credit() {
    let mut guest = HostileGuest::boot("vsock-peer");
    guest.wait_for("ok the host may connect");
    let mut honest = connect(&guest, 10);
    honest.write_all(b"ping").unwrap();
    guest.wait_for("ok the host may connect again");
    let _unread = connect(&guest, 11);
    let mut text = String::new();
    honest.read_to_string(&mut text).unwrap();
    assert_eq!(text, "pongpong");
    guest.ends_well();
}

/// The host's end of a connection to the guest, which has not been accepted yet.
fn connect(guest: &HostileGuest, id: u64) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(machine::PATIENCE)).unwrap();
    guest.vmm().send(id, Command::ConnectVsock { port: 1024 }, &[theirs.into()]);
    ours
}

#[test]
fn hostile_14_output_that_nobody_reads_neither_stalls_nor_grows_the_vmm() {
    let mut guest = HostileGuest::boot_with("chatter", &Options { unread: true, ..Options::default() });
    guest.wait_for_exit();
    assert_eq!(guest.disk(8), b"survived");
    guest.process_ends_well();
}

/// A few seconds; tools/hostile makes it a minute (`BULKHEAD_FLOOD_SECONDS=60`) and reads the line that is printed.
#[test]
fn hostile_07_flood_of_every_queue_leaves_memory_flat() {
    const MOST_KIB: u64 = 8 << 10;
    let seconds = std::env::var("BULKHEAD_FLOOD_SECONDS").map_or(4, |seconds| seconds.parse().unwrap());
    let mut guest = HostileGuest::boot("flood");
    guest.wait_for("ok the flood is on");
    let before = memory::own_kib(guest.vmm().pid(), &machine::GUEST_MIB);
    let (begin, mut most) = (Instant::now(), before);
    while begin.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(Duration::from_millis(500));
        most = most.max(memory::own_kib(guest.vmm().pid(), &machine::GUEST_MIB));
    }
    let after = memory::own_kib(guest.vmm().pid(), &machine::GUEST_MIB);
    guest.vmm().send(9, Command::ResizeMemory { mib: REQUESTED_MIB + 2 }, &[]);
    let report = guest.ends_well();
    let [chains, returned, restarts] = counts(report.iter().find(|line| line.starts_with("chains ")).unwrap());
    let logged = guest.log_lines();
    println!(
        "{seconds} s, {chains} chains, {returned} returned, {restarts} restarts: \
         {before} KiB before, {after} after, at most {most}; {logged} lines logged"
    );
    assert!(most.saturating_sub(before) < MOST_KIB, "{before} KiB before, at most {most} KiB");
    let ready = guest.replies().iter().filter(|reply| **reply == Reply::GuestReady).count();
    assert!(ready <= 1, "the host was told {ready} times that the guest is ready");
    // Receive queues keep what they are given until there is something to receive.
    assert!(returned > chains / 8, "the devices returned {returned} of {chains} chains");
    guest.has_used_its_devices();
}

/// The numbers of a line of words and numbers.
fn counts<const N: usize>(line: &str) -> [u64; N] {
    let numbers = line.split(' ').filter_map(|word| word.strip_prefix("0x"));
    let numbers: Vec<_> = numbers.map(|digits| u64::from_str_radix(digits, 16).unwrap()).collect();
    numbers.try_into().unwrap()
}

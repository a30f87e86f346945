//! The control socket between shim and VMM: one SEQPACKET pair, one JSON message per packet, descriptors by SCM_RIGHTS.
//!
//! The shim sends [`Request`]s, the VMM answers each with a [`Reply`] of the same id, in any order, and sends events
//! in between. The VMM ends when the shim's end of the socket closes; the socket's end tells the shim that the VMM is gone.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::counters::DeviceCounters;
use crate::vmspec::{DeviceSpec, VmSpec};

/// Largest message in bytes. A spec with every slot filled is a few KiB.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Most descriptors in one message: kernel, initramfs, kvm, serial, and up to two for each device slot, rounded up.
pub const MAX_FDS: usize = 64;

/// Shim to VMM.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the shim; the reply carries it.
    pub id: u64,
    /// What is asked.
    pub command: Command,
}

/// What the shim can ask of a VMM.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Command {
    /// Builds the machine and starts its vCPUs. First, and once. Descriptors: those that the spec indexes.
    Boot(VmSpec),
    /// Puts a device into an empty slot of the running machine. Answered with [`Reply::Added`]; the guest finds the device
    /// when it is told to bind the slot. Descriptors: those that the device indexes.
    AddDevice(DeviceSpec),
    /// Takes the device out of a slot, whatever the guest is doing with it; the slot reads as empty from then on. Only if a
    /// request of the device's is with a disk of the host, it does when that has answered; every other request fails until then.
    /// Answered at once in any case.
    RemoveDevice {
        /// The slot that [`Reply::Added`] has named.
        slot: u8,
    },
    /// Asks the guest to have this much memory beyond its boot memory. Answered with [`Reply::Resized`] when the guest has
    /// come there or another request of this kind takes this one's place; a guest may never come there.
    ResizeMemory {
        /// MiB, at most the spec's `hotplug_mib`.
        mib: u64,
    },
    /// Connects the one descriptor of the message, an end of a stream socketpair, to a port of the guest. Answered when
    /// the guest has accepted or refused, or the device gave up waiting for it.
    ConnectVsock {
        /// Port in the guest.
        port: u32,
    },
    /// Asks what the devices have counted. Answered with [`Reply::Counters`], at once.
    Counters,
}

/// VMM to shim.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Reply {
    /// The request with this id is done.
    Done {
        /// The request's id.
        id: u64,
    },
    /// The device of the request with this id is in a slot.
    Added {
        /// The request's id.
        id: u64,
        /// The slot, counted from 0 as the guest counts its virtio-mmio devices.
        slot: u8,
    },
    /// The guest's memory has the size of the request with this id, or a later request took its place.
    Resized {
        /// The request's id.
        id: u64,
        /// MiB that the guest has beyond its boot memory.
        mib: u64,
    },
    /// What the devices have counted.
    Counters {
        /// The request's id.
        id: u64,
        /// One for each slot that has a device.
        devices: Vec<DeviceCounters>,
    },
    /// The request with this id failed.
    Failed {
        /// The request's id.
        id: u64,
        /// Cause and remedy, one sentence.
        message: String,
    },
    /// The guest tried to reach [`READY_PORT`](crate::guest::READY_PORT): its agent listens. Sent once for a machine.
    GuestReady,
    /// The guest has ended, the VMM is about to. What other threads of its still answer may follow.
    GuestExited {
        /// Why.
        reason: ExitReason,
    },
}

/// Why a guest ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest reset itself: an orderly shutdown, or a panic (the console tells).
    Reset,
    /// A vCPU met something that KVM cannot go on from.
    VcpuFault,
    /// The host could not give the guest a page that it touched: the file of an image was cut short, or its disk fails.
    MemoryGone,
    /// KVM could not make a task that it needs in the VMM's process (Linux 6.14 and later): pids.max of the VMM's cgroup, or
    /// of one above it, is reached.
    NoTask,
}

impl ExitReason {
    /// What [`Self::MemoryGone`] means, for people.
    pub const MEMORY_GONE: &str = "the host could not give the guest memory that it touched: an image layer of the pod's was cut \
         short while in use, or the disk that it is on fails; see the node's kernel log";

    /// What [`Self::NoTask`] means, for people.
    pub const NO_TASK: &str = "KVM could not make the task that it needs for a VM, because the pod's limit of tasks (pids.max of \
         its cgroup or of one above it) is reached; raise the kubelet's podPidsLimit";
}

/// Sends one message. Blocks if the socket does and its buffer is full.
pub fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
    let body = serde_json::to_vec(message).map_err(ControlError::Json)?;
    if body.len() > MAX_MESSAGE {
        return Err(ControlError::TooLarge);
    }
    if fds.len() > MAX_FDS {
        return Err(ControlError::TooManyFds);
    }
    let flags = SendFlags::NOSIGNAL;
    // Not sendmsg(2), which could send descriptors: the VMM's filters do not have it.
    if fds.is_empty() {
        rustix::io::retry_on_intr(|| rustix::net::send(&socket, &body, flags)).map_err(ControlError::Send)?;
        return Ok(());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ControlError::TooManyFds);
    }
    rustix::io::retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(&body)], &mut ancillary, flags))
        .map_err(ControlError::Send)?;
    Ok(())
}

/// Receives one message with its descriptors (close-on-exec). `None` when the peer has closed.
///
/// On a non-blocking socket with nothing to read the error is [`ControlError::Receive`] with `EAGAIN`.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let (body, flags) = receive_packet(socket, &mut ancillary)?;
    // Collected before anything is judged, so that a bad message leaks no descriptor.
    let mut fds = Vec::new();
    for item in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = item {
            fds.extend(rights);
        }
    }
    if flags.contains(ReturnFlags::CTRUNC) {
        return Err(ControlError::TooLarge);
    }
    Ok(parse(&body, flags)?.map(|value| (value, fds)))
}

/// Receives one message from a peer that has no descriptors to send, like [`receive`].
///
/// There is no room for any: one that comes all the same is never this process's, which would have to close it. That can
/// wait for a file system that hangs (close(2)), and the sender chooses which. The message is refused.
pub fn receive_bare<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<T>, ControlError> {
    let (body, flags) = receive_packet(socket, &mut RecvAncillaryBuffer::default())?;
    if flags.contains(ReturnFlags::CTRUNC) {
        return Err(ControlError::Descriptors);
    }
    parse(&body, flags)
}

fn receive_packet(
    socket: impl AsFd,
    ancillary: &mut RecvAncillaryBuffer<'_>,
) -> Result<(Vec<u8>, ReturnFlags), ControlError> {
    let mut body = vec![0; MAX_MESSAGE];
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(&socket, &mut [IoSliceMut::new(&mut body)], ancillary, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(ControlError::Receive)?;
    body.truncate(message.bytes);
    Ok((body, message.flags))
}

/// The message of a packet; `None` for an empty one, which is how the peer's end reads.
fn parse<T: DeserializeOwned>(body: &[u8], flags: ReturnFlags) -> Result<Option<T>, ControlError> {
    if body.is_empty() {
        return Ok(None);
    }
    if flags.contains(ReturnFlags::TRUNC) {
        return Err(ControlError::TooLarge);
    }
    serde_json::from_slice(body).map(Some).map_err(ControlError::Json)
}

/// The control socket failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Beyond [`MAX_MESSAGE`], or cut off on the way.
    #[error("control message is larger than {MAX_MESSAGE} bytes or was cut off")]
    TooLarge,
    /// Beyond [`MAX_FDS`].
    #[error("control message carries more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// From a peer that has none to send.
    #[error("control message carries descriptors, which nobody asked for")]
    Descriptors,
    /// Not a message of this protocol; the two binaries may be of different versions.
    #[error("a message on the control socket between shim and VMM cannot be parsed; are both of the same release?")]
    Json(#[source] serde_json::Error),
    /// sendmsg(2).
    #[error("cannot send on the control socket")]
    Send(#[source] rustix::io::Errno),
    /// recvmsg(2).
    #[error("cannot receive from the control socket")]
    Receive(#[source] rustix::io::Errno),
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn message_with_descriptor_arrives_whole() {
        let (a, b) = pair();
        let (x, _y) = pair();
        let request = Request { id: 7, command: Command::ConnectVsock { port: 1024 } };
        send(&a, &request, &[x.as_fd()]).unwrap();
        let (got, fds) = receive::<Request>(&b).unwrap().unwrap();
        assert_eq!((got, fds.len()), (request, 1));
    }

    #[test]
    fn closed_peer_reads_as_none() {
        let (a, b) = pair();
        drop(a);
        assert!(receive::<Request>(&b).unwrap().is_none());
    }

    #[test]
    fn hostile_15_unknown_field_is_refused() {
        let (a, b) = pair();
        send(&a, &serde_json::json!({"id": 1, "command": {"connect_vsock": {"port": 1}}, "more": 1}), &[]).unwrap();
        assert!(matches!(receive::<Request>(&b), Err(ControlError::Json(_))));
    }

    /// The longest request there is, with one of each device.
    fn boot() -> Request {
        let fd = crate::vmspec::FdIndex;
        let devices = vec![
            DeviceSpec::Balloon,
            DeviceSpec::Block { file: fd(3), read_only: true, serial: "disk".into() },
            DeviceSpec::Console { output: fd(4) },
            DeviceSpec::Fs {
                tag: "share".into(),
                root: fd(5),
                ids: crate::vmspec::IdMaps::default(),
                private_roots: true,
            },
            DeviceSpec::Memory { requested_mib: 128 },
            DeviceSpec::Net { tap: fd(6), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 },
            DeviceSpec::Pmem { images: vec![crate::vmspec::Image { file: fd(7), size: 4096 }] },
            DeviceSpec::Rng,
            DeviceSpec::Vsock,
        ];
        let spec = VmSpec {
            kvm: fd(0),
            kernel: fd(1),
            initramfs: Some(fd(2)),
            cmdline: "console=hvc0".into(),
            vcpus: 4,
            boot_vcpus: 1,
            memory_mib: 256,
            hotplug_mib: 1024,
            devices,
            serial: None,
        };
        Request { id: 1, command: Command::Boot(spec) }
    }

    /// What the receiver makes of these bytes.
    fn received(bytes: &[u8]) -> Result<Option<Request>, ControlError> {
        let (a, b) = pair();
        rustix::net::send(&a, bytes, SendFlags::empty()).unwrap();
        receive::<Request>(&b).map(|message| message.map(|(request, _)| request))
    }

    #[test]
    fn hostile_15_message_that_is_cut_off_anywhere_is_refused() {
        let bytes = serde_json::to_vec(&boot()).unwrap();
        assert_eq!(received(&bytes).unwrap(), Some(boot()));
        for len in 1..bytes.len() {
            assert!(matches!(received(&bytes[..len]), Err(ControlError::Json(_))), "{len}");
        }
    }

    #[test]
    fn hostile_15_message_with_any_bit_flipped_is_another_message_or_refused() {
        let bytes = serde_json::to_vec(&boot()).unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                match received(&flipped) {
                    Ok(other) => assert_ne!(other, Some(boot()), "byte {at}, bit {bit}"),
                    Err(error) => assert!(matches!(error, ControlError::Json(_)), "{error}"),
                }
            }
        }
    }

    #[test]
    fn hostile_15_message_beyond_the_limit_is_refused_by_both_ends() {
        let (a, b) = pair();
        let long = "x".repeat(MAX_MESSAGE);
        assert!(matches!(send(&a, &long, &[]), Err(ControlError::TooLarge)));
        for len in [MAX_MESSAGE + 1, 2 * MAX_MESSAGE] {
            rustix::net::send(&a, &vec![b' '; len], SendFlags::empty()).unwrap();
            assert!(matches!(receive::<Request>(&b), Err(ControlError::TooLarge)), "{len}");
        }
        // The next one is whole again.
        send(&a, &boot(), &[]).unwrap();
        assert_eq!(receive::<Request>(&b).unwrap().unwrap().0, boot());
    }

    #[test]
    fn hostile_15_message_that_nests_without_end_is_refused() {
        for open in ["[", "{\"id\":", "{\"command\":{\"boot\":{\"devices\":["] {
            let bytes = open.repeat(MAX_MESSAGE / open.len());
            assert!(matches!(received(bytes.as_bytes()), Err(ControlError::Json(_))), "{open}");
        }
    }

    #[test]
    fn hostile_15_numbers_that_do_not_fit_are_refused() {
        let good = serde_json::to_string(&boot()).unwrap();
        for (field, value) in [
            ("\"vcpus\":4", "\"vcpus\":256"),
            ("\"vcpus\":4", "\"vcpus\":-1"),
            ("\"memory_mib\":256", "\"memory_mib\":18446744073709551616"),
            ("\"memory_mib\":256", "\"memory_mib\":1e3"),
            ("\"mtu\":1500", "\"mtu\":65536"),
            ("\"kvm\":0", "\"kvm\":-1"),
            ("\"kvm\":0", "\"kvm\":\"0\""),
            ("[2,0,0,0,0,1]", "[2,0,0,0,0]"),
            ("\"type\":\"rng\"", "\"type\":\"pmem\""),
            ("\"size\":4096", "\"size\":18446744073709551616"),
        ] {
            assert!(good.contains(field), "{field}");
            let bad = good.replacen(field, value, 1);
            assert!(matches!(received(bad.as_bytes()), Err(ControlError::Json(_))), "{value}");
        }
    }

    #[test]
    fn hostile_21_descriptors_that_nobody_asked_for_are_refused_and_not_kept() {
        let (a, b) = pair();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let reply = Reply::Done { id: 7 };
        for count in [1, MAX_FDS] {
            send(&a, &reply, &vec![writer.as_fd(); count]).unwrap();
            assert!(matches!(receive_bare::<Reply>(&b), Err(ControlError::Descriptors)), "{count}");
        }
        // Nobody holds a copy: the pipe's end is seen.
        drop(writer);
        assert_eq!(rustix::io::read(&reader, &mut [0; 1][..]).unwrap(), 0);
        // The next message is a message, and the end is the end.
        send(&a, &reply, &[]).unwrap();
        assert_eq!(receive_bare::<Reply>(&b).unwrap(), Some(reply));
        rustix::net::send(&a, &[b' '; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert!(matches!(receive_bare::<Reply>(&b), Err(ControlError::TooLarge)));
        drop(a);
        assert!(receive_bare::<Reply>(&b).unwrap().is_none());
    }

    #[test]
    fn hostile_15_descriptors_beyond_the_limit_are_refused_and_not_kept() {
        let (a, b) = pair();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let fds = vec![writer.as_fd(); MAX_FDS + 1];
        assert!(matches!(send(&a, &boot(), &fds), Err(ControlError::TooManyFds)));
        // A sender that does not care.
        let body = serde_json::to_vec(&boot()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2 * MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = vec![writer.as_fd(); 2 * MAX_FDS];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&a, &[IoSlice::new(&body)], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(receive::<Request>(&b), Err(ControlError::TooLarge)));
        // Nobody holds a copy: the pipe's end is seen.
        drop(writer);
        assert_eq!(rustix::io::read(&reader, &mut [0; 1][..]).unwrap(), 0);
    }
}

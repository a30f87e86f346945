//! virtio-net's side of a real tap: needs /dev/net/tun and CAP_NET_ADMIN.

use std::fs::{File, OpenOptions};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bulkhead_vmm::event_loop::EventLoop;
use bulkhead_vmm::memory::create_memory;
use bulkhead_vmm::virtio::net::{Net, NetError};
use bulkhead_vmm::virtio::{ActivateError, Activation, Interrupt, VirtioDevice};
use rustix::thread::UnshareFlags;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A tap with a name that the kernel chooses; it goes with its descriptor.
#[allow(unsafe_code)] // ioctl(2)
pub fn tap(flags: libc::c_int) -> File {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("no tap device; run as root");
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    // SAFETY: the kernel reads and writes an `ifreq`, which this is.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "cannot make a tap; run as root: {}", std::io::Error::last_os_error());
    file
}

/// A tap whose interface is up, in a network namespace of its own, where what a guest sends meets nobody, and a socket
/// there whose broadcasts go to the tap.
#[allow(unsafe_code)] // unshare(2), ioctl(2)
pub fn tap_in_own_namespace() -> (File, UdpSocket) {
    let make = || {
        // SAFETY: the thread ends right after; of its descriptors none is shared by a table of its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.expect("no network namespace; run as root");
        let file = tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        // SAFETY: all zeroes is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes an `ifreq`, which this is.
        assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) }, 0);
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
        // SAFETY: the kernel reads an `ifreq`, which this is.
        assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) }, 0);
        let name = request.ifr_name.map(libc::c_char::cast_unsigned);
        let len = libc::socklen_t::try_from(name.len()).unwrap();
        // SAFETY: the kernel reads a name of that length.
        let bound = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, name.as_ptr().cast(), len)
        };
        assert_eq!(bound, 0);
        socket.set_broadcast(true).unwrap();
        (file, socket)
    };
    std::thread::scope(|scope| scope.spawn(make).join().unwrap())
}

fn net(file: File) -> Result<Net, NetError> {
    Net::new(file.into(), MAC, 1400, EventLoop::spawn().unwrap())
}

#[test]
fn tap_in_the_right_mode_is_taken_and_made_non_blocking() {
    let file = tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let other = file.try_clone().unwrap();
    let device = net(file).unwrap();
    assert!(rustix::fs::fcntl_getfl(&other).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    let mut config = [0xff; 14];
    device.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 1, 0, 0x78, 0x05, 0, 0]);
}

#[test]
fn tap_in_another_mode_is_refused() {
    let plain = tap(libc::IFF_TAP | libc::IFF_NO_PI);
    assert!(matches!(net(plain), Err(NetError::TapMode)));
    let tun = tap(libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    assert!(matches!(net(tun), Err(NetError::TapMode)));
}

#[test]
fn tap_without_an_interface_is_refused() {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("no tap device; run as root");
    assert!(matches!(net(file), Err(NetError::NoTap(_))));
}

/// The driver has no interrupt.
struct Unheard;

impl Interrupt for Unheard {
    fn notify_queue(&self, _: u16) {}
    fn notify_config(&self) {}
    fn needs_reset(&self) {}
}

#[test]
fn hostile_09_offloads_are_set_when_they_change_and_not_for_ever() {
    let mut device = net(tap_in_own_namespace().0).unwrap();
    let memory = create_memory(16, 0).unwrap();
    let mut activate = |features: u64| {
        let (memory, interrupt) = (Arc::clone(&memory), Arc::new(Unheard));
        // Without queues it goes as far as the offloads, and no further.
        let (queues, counts) = (vec![None, None], Arc::default());
        device.activate(Activation { memory, features, queues, interrupt, counts })
    };
    for _ in 0..100 {
        assert!(matches!(activate(0), Err(ActivateError::QueueMissing(_))), "the same again");
    }
    let changes: Vec<_> = (1..100).map(|turn| activate((turn % 2) << VIRTIO_NET_F_GUEST_CSUM)).collect();
    assert!(matches!(changes[0], Err(ActivateError::QueueMissing(_))), "a driver may change its mind");
    let refused = changes.iter().filter(|change| matches!(change, Err(ActivateError::TooOften(_)))).count();
    assert!(refused > 40, "{refused}");
    assert!(matches!(changes.last(), Some(Err(ActivateError::TooOften(_) | ActivateError::QueueMissing(_)))));
}

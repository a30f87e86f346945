//! A tap: /dev/net/tun and TUNSETIFF (Linux: Documentation/networking/tuntap.rst).
#![allow(unsafe_code)] // One ioctl that the system call crates do not wrap.

use std::os::fd::OwnedFd;

use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Opcode, Setter, ioctl};

/// `TUNSETIFF`, linux/if_tun.h: `_IOW('T', 202, int)`, although it reads a whole `struct ifreq`.
const TUNSETIFF: Opcode = 0x4004_54ca;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq` of linux/if.h, as far as TUNSETIFF reads it.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: u16,
    _rest: [u8; 22],
}

/// Creates a tap in the calling thread's network namespace. It is not persistent: it goes with the descriptor.
pub fn open(name: &str) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tun = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    let mut request = IfReq { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, _rest: [0; 22] };
    // One byte stays zero.
    for (to, from) in request.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` of 40 bytes, which IfReq is, and keeps no pointer to it.
    unsafe { ioctl(&tun, Setter::<TUNSETIFF, IfReq>::new(request)) }?;
    Ok(tun)
}

/// Gives the tap its MTU, brings it up and answers its index.
pub async fn raise(handle: &Handle, name: &str, mtu: u32) -> Result<u32, rtnetlink::Error> {
    use futures::TryStreamExt;
    // The tap only carries frames: no link-local address, no router solicitations of its own. Absent without IPv6.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let mut found = handle.link().get().match_name(name).execute();
    let link = found.try_next().await?.ok_or(rtnetlink::Error::RequestFailed)?;
    let index = link.header.index;
    let has_mtu = link.attributes.contains(&LinkAttribute::Mtu(mtu));
    let change = LinkUnspec::new_with_index(index).up();
    let change = if has_mtu { change } else { change.mtu(mtu) };
    handle.link().change(change.build()).execute().await?;
    Ok(index)
}

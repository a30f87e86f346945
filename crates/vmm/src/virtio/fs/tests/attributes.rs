//! Extended attributes that the host has under another name.

use rustix::fs::{getxattr, listxattr};

use super::*;

/// overlayfs on a volume; the host's process has no right to the real ones.
#[test]
fn trusted_attributes_are_the_guests_own() {
    const NAME: &str = "trusted.overlay.opaque";
    const ON_THE_HOST: &str = "user.bulkhead.trusted.overlay.opaque";
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let set = |name: &str| [words(&[1, 0], &[name]), b"y".to_vec()].concat();
    guest.call(opcode::SETXATTR, node, &set(NAME)).unwrap();
    let mut value = [0; 8];
    assert_eq!(getxattr(share.join("file"), ON_THE_HOST, &mut value[..]), Ok(1));
    assert!(getxattr(share.join("file"), NAME, &mut value[..]).is_err());
    let get = |name: &str| words(&[64, 0], &[name]);
    assert_eq!(guest.call(opcode::GETXATTR, node, &get(NAME)).unwrap(), b"y");
    assert_eq!(guest.call(opcode::LISTXATTR, node, &words(&[1024, 0], &[])).unwrap(), cstr(NAME));
    // Nobody in the guest can have set it but who may.
    assert_eq!(guest.call(opcode::SETXATTR, node, &set(ON_THE_HOST)), Err(libc::EPERM));
    assert_eq!(guest.call(opcode::REMOVEXATTR, node, &cstr(ON_THE_HOST)), Err(libc::EPERM));
    assert_eq!(guest.call(opcode::GETXATTR, node, &get(ON_THE_HOST)), Err(libc::ENODATA));
    guest.call(opcode::REMOVEXATTR, node, &cstr(NAME)).unwrap();
    let mut names = [0; 64];
    assert_eq!(listxattr(share.join("file"), &mut names[..]), Ok(0));
}

//! Root file systems, which are the guest's alone.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, UNIX_EPOCH};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};

use super::*;
use crate::virtio::fs::private::{FOR_EVER, PRIVATE};

const NO_HANDLE: u64 = 0;
const KEEP_CACHE: u8 = 2;
const WRITE_CACHE: u32 = 1;
const WRITE_LOCKOWNER: u32 = 2;

/// A share with a container whose root file system is a mount, as the shim makes it: what keeps it, and its descriptor.
fn with_container() -> ((TempDir, fs::File), OwnedFd) {
    with_root(|root, mount_point| mount_bind(root, mount_point).unwrap())
}

/// The same with overlayfs over an image.
fn with_image() -> ((TempDir, fs::File), OwnedFd) {
    with_root(|image, mount_point| {
        let own = mount_point.parent().unwrap().join("own");
        // A file system that can be the upper one of overlayfs, whatever tests run on.
        fs::create_dir(&own).unwrap();
        mount("tmpfs", &own, "tmpfs", MountFlags::empty(), None).unwrap();
        let [upper, work] = ["upper", "work"].map(|name| own.join(name));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let layers = format!("lowerdir={},upperdir={},workdir={}", image.display(), upper.display(), work.display());
        let layers = CString::new(layers).unwrap();
        mount("overlay", mount_point, "overlay", MountFlags::empty(), Some(layers.as_c_str())).unwrap();
    })
}

#[allow(unsafe_code)] // unshare(2)
fn with_root(mount_root: impl FnOnce(&Path, &Path) + Send + 'static) -> ((TempDir, fs::File), OwnedFd) {
    let (dir, share) = share();
    fs::create_dir_all(share.join("c1/rootfs")).unwrap();
    fs::create_dir(dir.path().join("root")).unwrap();
    fs::write(dir.path().join("root/file"), "content").unwrap();
    let (root, mount_point) = (dir.path().join("root"), share.join("c1/rootfs"));
    // In a mount namespace of its own.
    let made = std::thread::spawn(move || {
        // SAFETY: this thread shares nothing with the others of which a mount namespace is a part.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("cannot make a mount namespace; run as root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount_root(&root, &mount_point);
        (fs::File::open("/proc/thread-self/ns/mnt").unwrap(), OwnedFd::from(fs::File::open(&share).unwrap()))
    });
    let (namespace, share) = made.join().unwrap();
    ((dir, namespace), share)
}

/// A guest that knows the root file system's node.
fn guest(share: OwnedFd) -> (Guest, u64) {
    let mut guest = Guest::of(share);
    let container = guest.lookup(ROOT, "c1").unwrap();
    let root = entry(&mut guest, container, "rootfs");
    assert_eq!(u32_at(&root, 40 + 84) & PRIVATE, PRIVATE);
    (guest, u64_at(&root, 0))
}

/// struct fuse_entry_out of a name: nodeid, generation, entry_valid, attr_valid, both in nanoseconds, attributes.
fn entry(guest: &mut Guest, parent: u64, name: &str) -> Vec<u8> {
    guest.call(opcode::LOOKUP, parent, &cstr(name)).unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn write(guest: &mut Guest, node: u64, flags: u32, owner: i64, data: &[u8]) -> Result<Vec<u8>, i32> {
    let mut body = words(&[0, 0, 0, 0, u32::try_from(data.len()).unwrap(), flags], &[]);
    body.extend(owner.to_le_bytes());
    body.extend([0; 8]);
    body.extend(data);
    guest.call(opcode::WRITE, node, &body)
}

#[test]
fn names_and_attributes_last_and_so_does_a_name_that_is_not_there() {
    let (_kept, share) = with_container();
    let (mut guest, root) = guest(share);
    let file = entry(&mut guest, root, "file");
    assert_eq!([u64_at(&file, 16), u64_at(&file, 24)], [FOR_EVER.as_secs(); 2]);
    let attr = guest.call(opcode::GETATTR, u64_at(&file, 0), &[0; 16]).unwrap();
    assert_eq!(u64_at(&attr, 0), FOR_EVER.as_secs());
    let missing = entry(&mut guest, root, "missing");
    assert_eq!((u64_at(&missing, 0), u64_at(&missing, 16)), (0, FOR_EVER.as_secs()));
    // In the share, which changes, nothing does.
    assert_eq!(u64_at(&entry(&mut guest, ROOT, "file"), 16), 1);
    assert_eq!(guest.lookup(ROOT, "missing"), Err(libc::ENOENT));
}

#[test]
fn files_are_read_and_written_without_an_open() {
    let ((dir, _namespace), share) = with_container();
    let (mut guest, root) = guest(share);
    let file = guest.lookup(root, "file").unwrap();
    assert_eq!(guest.read(file, NO_HANDLE).unwrap(), b"content");
    write(&mut guest, file, 0, 0, b"C").unwrap();
    assert_eq!(guest.read(file, NO_HANDLE).unwrap(), b"Content");
    assert_eq!(fs::read(dir.path().join("root/file")).unwrap(), b"Content");
    // What others may change is opened.
    let other = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.read(other, NO_HANDLE), Err(libc::EBADF));
    assert_eq!(write(&mut guest, other, 0, 0, b"x"), Err(libc::EBADF));
}

/// A file of an image is overlayfs's lower file until it is opened to be written; then it may lose its name.
#[test]
fn file_that_was_opened_to_be_written_is_written_when_its_name_is_gone() {
    let ((dir, namespace), share) = with_image();
    let (mut guest, root) = guest(share);
    let file = guest.lookup(root, "file").unwrap();
    let body = [libc::O_RDWR.to_le_bytes(), [0; 4]].concat();
    let opened = guest.call(opcode::OPEN, file, &body).unwrap();
    assert_eq!((u64_at(&opened, 0), opened[8]), (NO_HANDLE, KEEP_CACHE));
    guest.call(opcode::UNLINK, root, &cstr("file")).unwrap();
    write(&mut guest, file, 0, 0, b"C").unwrap();
    assert_eq!(guest.read(file, NO_HANDLE).unwrap(), b"Content");
    assert_eq!(fs::read(dir.path().join("root/file")).unwrap(), b"content", "the image has what it had");
    drop(namespace);
}

#[test]
fn a_created_file_is_open_to_be_read_and_written() {
    let ((dir, _namespace), share) = with_container();
    let (mut guest, root) = guest(share);
    let body = words(&[u32::try_from(libc::O_WRONLY | libc::O_EXCL).unwrap(), 0o100_444, 0, 0], &["new"]);
    let reply = guest.call(opcode::CREATE, root, &body).unwrap();
    let (node, handle) = (u64_at(&reply, 0), u64_at(&reply, 128));
    assert_eq!((handle, u64_at(&reply, 16)), (NO_HANDLE, FOR_EVER.as_secs()));
    write(&mut guest, node, 0, 0, b"abc").unwrap();
    assert_eq!(guest.read(node, NO_HANDLE).unwrap(), b"abc");
    assert_eq!(guest.call(opcode::CREATE, root, &body), Err(libc::EEXIST));
    assert_eq!(fs::metadata(dir.path().join("root/new")).unwrap().permissions().mode() & 0o777, 0o444);
}

#[test]
fn pages_come_with_the_time_of_their_writing() {
    let ((dir, _namespace), share) = with_container();
    let (mut guest, root) = guest(share);
    let file = guest.lookup(root, "file").unwrap();
    let time = || fs::metadata(dir.path().join("root/file")).unwrap().modified().unwrap();
    let before = time();
    let written = Duration::new(1_700_000_000, 123_456_789);
    let nanoseconds = i64::try_from(written.as_nanos()).unwrap();
    write(&mut guest, file, WRITE_CACHE | WRITE_LOCKOWNER, nanoseconds, b"c").unwrap();
    assert_eq!(time(), UNIX_EPOCH + written);
    write(&mut guest, file, WRITE_CACHE | WRITE_LOCKOWNER, -1, b"c").unwrap();
    assert_eq!(time(), UNIX_EPOCH - Duration::from_nanos(1));
    // A lock owner is none.
    write(&mut guest, file, WRITE_LOCKOWNER, nanoseconds, b"c").unwrap();
    assert!(time() >= before);
}

#[test]
fn a_forgotten_file_is_not_open_any_more() {
    let (_kept, share) = with_container();
    let (mut guest, root) = guest(share);
    let file = guest.lookup(root, "file").unwrap();
    assert_eq!(guest.lookup(root, "file"), Ok(file));
    let mut forget = |count: u64| {
        let len = guest.write_request(opcode::FORGET, file, &count.to_le_bytes());
        guest.hiprio.add(&[(REQUEST, len, false)]);
        guest.hiprio.kick();
        guest.hiprio.wait_used(&guest.interrupt);
        guest.read(file, NO_HANDLE)
    };
    assert_eq!(forget(1).unwrap(), b"content", "it is known by its other lookup");
    assert_eq!(forget(1), Err(libc::EBADF));
}

#[test]
fn hostile_11_a_fifo_that_is_read_as_a_file_holds_up_nobody() {
    let ((dir, _namespace), share) = with_container();
    let (mut guest, root) = guest(share);
    let body = words(&[libc::S_IFIFO | 0o644, 0, 0, 0], &["fifo"]);
    let node = u64_at(&guest.call(opcode::MKNOD, root, &body).unwrap(), 0);
    assert!(dir.path().join("root/fifo").exists());
    let _ = guest.read(node, NO_HANDLE);
    let file = guest.lookup(root, "file").unwrap();
    assert_eq!(guest.read(file, NO_HANDLE).unwrap(), b"content");
}

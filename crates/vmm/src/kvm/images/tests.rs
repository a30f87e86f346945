use std::fs::{File, OpenOptions};
use std::io::Write;

use super::*;
use crate::kvm::Vm;
use crate::layout;
use crate::memory::create_memory;

/// A machine with room for images, of what the tests need.
fn space(hotplug_mib: u64) -> ImageSpace {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("needs a /dev/kvm");
    let vm = Vm::new(kvm.into(), create_memory(16, hotplug_mib).unwrap(), layout::hotplug_start(16)).unwrap();
    vm.image_space(layout::images_start(16, hotplug_mib))
}

/// A file of so many bytes, open for reading.
fn image(len: u64) -> (tempfile::NamedTempFile, OwnedFd) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"image").unwrap();
    file.as_file().set_len(len).unwrap();
    let reader = File::open(file.path()).unwrap();
    (file, reader.into())
}

/// How a mapping of the process's is protected (proc_pid_smaps(5)): its permissions, and whether core dumps have it.
fn protection(address: usize) -> (String, bool) {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut found = None;
    for line in smaps.lines() {
        let mut words = line.split(' ');
        let range = words.next().and_then(|range| range.split_once('-'));
        let number = |hex| usize::from_str_radix(hex, 16).ok();
        if let Some((Some(from), Some(to))) = range.map(|(from, to)| (number(from), number(to))) {
            found = (from..to).contains(&address).then(|| words.next().unwrap().to_owned());
        } else if let (Some(found), Some(flags)) = (&found, line.strip_prefix("VmFlags: ")) {
            return (found.clone(), !flags.split(' ').any(|flag| flag == "dd"));
        }
    }
    panic!("{address:#x} is not mapped");
}

#[test]
fn hostile_12_images_are_mapped_for_reading_alone_and_can_become_nothing_else() {
    let space = space(0);
    let (_file, reader) = image(5000);
    let memory = space.map(&[(reader, 5000)]).unwrap();
    let start = memory.mapping.as_ref().unwrap().address;
    // The empty page before it, the image, and the zeros behind.
    assert_eq!(protection(start as usize), ("r--p".into(), true));
    assert_eq!(protection(start as usize + 4096), ("r--s".into(), false));
    assert_eq!(protection(start as usize + 8192), ("r--s".into(), false));
    assert_eq!(protection(start as usize + 3 * 4096), ("r--p".into(), true));
    let at = start.wrapping_byte_add(4096);
    // SAFETY: nobody has a reference there, and the call fails.
    let writable = unsafe { libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_WRITE) };
    assert_eq!((writable, io::Error::last_os_error().kind()), (-1, io::ErrorKind::PermissionDenied));
}

#[test]
fn places_are_apart_from_each_other_and_used_again() {
    let space = space(256);
    let map = |len| space.map(&[(image(len).1, len)]);
    let start = layout::images_start(16, 256);
    let first = map(4096).unwrap();
    let second = map(200 << 20).unwrap();
    let third = map(4096).unwrap();
    let at = |memory: &ImageMemory| (memory.start() - start) / MEMORY_BLOCK;
    assert_eq!((at(&first), at(&second), at(&third)), (0, 1, 3));
    assert_eq!((first.size(), second.size()), (2 << 20, 202 << 20));
    for memory in [&first, &second, &third] {
        let (start, end) = (memory.start(), memory.start() + memory.size());
        assert!(space.has(start) && space.has(end - 1) && !space.has(start - 1) && !space.has(end));
    }
    drop(second);
    assert!(!space.has(start + MEMORY_BLOCK));
    let small = map(4096).unwrap();
    assert_eq!(at(&small), 1);
    let large = map(200 << 20).unwrap();
    assert_eq!(at(&large), 4, "two blocks do not fit between");
    let mut others: Vec<_> = (4..SLOTS).map(|_| map(1).unwrap()).collect();
    assert!(matches!(map(1), Err(ImageError::NoRoom(2))), "one for each slot");
    others.pop();
    assert!(map(1).is_ok());
}

#[test]
fn hostile_12_what_is_no_image_is_refused_with_a_reason_and_leaves_nothing() {
    let space = space(0);
    let refused = |file: OwnedFd, size| match space.map(&[(image(4096).1, 4096), (file, size)]) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    let (file, reader) = image(4096);
    file.as_file().set_len(100).unwrap();
    assert_eq!(refused(reader, 4096), "the file of image 1 has 100 bytes by now; is somebody changing it?");
    for size in [99, 101, 1 << 40] {
        assert!(refused(File::open(file.path()).unwrap().into(), size).contains("has 100 bytes"), "{size}");
    }
    let writable = OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
    assert_eq!(refused(writable.into(), 100), "image 1 is open for writing");
    for other in ["/dev/zero", "/", "/dev/kvm"] {
        assert_eq!(refused(File::open(other).unwrap().into(), 4096), "image 1 is no regular file", "{other}");
    }
    assert!(refused(std::io::pipe().unwrap().0.into(), 4096).contains("regular"));
    assert!(refused(File::open(file.path()).unwrap().into(), 0).contains("none of them empty"));
    assert!(matches!(space.map(&[]), Err(ImageError::Layout)));
    assert!(space.0.taken().iter().all(Option::is_none));
}

#[test]
fn images_beyond_the_processors_addresses_have_no_room() {
    let mut space = space(0);
    let inner = Arc::get_mut(&mut space.0).unwrap();
    inner.range.end = inner.range.start + (3 << 20);
    assert!(matches!(space.map(&[(image(2 << 20).1, 2 << 20)]), Err(ImageError::NoRoom(4))));
    assert!(space.map(&[(image(1 << 20).1, 1 << 20)]).is_ok());
}

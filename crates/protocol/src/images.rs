//! Where the images of one virtio-pmem device are in it: the shim tells the guest, and the VMM maps them there.
//!
//! The first page is empty. The guest's kernel looks there for a table of partitions, and an image must not be taken for one.

/// Most images of a device: they come in one message.
pub const MAX_IMAGES: usize = 60;

/// Images begin at multiples of this, and take multiples of it: the guest's page, without which it could not map them.
pub const IMAGE_ALIGN: u64 = 4096;

/// The device's size is a multiple of this, and so has to be its address: what Linux can make pages of (its subsection).
pub const DEVICE_ALIGN: u64 = 2 << 20;

const _: () = assert!(MAX_IMAGES <= crate::control::MAX_FDS);

/// Where images are, in bytes from the device's start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layout {
    /// Where each begins.
    pub offsets: Vec<u64>,
    /// The device's size.
    pub size: u64,
}

/// How much of the device an image of `size` bytes takes; `None` if it is empty or beyond all bounds.
pub fn taken(size: u64) -> Option<u64> {
    if size == 0 { None } else { size.checked_next_multiple_of(IMAGE_ALIGN) }
}

/// Where images of these sizes in bytes are; `None` for none or too many of them, or sizes that make no sense.
pub fn layout(sizes: &[u64]) -> Option<Layout> {
    if !(1..=MAX_IMAGES).contains(&sizes.len()) {
        return None;
    }
    let mut end = IMAGE_ALIGN;
    let mut offsets = Vec::with_capacity(sizes.len());
    for size in sizes {
        offsets.push(end);
        end = end.checked_add(taken(*size)?)?;
    }
    Some(Layout { offsets, size: end.checked_next_multiple_of(DEVICE_ALIGN)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_behind_each_other_in_whole_pages_after_an_empty_one() {
        let one = layout(&[4096]).unwrap();
        assert_eq!(one, Layout { offsets: vec![4096], size: 2 << 20 });
        let some = layout(&[1, 4097, (2 << 20) - 4096]).unwrap();
        assert_eq!(some, Layout { offsets: vec![4096, 8192, 16384], size: 4 << 20 });
        let full = layout(&[(2 << 20) - 4096]).unwrap();
        assert_eq!(full.size, 2 << 20);
    }

    #[test]
    fn hostile_12_images_that_cannot_be_are_refused() {
        for sizes in
            [&[][..], &[0], &[4096, 0], &[u64::MAX], &[u64::MAX - 4095], &[1 << 63, 1 << 63], &[1; MAX_IMAGES + 1]]
        {
            assert_eq!(layout(sizes), None, "{sizes:?}");
        }
        assert!(layout(&[1; MAX_IMAGES]).is_some());
    }
}

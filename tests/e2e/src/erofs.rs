//! Images of EROFS, as small and as plain as the kernel takes them (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h):
//! blocks of a page, compact inodes, nothing behind an inode but the one attribute that overlayfs looks for.

const BLOCK: usize = 4096;
const INODE: usize = 32;
/// All inodes are in the block after the superblock's.
const MOST_INODES: usize = BLOCK / INODE;
/// struct erofs_xattr_ibody_header, and an entry: `trusted.overlay.opaque` is `y`. It is as long as an inode.
const OPAQUE: &[u8; INODE] = b"\0\0\0\0\0\0\0\0\0\0\0\0\x0e\x04\x01\0overlay.opaquey\0";

/// What is at a path.
pub enum Entry {
    /// A directory.
    Directory,
    /// A directory in whose place a lower layer has nothing, as mkfs.erofs writes it (`--aufs`).
    OpaqueDirectory,
    /// A file that can be executed.
    Program(Vec<u8>),
    /// A file.
    File(Vec<u8>),
    /// A symbolic link.
    Link(&'static str),
}

struct Node {
    path: String,
    /// Which inode it is, by its place.
    number: usize,
    is_opaque: bool,
    mode: u16,
    kind: u8,
    data: Vec<u8>,
}

/// An image with these, each after its directory; the root is there.
pub fn image(entries: Vec<(&str, Entry)>) -> Vec<u8> {
    let root = [("", Entry::Directory)].into_iter().chain(entries);
    let mut next = 0;
    let mut nodes: Vec<_> = root
        .map(|(path, entry)| {
            let is_opaque = matches!(entry, Entry::OpaqueDirectory);
            let (mode, kind, data) = match entry {
                Entry::Directory | Entry::OpaqueDirectory => (0o040755, 2, Vec::new()),
                Entry::Program(data) => (0o100755, 1, data),
                Entry::File(data) => (0o100644, 1, data),
                Entry::Link(to) => (0o120777, 7, to.into()),
            };
            let path = if path.is_empty() { String::new() } else { format!("/{path}") };
            let number = next;
            next += 1 + usize::from(is_opaque);
            Node { path, number, is_opaque, mode, kind, data }
        })
        .collect();
    assert!(next <= MOST_INODES, "too many files for this");
    for at in 0..nodes.len() {
        if nodes[at].kind == 2 {
            nodes[at].data = directory(&nodes, at);
        }
    }
    let mut blocks = vec![0; 2 * BLOCK];
    for node in &nodes {
        let inode = inode(node, u32::try_from(blocks.len() / BLOCK).unwrap_or(0));
        blocks[BLOCK + node.number * INODE..][..inode.len()].copy_from_slice(&inode);
        blocks.extend(&node.data);
        blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
    }
    let superblock = superblock(nodes.len(), blocks.len() / BLOCK);
    blocks[1024..][..superblock.len()].copy_from_slice(&superblock);
    blocks
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// struct erofs_dirent, 12 bytes each, in the order of the names, which come after them.
fn directory(nodes: &[Node], at: usize) -> Vec<u8> {
    let own = &nodes[at];
    let up = nodes.iter().find(|node| node.path == parent(&own.path)).unwrap_or(own);
    let mut names = vec![(".", own), ("..", up)];
    let children = nodes.iter().skip(1).filter(|node| parent(&node.path) == own.path);
    names.extend(children.map(|node| (&node.path[own.path.len() + 1..], node)));
    names.sort_unstable_by_key(|(name, _)| *name);
    let mut offset = 12 * names.len();
    let (mut entries, mut text) = (Vec::new(), Vec::<u8>::new());
    for (name, node) in names {
        entries.extend((node.number as u64).to_le_bytes());
        entries.extend(u16::try_from(offset).unwrap_or(0).to_le_bytes());
        entries.extend([node.kind, 0]);
        text.extend(name.as_bytes());
        offset += name.len();
    }
    entries.extend(text);
    assert!(entries.len() <= BLOCK, "too many files in a directory for this");
    entries
}

/// struct erofs_inode_compact, whose data is in whole blocks from `block` on (EROFS_INODE_FLAT_PLAIN), and its attribute.
fn inode(node: &Node, block: u32) -> Vec<u8> {
    // In words behind the header, which counts as one.
    let attributes = if node.is_opaque { 1 + (INODE - 12) / 4 } else { 0 };
    let mut bytes = vec![0; 2];
    bytes.extend(u16::try_from(attributes).unwrap_or(0).to_le_bytes());
    bytes.extend(node.mode.to_le_bytes());
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(u32::try_from(node.data.len()).unwrap_or(0).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    bytes.extend(u32::try_from(node.number + 1).unwrap_or(0).to_le_bytes());
    bytes.resize(INODE, 0);
    if node.is_opaque {
        bytes.extend(OPAQUE);
    }
    bytes
}

/// struct erofs_super_block.
fn superblock(inodes: usize, blocks: usize) -> Vec<u8> {
    let mut bytes = 0xe0f5_e1e2_u32.to_le_bytes().to_vec();
    bytes.extend([0; 8]);
    // The block's size as a power of two; the root is the first inode.
    bytes.extend([12, 0, 0, 0]);
    bytes.extend((inodes as u64).to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend(u32::try_from(blocks).unwrap_or(0).to_le_bytes());
    // Where inodes are.
    bytes.extend(1_u32.to_le_bytes());
    bytes.resize(128, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_has_what_the_kernel_looks_for_where_it_looks() {
        let image = image(vec![
            ("b", Entry::OpaqueDirectory),
            ("b/file", Entry::File(vec![7; 5000])),
            ("a", Entry::Link("b/file")),
        ]);
        let u32_at = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(1024), image[1036], u32_at(1024 + 36), u32_at(1024 + 40)), (0xe0f5_e1e2, 12, 7, 1));
        assert_eq!(image.len(), 7 * BLOCK);
        // The root: `.`, `..`, `a`, `b`.
        let root = usize::try_from(u32_at(BLOCK + 16)).unwrap() * BLOCK;
        assert_eq!(&image[root + 48..root + 53], b"...ab");
        let nids = [0, 12, 24, 36].map(|at| image[root + at]);
        assert_eq!(nids, [0, 0, 4, 1]);
        assert_eq!(
            (image[BLOCK + INODE + 2], &image[BLOCK + 2 * INODE + 12..][..19]),
            (6, &b"\x0e\x04\x01\0overlay.opaquey"[..])
        );
        let file = BLOCK + 3 * INODE;
        assert_eq!((u32_at(file + 8), image[usize::try_from(u32_at(file + 16)).unwrap() * BLOCK]), (5000, 7));
    }
}

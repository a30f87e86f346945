//! Images of EROFS, as small and as plain as the kernel takes them (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h):
//! blocks of a page, compact inodes, nothing in an inode but itself.

const BLOCK: usize = 4096;
const INODE: usize = 32;
/// All inodes are in the block after the superblock's.
const MOST_INODES: usize = BLOCK / INODE;

/// What is at a path.
pub enum Entry {
    /// A directory.
    Directory,
    /// A file that can be executed.
    Program(Vec<u8>),
    /// A file.
    File(Vec<u8>),
    /// A symbolic link.
    Link(&'static str),
}

struct Node {
    path: String,
    mode: u16,
    kind: u8,
    data: Vec<u8>,
}

/// An image with these, each after its directory; the root is there.
pub fn image(entries: Vec<(&str, Entry)>) -> Vec<u8> {
    let mut nodes = vec![Node { path: String::new(), mode: 0o040755, kind: 2, data: Vec::new() }];
    nodes.extend(entries.into_iter().map(|(path, entry)| {
        let (mode, kind, data) = match entry {
            Entry::Directory => (0o040755, 2, Vec::new()),
            Entry::Program(data) => (0o100755, 1, data),
            Entry::File(data) => (0o100644, 1, data),
            Entry::Link(to) => (0o120777, 7, to.into()),
        };
        Node { path: format!("/{path}"), mode, kind, data }
    }));
    assert!(nodes.len() <= MOST_INODES, "too many files for this");
    for number in 0..nodes.len() {
        if nodes[number].kind == 2 {
            nodes[number].data = directory(&nodes, number);
        }
    }
    let mut blocks = vec![0; 2 * BLOCK];
    for (number, node) in nodes.iter().enumerate() {
        let at = u32::try_from(blocks.len() / BLOCK).unwrap_or(0);
        let inode = inode(node, number, at);
        blocks[BLOCK + number * INODE..][..INODE].copy_from_slice(&inode);
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
fn directory(nodes: &[Node], number: usize) -> Vec<u8> {
    let own = &nodes[number].path;
    let up = nodes.iter().position(|node| node.path == parent(own)).unwrap_or(0);
    let mut names = vec![(".", number), ("..", up)];
    let children = nodes.iter().enumerate().skip(1).filter(|(_, node)| parent(&node.path) == own);
    names.extend(children.map(|(number, node)| (&node.path[own.len() + 1..], number)));
    names.sort_unstable();
    let mut offset = 12 * names.len();
    let (mut entries, mut text) = (Vec::new(), Vec::<u8>::new());
    for (name, number) in names {
        entries.extend((number as u64).to_le_bytes());
        entries.extend(u16::try_from(offset).unwrap_or(0).to_le_bytes());
        entries.extend([nodes[number].kind, 0]);
        text.extend(name.as_bytes());
        offset += name.len();
    }
    entries.extend(text);
    assert!(entries.len() <= BLOCK, "too many files in a directory for this");
    entries
}

/// struct erofs_inode_compact, whose data is in whole blocks from `block` on (EROFS_INODE_FLAT_PLAIN).
fn inode(node: &Node, number: usize, block: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend(node.mode.to_le_bytes());
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(u32::try_from(node.data.len()).unwrap_or(0).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    bytes.extend(u32::try_from(number + 1).unwrap_or(0).to_le_bytes());
    bytes.resize(INODE, 0);
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
        let image =
            image(vec![("b", Entry::Directory), ("b/file", Entry::File(vec![7; 5000])), ("a", Entry::Link("b/file"))]);
        let u32_at = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(1024), image[1036], u32_at(1024 + 36), u32_at(1024 + 40)), (0xe0f5_e1e2, 12, 7, 1));
        assert_eq!(image.len(), 7 * BLOCK);
        // The root: `.`, `..`, `a`, `b`.
        let root = usize::try_from(u32_at(BLOCK + 16)).unwrap() * BLOCK;
        assert_eq!(&image[root + 48..root + 53], b"...ab");
        let nids = [0, 12, 24, 36].map(|at| image[root + at]);
        assert_eq!(nids, [0, 0, 3, 1]);
        let file = BLOCK + 2 * INODE;
        assert_eq!((u32_at(file + 8), image[usize::try_from(u32_at(file + 16)).unwrap() * BLOCK]), (5000, 7));
    }
}

//! Whether looking at something would load a kernel module on the node.

use std::path::Path;

/// Whether the kernel has the module as a file that is not loaded: asking for what it provides would load it, and a node
/// where nobody has asked for it yet has none of it. One that is built in, or that is not there at all, is never loaded.
pub fn would_load(module: &str) -> bool {
    if Path::new("/sys/module").join(module).exists() {
        return false;
    }
    let Ok(release) = rustix::system::uname().release().to_str().map(str::to_owned) else { return false };
    let listed = std::fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
    is_listed(&listed, module)
}

/// modules.dep(5): a line is the module's file, a colon, and those that it needs.
fn is_listed(dependencies: &str, module: &str) -> bool {
    let files = dependencies.lines().filter_map(|line| line.split(':').next());
    files.filter_map(|file| file.rsplit('/').next()).any(|file| file.split('.').next() == Some(module))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_is_found_by_the_name_of_its_file_alone() {
        let listed = "kernel/net/netfilter/nf_tables.ko.xz: kernel/net/netfilter/nfnetlink.ko.xz\nkernel/net/x.ko:\n";
        assert!(is_listed(listed, "nf_tables") && is_listed(listed, "x"));
        assert!(!is_listed(listed, "nfnetlink") && !is_listed(listed, "tables"));
    }
}

//! The table.

mod confined;
mod exec;
mod files;
mod lifecycle;
mod network;
mod plain;
mod pods;
mod posix;
mod streams;
mod volumes;

use super::Group;

/// All groups, in the order in which they run.
pub fn groups() -> Vec<Group> {
    let plain = Group::new("plain").probes(plain::probes()).probes(confined::probes());
    let mut groups = vec![
        plain,
        Group::new("lifecycle").acts(lifecycle::acts()),
        Group::new("execs").acts(exec::acts()),
        Group::new("streams").acts(streams::acts()),
        network::group(),
        volumes::group(),
    ];
    groups.extend(pods::groups());
    groups
}

//! From the shim's OCI spec to the one that libcontainer gets.
//!
//! The shim has left out what is the host's and what is the pod's ([`left_out`]). Here the container gets its place in the guest,
//! and what libcontainer would otherwise look up through NSS or inherit from the agent is filled in.

mod devices;
mod left_out;
mod links;

use std::path::PathBuf;

use oci_spec::runtime::{
    Capabilities, LinuxCapabilities, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Mount,
    Process, Spec,
};

use super::error::ContainerError;
use crate::runtime::{directory, home_dir, tmpfs};
use crate::sandbox::size;

/// Where the agent puts a container.
#[derive(Debug)]
pub struct Placement {
    /// Its control group, absolute below the mount point.
    pub cgroup: PathBuf,
    /// A process of the pid namespace that it joins; `None` for one of its own.
    pub pid_namespace: Option<u32>,
    /// A process in the pod's user and network namespaces; `None` if these are the guest's.
    pub holder: Option<u32>,
    /// Whether init gets a terminal.
    pub terminal: bool,
}

/// Reads a spec and makes it the guest's. Reads a file of the root file system, which the host may be slow to give.
pub fn adapt(json: &[u8], placement: &Placement) -> Result<Spec, ContainerError> {
    let mut spec: Spec =
        serde_json::from_slice(json).map_err(|source| ContainerError::Json { what: "spec", source })?;
    left_out::of_spec(&spec)?;
    let rootfs = spec.root().as_ref().ok_or(ContainerError::Incomplete { what: "root" })?.path().clone();
    let mut process = spec.process().clone().ok_or(ContainerError::Incomplete { what: "process" })?;
    let mut linux = spec.linux().clone().ok_or(ContainerError::Incomplete { what: "linux section" })?;
    fit_process(&mut process, placement.terminal, None);
    if let Some(resources) = linux.resources_mut() {
        fit_resources(resources);
    }
    let has_user = linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    if has_user {
        bind_what_a_user_namespace_cannot_mount(spec.mounts_mut().as_deref_mut().unwrap_or_default());
    }
    let namespaces = namespaces(linux.namespaces().as_deref().unwrap_or_default(), placement)?;
    linux.set_cgroups_path(Some(placement.cgroup.clone())).set_namespaces(Some(namespaces));
    spec.set_process(Some(process)).set_linux(Some(linux));
    links::follow(spec.mounts_mut().as_deref_mut().unwrap_or_default(), &rootfs);
    tmpfs::provide(&mut spec);
    if !has_user {
        devices::provide(&mut spec);
    }
    directory::provide(&mut spec).map_err(|source| {
        let cwd = spec.process().as_ref().map_or_else(PathBuf::new, |process| process.cwd().clone());
        ContainerError::WorkingDirectory { cwd, source }
    })?;
    Ok(spec)
}

/// Reads an exec's process and makes it the guest's; where it says nothing of capabilities or limits it has the container's.
pub fn adapt_process(json: &[u8], terminal: bool, init: Option<&Process>) -> Result<Process, ContainerError> {
    let mut process: Process =
        serde_json::from_slice(json).map_err(|source| ContainerError::Json { what: "process", source })?;
    left_out::of_process(&process)?;
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(init.and_then(|init| init.rlimits().clone()));
    }
    fit_process(&mut process, terminal, init.and_then(|init| init.capabilities().clone()));
    Ok(process)
}

/// Reads a resources object and makes it the guest's.
pub fn adapt_resources(json: &[u8]) -> Result<LinuxResources, ContainerError> {
    let mut resources: LinuxResources =
        serde_json::from_slice(json).map_err(|source| ContainerError::Json { what: "resources", source })?;
    fit_resources(&mut resources);
    Ok(resources)
}

/// mqueue shows the IPC namespace, which is the guest's and not the pod's user namespace's, so the kernel does not let it be
/// mounted from there (user_namespaces(7)). The guest's own shows the same.
fn bind_what_a_user_namespace_cannot_mount(mounts: &mut [Mount]) {
    for mount in mounts.iter_mut().filter(|mount| mount.typ().as_deref() == Some("mqueue")) {
        let mut options = mount.options().clone().unwrap_or_default();
        options.push("rbind".into());
        mount.set_typ(Some("bind".into())).set_source(Some("/dev/mqueue".into())).set_options(Some(options));
    }
}

/// Says to libcgroups what it would take for something else.
fn fit_resources(resources: &mut LinuxResources) {
    fit_shares(resources);
    if let Some(mut limits) = resources.hugepage_limits().clone() {
        // Of a page size that this kernel lacks there is nothing to limit; the host has named all that it knows.
        limits.retain(|limit| limit.limit() != 0 || size::has_huge_pages(limit.page_size()));
        resources.set_hugepage_limits(Some(limits));
    }
    let Some(memory) = *resources.memory() else { return };
    // No swap at all: libcgroups takes the difference of 0 for no wish.
    if memory.swap().is_some_and(|swap| swap > 0) && memory.swap() == memory.limit() {
        set_unified(resources, "memory.swap.max", "0".into());
    }
}

/// Sets a file of the control group unless the spec does.
fn set_unified(resources: &mut LinuxResources, file: &str, value: String) {
    let mut unified = resources.unified().clone().unwrap_or_default();
    unified.entry(file.into()).or_insert(value);
    resources.set_unified(Some(unified));
}

/// Says CPU shares as the weight that runc of the same generation as containerd 1.6 to 2.1 makes of them: a line through
/// both ends of the two ranges. libcgroups has a newer curve, and programs (the JVM) that read the weight reckon back. A group
/// that is to be idle has no weight: the kernel refuses one (cgroup-v2.rst, cpu.idle).
fn fit_shares(resources: &mut LinuxResources) {
    let Some(shares) = resources.cpu().as_ref().and_then(|cpu| cpu.shares()) else { return };
    let mut idle = false;
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_shares(None);
        idle = cpu.idle() == Some(1);
    }
    if !idle {
        set_unified(resources, "cpu.weight", weight(shares).to_string());
    }
}

/// A weight of 1 to 10000 for shares of 2 to 262144.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn fit_process(process: &mut Process, terminal: bool, capabilities: Option<LinuxCapabilities>) {
    fit_capabilities(process, capabilities);
    process.set_terminal(Some(terminal));
    // libcontainer takes the mere presence of the flag for the promise that filters can be installed without privilege.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // Otherwise inherited from the helper, whose own value is the agent's business.
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(Some(0));
    }
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|pair| pair.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        env.retain(|pair| pair != "HOME=");
        env.push(home_dir::PLACEHOLDER.into());
    }
    process.set_env(Some(env));
}

/// A set that is missing is empty; libcontainer would leave the agent's own, which is every capability.
fn fit_capabilities(process: &mut Process, otherwise: Option<LinuxCapabilities>) {
    let given = process.capabilities().clone().or(otherwise);
    let set = |of: fn(&LinuxCapabilities) -> &Option<Capabilities>| given.as_ref().and_then(|sets| of(sets).clone());
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(set(LinuxCapabilities::bounding).unwrap_or_default()))
        .set_effective(Some(set(LinuxCapabilities::effective).unwrap_or_default()))
        .set_inheritable(Some(set(LinuxCapabilities::inheritable).unwrap_or_default()))
        .set_permitted(Some(set(LinuxCapabilities::permitted).unwrap_or_default()))
        .set_ambient(Some(set(LinuxCapabilities::ambient).unwrap_or_default()));
    process.set_capabilities(Some(sets));
}

/// The container's namespaces: its own, those of the pod that are not the guest's, and the pid namespace that was asked for.
fn namespaces(wanted: &[LinuxNamespace], placement: &Placement) -> Result<Vec<LinuxNamespace>, ContainerError> {
    use LinuxNamespaceType::{Mount, Network, Pid, User};
    let own = wanted.iter().filter(|namespace| namespace.typ() != User);
    let mut kept: Vec<LinuxNamespace> = own.cloned().collect();
    // Without a mount namespace libcontainer would chroot, and mounts would be made in the guest's own.
    if !kept.iter().any(|namespace| namespace.typ() == Mount) {
        kept.push(namespace(Mount, None)?);
    }
    let of = |pid: u32, kind: &str| Some(format!("/proc/{pid}/ns/{kind}").into());
    if wanted.iter().any(|namespace| namespace.typ() == User) {
        let holder = placement.holder.ok_or(ContainerError::NoUserNamespace)?;
        kept.push(namespace(User, of(holder, "user"))?);
    }
    if let Some(holder) = placement.holder {
        kept.push(namespace(Network, of(holder, "net"))?);
    }
    kept.push(namespace(Pid, placement.pid_namespace.and_then(|pid| of(pid, "pid")))?);
    Ok(kept)
}

fn namespace(kind: LinuxNamespaceType, path: Option<PathBuf>) -> Result<LinuxNamespace, ContainerError> {
    let builder = LinuxNamespaceBuilder::default().typ(kind);
    let builder = match path {
        Some(path) => builder.path(path),
        None => builder,
    };
    builder.build().map_err(|_| ContainerError::Incomplete { what: "namespace type" })
}

#[cfg(test)]
mod tests;

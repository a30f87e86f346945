//! What the CRI's own description of a pod says about the VM around it: containerd's Sandbox API gives a shim no OCI spec
//! but a `PodSandboxConfig` (containerd: internal/cri/server/sandbox_run.go, podsandbox/helpers_linux.go).

use std::collections::HashMap;
use std::path::PathBuf;

use bulkhead_protocol::agent::UserNamespace;
use bulkhead_protocol::cri::{
    self, IDMapping, LinuxContainerResources, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig,
};
use bulkhead_protocol::vmspec::IdMaps;

use super::{Netns, SandboxSpec, SpecError, users};
use crate::annotations;

/// Translates a pod's configuration; refuses what shares a namespace of the host that a VM cannot share.
pub fn pod_sandbox(config: &PodSandboxConfig, id: &str, netns: &str) -> Result<SandboxSpec, SpecError> {
    let linux = config.linux.get_or_default();
    let namespaces = linux.security_context.namespace_options.get_or_default();
    if namespaces.network.enum_value_or_default() == NamespaceMode::NODE {
        return Err(SpecError::HostNetwork);
    }
    if namespaces.ipc.enum_value_or_default() == NamespaceMode::NODE {
        return Err(SpecError::HostIpc);
    }
    if namespaces.pid.enum_value_or_default() == NamespaceMode::NODE {
        return Err(SpecError::HostPid);
    }
    let user = namespaces.userns_options.as_ref().map(user_namespace).transpose()?.flatten();
    Ok(SandboxSpec {
        hostname: config.hostname.clone(),
        domainname: String::new(),
        netns: if netns.is_empty() { Netns::New } else { Netns::At(PathBuf::from(netns)) },
        user,
        share_ids: IdMaps::default(),
        private_roots: true,
        sysctls: linux.sysctls.clone(),
        cgroups_path: cgroups_path(linux, id),
        annotations: own_annotations(config, &linux.resources),
    })
}

/// The pod's own user namespace. There is no container or other pod whose it could be.
fn user_namespace(user: &cri::UserNamespace) -> Result<Option<UserNamespace>, SpecError> {
    fn ids(mappings: &[IDMapping]) -> impl Iterator<Item = (u32, u32)> {
        mappings.iter().map(|mapping| (mapping.container_id, mapping.length))
    }
    match user.mode.enum_value() {
        Ok(NamespaceMode::POD) => users::namespace(ids(&user.uids), ids(&user.gids)).map(Some),
        Ok(NamespaceMode::NODE) => Ok(None),
        _ => Err(SpecError::UserNamespaceMode(user.mode)),
    }
}

/// Where the sandbox is accounted, in the form that containerd writes into specs.
fn cgroups_path(linux: &LinuxPodSandboxConfig, id: &str) -> Option<PathBuf> {
    let parent = linux.cgroup_parent.trim_end_matches('/');
    let base = parent.rsplit('/').next().filter(|base| !base.is_empty())?;
    let systemd = base.ends_with(".slice");
    Some(if systemd { format!("{base}:cri-containerd:{id}").into() } else { PathBuf::from(parent).join(id) })
}

/// Our own annotations, and the pod's size in containerd's. The latter are made here: what the pod's owner wrote under
/// those names is not taken for them.
fn own_annotations(config: &PodSandboxConfig, resources: &LinuxContainerResources) -> HashMap<String, String> {
    let own = config.annotations.iter().filter(|(name, _)| name.starts_with(annotations::OWN_PREFIX));
    let mut all: HashMap<_, _> = own.map(|(name, value)| (name.clone(), value.clone())).collect();
    for (name, value) in [
        (annotations::CPU_PERIOD, resources.cpu_period),
        (annotations::CPU_QUOTA, resources.cpu_quota),
        (annotations::MEMORY, resources.memory_limit_in_bytes),
    ] {
        if value > 0 {
            all.insert(name.to_owned(), value.to_string());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageField;

    fn config() -> PodSandboxConfig {
        PodSandboxConfig {
            hostname: "web".into(),
            annotations: [
                ("io.kubernetes.cri.sandbox-memory", "99999999999"),
                ("io.bulkhead.vcpus", "2"),
                ("example.com/other", "x"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                sysctls: [("net.core.somaxconn".to_owned(), "7".to_owned())].into(),
                resources: MessageField::some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 150_000,
                    memory_limit_in_bytes: 1 << 20,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn pod_is_translated_and_its_owner_cannot_forge_its_size() {
        let spec = pod_sandbox(&config(), "s", "/run/netns/n").unwrap();
        assert_eq!((spec.hostname.as_str(), spec.netns), ("web", Netns::At("/run/netns/n".into())));
        assert_eq!(spec.cgroups_path, Some("/kubepods/pod1/s".into()));
        assert_eq!(spec.sysctls["net.core.somaxconn"], "7");
        let request = annotations::request(&spec.annotations, &[annotations::OWN_VCPUS.into()]).unwrap();
        assert_eq!((request.cpus, request.memory, request.own_vcpus), (Some(2), Some(1 << 20), Some(2)));
        assert!(!spec.annotations.contains_key("example.com/other"));
    }

    #[test]
    fn systemd_parent_becomes_a_scope() {
        let mut config = config();
        config.linux.mut_or_insert_default().cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".into();
        let spec = pod_sandbox(&config, "s", "/n").unwrap();
        assert_eq!(spec.cgroups_path, Some("kubepods-pod1.slice:cri-containerd:s".into()));
        assert_eq!((spec.user, pod_sandbox(&config, "s", "").unwrap().netns), (None, Netns::New));
    }

    #[test]
    fn user_namespace_is_seen_from_inside() {
        let mut config = config();
        let linux = config.linux.mut_or_insert_default();
        let options = linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
        let ids = |first| vec![IDMapping { host_id: 7 << 16, container_id: first, length: 9, ..Default::default() }];
        options.userns_options =
            MessageField::some(cri::UserNamespace { uids: ids(0), gids: ids(0), ..Default::default() });
        let spec = pod_sandbox(&config, "s", "").unwrap();
        let nine = || [(0, 9)].into_iter();
        assert_eq!((spec.user, spec.share_ids), (users::namespace(nine(), nine()).ok(), IdMaps::default()));
    }

    #[test]
    fn user_namespace_that_cannot_be_is_refused_and_never_left_out() {
        let with = |mode: i32, first| {
            let mut config = config();
            let linux = config.linux.mut_or_insert_default();
            let options = linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
            let ids = vec![IDMapping { host_id: 7 << 16, container_id: first, length: 9, ..Default::default() }];
            let mode = protobuf::EnumOrUnknown::from_i32(mode);
            options.userns_options =
                MessageField::some(cri::UserNamespace { mode, uids: ids.clone(), gids: ids, ..Default::default() });
            pod_sandbox(&config, "s", "")
        };
        let (pod, container, node, target, unknown) = (0, 1, 2, 3, 9);
        assert!(with(pod, 0).unwrap().user.is_some() && with(node, 0).unwrap().user.is_none());
        assert!(matches!(with(pod, 1), Err(SpecError::NoRoot)));
        for mode in [container, target, unknown] {
            assert!(matches!(with(mode, 0), Err(SpecError::UserNamespaceMode(_))), "{mode}");
        }
    }

    #[test]
    fn host_namespaces_are_refused() {
        let with = |change: fn(&mut bulkhead_protocol::cri::NamespaceOption)| {
            let mut config = config();
            let linux = config.linux.mut_or_insert_default();
            change(linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default());
            pod_sandbox(&config, "s", "/n")
        };
        assert!(matches!(with(|options| options.network = NamespaceMode::NODE.into()), Err(SpecError::HostNetwork)));
        assert!(matches!(with(|options| options.ipc = NamespaceMode::NODE.into()), Err(SpecError::HostIpc)));
        assert!(matches!(with(|options| options.pid = NamespaceMode::NODE.into()), Err(SpecError::HostPid)));
        assert!(with(|_| {}).is_ok());
    }
}

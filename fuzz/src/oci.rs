//! OCI specs and the CRI's description of a pod on their way into a guest. containerd passes on what a pod's author wrote.

use std::collections::BTreeSet;
use std::path::Path;

use bulkhead_protocol::cri::PodSandboxConfig;
use bulkhead_protocol::guest::{HUGE_PAGES_DIR, SHARE_DIR, SHM_DIR, VOLUMES_DIR};
use bulkhead_shim::annotations;
use bulkhead_shim::sizing::Limits;
use bulkhead_shim::spec::{
    DeviceNumber, Given, GuestDisk, GuestVolume, HugeVolume, disks, limits, parse_resources, pod_sandbox, sandbox,
    take_hooks, translate, translate_process, translate_resources, volumes,
};
use oci_spec::runtime::Spec;
use protobuf::Message;

/// The target. The first byte chooses: a container's spec, an exec's process, an update's resources, a pod of the CRI.
pub fn oci_spec(data: &[u8]) {
    let (kind, bytes) = data.split_first().unwrap_or((&0, &[]));
    match kind % 4 {
        0 => spec(bytes),
        1 => {
            if let Ok((process, _)) = translate_process(bytes) {
                translate_process(&process).expect("a translated process is one");
            }
        }
        2 => resources(bytes),
        _ => pod(bytes),
    }
}

fn spec(json: &[u8]) {
    let Ok(mut spec) = serde_json::from_slice::<Spec>(json) else { return };
    if let Ok(sandbox) = sandbox(&spec) {
        let _ = annotations::request(&sandbox.annotations, &[]);
        let _ = annotations::role(&sandbox.annotations);
    }
    let _ = limits(&spec);
    let (Ok(disks), Ok(_)) = (disks(&spec), take_hooks(&mut spec)) else { return };
    let in_guest = |(host, index)| GuestDisk { host, guest: DeviceNumber { major: 254, minor: index } };
    let huge_volumes = vec![HugeVolume::new(Path::new("/dev/hugepages"), 2048)];
    let Ok(volumes) = volumes(&spec, &huge_volumes) else { return };
    let given = Given {
        disks: disks.iter().map(|disk| disk.number).zip(0..).map(in_guest).collect(),
        huge_volumes,
        volumes: volumes.into_iter().zip(0..).map(|(host, number)| GuestVolume { host, number }).collect(),
    };
    let Ok(guest) = translate(spec, "id", &given) else { return };
    let spec: Spec = serde_json::from_slice(&guest.json).expect("a translated spec is one");
    check(&spec, given.volumes.len());
}

/// Nothing of the host's is left.
fn check(spec: &Spec, volumes: usize) {
    let root = spec.root().as_ref().expect("a root");
    assert_eq!(root.path(), &Path::new(SHARE_DIR).join("id/rootfs"));
    if let Some(linux) = spec.linux() {
        assert!(linux.cgroups_path().is_none() && linux.sysctl().is_none() && linux.mount_label().is_none());
        assert!(spec.hostname().is_none() && spec.domainname().is_none());
        assert!(linux.namespaces().iter().flatten().all(|namespace| namespace.path().is_none()));
    }
    let mut seen = BTreeSet::new();
    for mount in spec.mounts().iter().flatten() {
        let options = || mount.options().iter().flatten();
        let bind =
            mount.typ().as_deref() == Some("bind") || options().any(|option| option == "bind" || option == "rbind");
        let Some(source) = mount.source().as_deref().filter(|_| bind) else { continue };
        let ours = [SHARE_DIR, VOLUMES_DIR, SHM_DIR, HUGE_PAGES_DIR].iter().any(|dir| source.starts_with(dir));
        assert!(ours || source.starts_with("/dev"), "a bind of {source:?}");
        if source.starts_with(SHARE_DIR) || source.starts_with(VOLUMES_DIR) {
            seen.insert(source);
        }
    }
    assert_eq!(seen.len(), volumes);
}

fn resources(json: &[u8]) {
    let Ok(resources) = parse_resources(json) else { return };
    let limits = Limits::of(&resources);
    let _ = limits.larger(&limits);
    let json = translate_resources(resources).unwrap();
    parse_resources(&json).expect("translated resources are such");
}

fn pod(bytes: &[u8]) {
    let Ok(config) = PodSandboxConfig::parse_from_bytes(bytes) else { return };
    if let Ok(sandbox) = pod_sandbox(&config, "id", "/run/netns/fuzz") {
        assert!(sandbox.annotations.keys().all(|name| name.starts_with("io.")));
        let _ = annotations::request(&sandbox.annotations, &[annotations::OWN_VCPUS.into()]);
    }
}

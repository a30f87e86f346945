//! Translation of specs as containerd writes them.

use super::*;
use bulkhead_protocol::vmspec::{IdMap, IdMaps};
use serde_json::{Value, json};

fn spec(value: Value) -> Spec {
    serde_json::from_value(value).unwrap()
}

fn container() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "hostname": "pod-1",
        "domainname": "corp",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sh"],
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x"
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/sandboxes/s/shm", "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/pods/u/etc-hosts", "options": ["rbind", "rprivate", "ro"]},
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["bind", "rslave"]},
            {"destination": "/x", "type": "bind", "source": "/dev/null", "options": ["bind"]}
        ],
        "linux": {
            "cgroupsPath": "kubepods-pod1.slice:cri-containerd:c",
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
                {"type": "network", "path": "/proc/7/ns/net"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "uts", "path": "/proc/7/ns/uts"}
            ],
            "resources": {
                "cpu": {"shares": 2, "cpus": "3-4", "mems": "0"},
                "memory": {"limit": 1024},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]
            },
            "sysctl": {"net.core.somaxconn": "1"},
            "mountLabel": "x",
            "intelRdt": {"closID": "x"},
            "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "1"}
        }
    })
}

/// With its volumes in the share, numbered from 7.
fn translated(value: Value) -> (Value, GuestSpec) {
    let spec = spec(value);
    let volumes = volumes(&spec, &[]).unwrap().into_iter().zip(7..);
    let volumes = volumes.map(|(host, number)| GuestVolume { host, number }).collect();
    let guest = translate(spec, "c", &Given { volumes, ..Given::default() }).unwrap();
    (serde_json::from_slice(&guest.json).unwrap(), guest)
}

fn volumes_of(value: Value) -> Vec<Volume> {
    volumes(&spec(value), &[]).unwrap()
}

fn refusal(value: Value) -> SpecError {
    check(&spec(value), "c").unwrap_err()
}

#[test]
fn nothing_of_the_host_is_left() {
    let (json, guest) = translated(container());
    assert_eq!(json["root"]["path"], "/run/bulkhead/share/c/rootfs");
    assert_eq!(json["root"]["readonly"], true);
    let kinds: Vec<_> = json["linux"]["namespaces"].as_array().unwrap().iter().map(|n| n["type"].clone()).collect();
    assert_eq!(kinds, ["mount", "cgroup"]);
    assert!(json["hostname"].is_null() && json["domainname"].is_null());
    for key in ["mountLabel", "intelRdt", "uidMappings", "gidMappings"] {
        assert!(json["linux"][key].is_null(), "{key}");
    }
    assert!(json["linux"]["cgroupsPath"].is_null());
    assert!(json["linux"]["sysctl"].is_null());
    assert!(json["process"]["apparmorProfile"].is_null() && json["process"]["selinuxLabel"].is_null());
    assert_eq!(json["linux"]["resources"]["cpu"]["shares"], 2);
    assert!(json["linux"]["resources"]["cpu"]["cpus"].is_null() && json["linux"]["memoryPolicy"].is_null());
    assert_eq!(json["linux"]["resources"]["memory"]["limit"], 1024);
    assert_eq!(guest.pid, PidChoice::Own);
    assert!(!String::from_utf8_lossy(&guest.json).contains("/srv/data"));
}

#[test]
fn binds_come_through_the_share() {
    let (json, _) = translated(container());
    let sources: Vec<_> = json["mounts"].as_array().unwrap().iter().map(|m| m["source"].clone()).collect();
    assert_eq!(
        sources,
        ["proc", "/run/bulkhead/shm", "/run/bulkhead/share/.volumes/7", "/run/bulkhead/share/.volumes/8", "/dev/null"]
    );
    let hosts = Volume {
        source: "/var/lib/kubelet/pods/u/etc-hosts".into(),
        recursive: true,
        access: Access::ReadOnly,
        follows_host: false,
        copied: false,
        scratch: false,
        mapped_by: None,
    };
    let data = Volume {
        source: "/srv/data".into(),
        recursive: false,
        access: Access::ReadWrite,
        follows_host: true,
        copied: false,
        scratch: false,
        mapped_by: None,
    };
    assert_eq!(volumes_of(container()), [hosts, data]);
}

#[test]
fn no_bind_keeps_a_path_of_the_host() {
    let refused = translate(spec(container()), "c", &Given::default());
    assert!(
        matches!(refused, Err(SpecError::NotGiven(path)) if path == std::path::Path::new("/var/lib/kubelet/pods/u/etc-hosts"))
    );
    assert!(check(&spec(container()), "c").is_ok(), "nothing is given yet");
}

#[test]
fn volume_that_is_bound_twice_has_one_name_unless_it_is_bound_otherwise() {
    let mut value = container();
    let bind = |at: &str, option: &str| json!({"destination": at, "type": "bind", "source": "/srv/data", "options": ["rbind", option]});
    value["mounts"] = json!([bind("/a", "rw"), bind("/b", "ro"), bind("/c", "rw")]);
    assert_eq!(volumes_of(value.clone()).len(), 2);
    let (json, _) = translated(value);
    let names = ["7", "8", "7"].map(|name| json!(format!("/run/bulkhead/share/.volumes/{name}")));
    assert_eq!([0, 1, 2].map(|mount: usize| json["mounts"][mount]["source"].clone()), names);
}

#[test]
fn device_bound_onto_another_becomes_its_node() {
    let mut value = container();
    let bind = |source: &str, at: &str| json!({"destination": at, "type": "bind", "source": source, "options": ["ro"]});
    value["mounts"] = json!([
        bind("/dev/zero", "/dev/random"),
        bind("/dev/urandom", "/dev/random/"),
        bind("/dev/null", "/etc/motd"),
        bind("/srv/data", "/data")
    ]);
    let node =
        |path: &str, minor: u32| json!({"path": path, "type": "c", "major": 1, "minor": minor, "fileMode": 0o666});
    value["linux"]["devices"] = json!([node("/dev/random", 8), node("/dev/own", 3)]);
    let (json, _) = translated(value.clone());
    let places: Vec<_> = json["mounts"].as_array().unwrap().iter().map(|mount| mount["destination"].clone()).collect();
    assert_eq!(places, ["/etc/motd", "/data"]);
    assert_eq!(json["linux"]["devices"], json!([node("/dev/own", 3), node("/dev/random", 9)]));
    assert_eq!((volumes_of(value).len(), &json["mounts"][0]["source"]), (1, &json!("/dev/null")));
}

#[test]
fn volume_follows_the_host_if_it_is_asked_to() {
    for (access, propagation, follows) in [("rw", "rslave", true), ("ro", "rslave", true), ("ro", "rprivate", false)] {
        let mut value = container();
        value["mounts"][3]["options"] = json!(["rbind", propagation, access]);
        assert_eq!(volumes_of(value)[1].follows_host, follows, "{access}");
    }
}

#[test]
fn volumes_that_the_kubelet_updates_are_copied() {
    for (plugin, options, copied, access) in [
        ("configmap", json!(["rbind", "ro"]), true, Access::ReadOnly),
        ("projected", json!(["rbind", "rro"]), true, Access::ReadOnly),
        ("secret", json!(["rbind", "rw"]), false, Access::ReadWrite),
        ("empty-dir", json!(["rbind", "ro"]), false, Access::ReadOnly),
    ] {
        let mut value = container();
        value["mounts"][3]["source"] = format!("/var/lib/kubelet/pods/u/volumes/kubernetes.io~{plugin}/v").into();
        value["mounts"][3]["options"] = options;
        let (json, _) = translated(value.clone());
        let volume = &volumes_of(value)[1];
        assert_eq!((volume.copied, volume.access), (copied, access), "{plugin}");
        let dir = if copied { "volumes/c/8" } else { "share/.volumes/8" };
        assert_eq!(json["mounts"][3]["source"], format!("/run/bulkhead/{dir}"));
    }
}

#[test]
fn only_the_pods_own_empty_dirs_are_its_scratch() {
    let place = |pod: &str, plugin: &str| format!("/var/lib/kubelet/pods/{pod}/volumes/kubernetes.io~{plugin}/v");
    for (source, scratch) in [
        (place("u-1", "empty-dir"), true),
        (place("u-2", "empty-dir"), false),
        (place("u-1", "csi"), false),
        (place("u-1", "empty-dir") + "/below", false),
    ] {
        let mut value = container();
        value["mounts"][3]["source"] = source.clone().into();
        assert!(!volumes_of(value.clone())[1].scratch, "nobody says whose pod it is: {source}");
        value["annotations"] = json!({"io.kubernetes.cri.sandbox-uid": "u-1"});
        assert_eq!(volumes_of(value.clone())[1].scratch, scratch, "{source}");
        value["annotations"]["io.kubernetes.cri-o.ContainerType"] = "container".into();
        assert!(!volumes_of(value)[1].scratch, "under CRI-O the pod's author says it: {source}");
    }
}

#[test]
fn an_empty_dir_called_shm_is_a_volume() {
    let mut value = container();
    value["mounts"][1]["source"] = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/shm".into();
    assert_eq!(volumes_of(value).len(), 3);
}

#[test]
fn pid_namespace_is_told_by_the_reported_pid() {
    let mut value = container();
    value["linux"]["namespaces"][0]["path"] = "/proc/4711/ns/pid".into();
    assert_eq!(translated(value.clone()).1.pid, PidChoice::OfReported(4711));
    value["linux"]["namespaces"][0]["path"] = "/var/run/ns/pid".into();
    assert!(matches!(refusal(value.clone()), SpecError::PidPath(_)));
    value["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert_eq!(translated(value).1.pid, PidChoice::Pod);
}

#[test]
fn what_a_vm_cannot_do_is_refused() {
    let mut shared = container();
    shared["mounts"][3]["options"] = json!(["rbind", "rshared"]);
    assert!(matches!(refusal(shared), SpecError::Bidirectional(_)));
    let mut interface = container();
    interface["linux"]["netDevices"] = json!({"eth7": {"name": "eth1"}});
    assert!(matches!(refusal(interface), SpecError::NetDevices));
    let mut listener = container();
    listener["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock"});
    assert!(matches!(refusal(listener), SpecError::SeccompListener));
    let mut devices = container();
    devices["mounts"][3]["destination"] = "/dev/".into();
    assert!(matches!(refusal(devices), SpecError::Dev));
    let mut hooked = container();
    hooked["hooks"] = json!({"createContainer": [{"path": "/bin/true"}]});
    assert!(matches!(take_hooks(&mut spec(hooked)), Err(SpecError::CreateContainerHook)));
    let mut host_network = container();
    host_network["linux"]["namespaces"] = json!([{"type": "ipc"}]);
    assert!(matches!(sandbox(&spec(host_network.clone())), Err(SpecError::HostNetwork)));
    host_network["linux"]["namespaces"] = json!([{"type": "network"}]);
    assert!(matches!(sandbox(&spec(host_network)), Err(SpecError::HostIpc)));
}

#[test]
fn hooks_run_where_their_programs_are() {
    let hook = |path: &str| json!([{"path": path}]);
    let mut value = container();
    value["hooks"] = json!({
        "prestart": hook("/1"), "createRuntime": hook("/2"), "poststart": hook("/3"), "poststop": hook("/4"),
        "startContainer": hook("/5")
    });
    let mut hooked = spec(value);
    let host = take_hooks(&mut hooked).unwrap();
    let paths = |hooks: &[oci_spec::runtime::Hook]| hooks.iter().map(|hook| hook.path().clone()).collect::<Vec<_>>();
    assert_eq!(paths(&host.created), [std::path::Path::new("/1"), std::path::Path::new("/2")]);
    assert_eq!((paths(&host.started), paths(&host.deleted)), (vec!["/3".into()], vec!["/4".into()]));
    let (guest, _) = translated(serde_json::to_value(&hooked).unwrap());
    assert_eq!(guest["hooks"], json!({"startContainer": [{"path": "/5"}]}));
}

#[test]
fn ids_are_left_to_the_pods_user_namespace() {
    let map = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 65536}]);
    let mut value = container();
    value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "user", "path": "/proc/7/ns/user"}]);
    value["linux"]["uidMappings"] = map(131_072);
    value["linux"]["gidMappings"] = map(131_072);
    value["mounts"][3]["uidMappings"] = map(131_072);
    value["mounts"][3]["gidMappings"] = map(131_072);
    let (json, _) = translated(value);
    assert_eq!(json["linux"]["namespaces"], json!([{"type": "user"}]));
    assert!(json["linux"]["uidMappings"].is_null() && json["linux"]["gidMappings"].is_null());
    assert!(json["mounts"][3]["uidMappings"].is_null());
}

#[test]
fn sandbox_says_what_the_vm_is() {
    let mut value = container();
    value["linux"]["namespaces"][3]["path"] = "/var/run/netns/cni-1".into();
    let got = sandbox(&spec(value)).unwrap();
    assert_eq!((got.hostname.as_str(), got.netns), ("pod-1", Netns::At("/var/run/netns/cni-1".into())));
    assert_eq!((got.sysctls["net.core.somaxconn"].as_str(), got.domainname.as_str(), got.user), ("1", "corp", None));
}

#[test]
fn network_of_a_sandbox_with_a_user_namespace_comes_later() {
    let mut value = container();
    value["linux"]["namespaces"] = json!([{"type": "user"}, {"type": "network"}, {"type": "ipc"}, {"type": "pid"}]);
    value["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
    value["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 65536, "size": 2}]);
    let got = sandbox(&spec(value.clone())).unwrap();
    let user = users::namespace([(0, 65536)].into_iter(), [(0, 2)].into_iter()).unwrap();
    assert_eq!((got.netns, got.user, got.share_ids), (Netns::New, Some(user), IdMaps::default()));
    value["linux"]["gidMappings"][0]["containerID"] = 1.into();
    assert!(matches!(sandbox(&spec(value)), Err(SpecError::NoRoot)));
}

/// CRI-O has a container's files by the host's ids, and its volumes mapped.
#[test]
fn owners_of_crios_files_are_mapped_back() {
    let mut value = container();
    value["annotations"] = json!({"io.kubernetes.cri-o.ContainerType": "sandbox"});
    let user = json!({"type": "user", "path": "/var/run/userns/u"});
    value["linux"]["namespaces"] = json!([user, {"type": "network", "path": "/n"}, {"type": "ipc"}, {"type": "pid"}]);
    let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    for key in ["uidMappings", "gidMappings"] {
        value["linux"][key] = ids.clone();
        value["mounts"][3][key] = ids.clone();
    }
    let map = vec![IdMap { guest: 0, host: 100_000, count: 65536 }];
    let got = sandbox(&spec(value.clone())).unwrap();
    assert_eq!(got.share_ids, IdMaps { uids: map.clone(), gids: map });
    let (json, _) = translated(value.clone());
    let by: Vec<_> = volumes_of(value.clone()).into_iter().map(|volume| volume.mapped_by).collect();
    assert_eq!(by, [None, Some("/var/run/userns/u".into())]);
    assert!(json["mounts"][3]["uidMappings"].is_null());
    value["linux"]["namespaces"][0] = json!({"type": "user"});
    assert!(matches!(refusal(value.clone()), SpecError::VolumeIds(path) if path == std::path::Path::new("/data")));
    value["linux"]["uidMappings"][0]["hostID"] = u32::MAX.into();
    assert!(matches!(sandbox(&spec(value)), Err(SpecError::Ids)));
}

#[test]
fn process_and_resources_are_rewritten_alone() {
    let process = json!({
        "user": {"uid": 1, "gid": 1}, "cwd": "/", "args": ["x"], "apparmorProfile": "p",
        "execCPUAffinity": {"initial": "30-31", "final": "31"}
    });
    let translated = |process: &Value| translate_process(process.to_string().as_bytes()).unwrap();
    let (out, size) = translated(&process);
    let out: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(size, ConsoleSize::default());
    let sized = json!({"user": {"uid": 1, "gid": 1}, "cwd": "/", "consoleSize": {"height": 23, "width": 1_u64 << 40}});
    assert_eq!(translated(&sized).1, ConsoleSize { width: u32::MAX, height: 23 });
    assert!(out["apparmorProfile"].is_null() && out["execCPUAffinity"].is_null());
    let resources = json!({"cpu": {"quota": 5, "cpus": "1"}});
    let out: Value =
        serde_json::from_slice(&translate_resources(serde_json::from_value(resources).unwrap()).unwrap()).unwrap();
    assert_eq!(out["cpu"]["quota"], 5);
    assert!(translate_process(b"[]").is_err());
}

#[test]
fn volume_of_huge_pages_is_the_guests_own() {
    let mut value = container();
    let path = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/huge";
    value["mounts"] = json!([{"destination": "/huge", "type": "bind", "source": path, "options": ["rbind", "rw"]}]);
    let volume = HugeVolume::new(std::path::Path::new(path), 2048);
    let given = Given { huge_volumes: vec![volume.clone()], ..Given::default() };
    let spec = spec(value);
    assert_eq!(volumes(&spec, &given.huge_volumes).unwrap(), []);
    let guest = translate(spec, "c", &given).unwrap();
    let json: Value = serde_json::from_slice(&guest.json).unwrap();
    assert_eq!(json["mounts"][0]["source"], format!("/run/bulkhead/hugepages/{}", volume.name));
    assert_eq!(volume.name.len(), 32);
}

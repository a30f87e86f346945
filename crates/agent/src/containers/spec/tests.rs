use super::*;

const SPEC: &str = r#"{
  "ociVersion": "1.0.2",
  "root": {"path": "/nowhere/rootfs"},
  "process": {
    "terminal": true, "cwd": "/", "args": ["sh"], "env": ["PATH=/bin", "HOME="], "user": {"uid": 7, "gid": 7},
    "noNewPrivileges": false
  },
  "hooks": {"startContainer": [{"path": "/bin/of-the-image"}]},
  "linux": {
    "namespaces": [{"type": "cgroup"}],
    "maskedPaths": ["/proc/kcore"]
  }
}"#;

fn adapted(pid_namespace: Option<u32>) -> Spec {
    let placement = Placement { cgroup: "/pod/c".into(), pid_namespace, holder: None, terminal: false };
    adapt(SPEC.as_bytes(), &placement).unwrap()
}

fn kinds(spec: &Spec) -> Vec<(LinuxNamespaceType, Option<String>)> {
    let namespaces = spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
    namespaces.iter().map(|ns| (ns.typ(), ns.path().as_ref().map(|path| path.display().to_string()))).collect()
}

#[test]
fn container_has_its_own_namespaces_and_the_pid_namespace_that_was_asked_for() {
    use LinuxNamespaceType::{Cgroup, Mount, Pid};
    assert_eq!(kinds(&adapted(None)), [(Cgroup, None), (Mount, None), (Pid, None)]);
    let shared = Some("/proc/42/ns/pid".to_owned());
    assert_eq!(kinds(&adapted(Some(42))), [(Cgroup, None), (Mount, None), (Pid, shared)]);
}

#[test]
fn agent_chooses_the_group_and_the_streams_say_whether_there_is_a_terminal() {
    let spec = adapted(None);
    assert_eq!(spec.linux().as_ref().unwrap().cgroups_path().as_deref(), Some(std::path::Path::new("/pod/c")));
    assert_eq!(spec.process().as_ref().unwrap().terminal(), Some(false));
    assert_eq!(spec.hooks().as_ref().unwrap().start_container().as_ref().unwrap().len(), 1);
}

#[test]
fn what_belongs_to_the_host_or_the_pod_is_refused() {
    use serde_json::{Value, json};
    let placement = Placement { cgroup: "/pod/c".into(), pid_namespace: None, holder: None, terminal: false };
    let refused = |field: &str, value: &Value| {
        let mut spec: Value = serde_json::from_str(SPEC).unwrap();
        let (outer, inner) = field.split_once('.').unwrap_or(("", field));
        let place = if outer.is_empty() { &mut spec } else { &mut spec[outer] };
        place[inner] = value.clone();
        match adapt(spec.to_string().as_bytes(), &placement) {
            Err(ContainerError::LeftIn { field: named }) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
    };
    let map = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    for (field, value) in [
        ("hostname", json!("pod")),
        ("domainname", json!("corp")),
        ("linux.uidMappings", map.clone()),
        ("linux.gidMappings", map),
        ("linux.sysctl", json!({"net.ipv4.ip_forward": "1"})),
        ("linux.mountLabel", json!("a:b:c")),
        ("linux.intelRdt", json!({"closID": "x"})),
        ("process.apparmorProfile", json!("cri-containerd.apparmor.d")),
        ("process.selinuxLabel", json!("a:b:c")),
    ] {
        refused(field, &value);
    }
    for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
        refused("hooks", &json!({kind: [{"path": "/usr/bin/host-tool"}]}));
    }
    for namespace in [
        json!({"type": "pid"}),
        json!({"type": "network"}),
        json!({"type": "uts"}),
        json!({"type": "ipc", "path": "/proc/1/ns/ipc"}),
        json!({"type": "user", "path": "/proc/1/ns/user"}),
    ] {
        refused("linux.namespaces", &json!([{"type": "cgroup"}, namespace]));
    }
    let exec = br#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "apparmorProfile": "x"}"#;
    assert!(matches!(adapt_process(exec, false, None), Err(ContainerError::LeftIn { .. })));
}

#[test]
fn what_would_be_inherited_or_looked_up_is_filled_in() {
    let spec = adapted(None);
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.env().as_ref().unwrap(), &["PATH=/bin", home_dir::PLACEHOLDER]);
    assert_eq!(process.oom_score_adj(), Some(0));
    assert_eq!(process.no_new_privileges(), None);
}

#[test]
fn shares_become_the_weight_that_runc_makes_of_them() {
    let weights = [(2, 1), (512, 20), (1024, 39), (262_144, 10_000), (1_u64 << 40, 10_000)];
    for (shares, weight) in weights {
        let resources =
            adapt_resources(format!(r#"{{"cpu": {{"shares": {shares}, "quota": 5}}}}"#).as_bytes()).unwrap();
        assert_eq!(resources.unified().as_ref().unwrap().get("cpu.weight"), Some(&weight.to_string()), "{shares}");
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(5));
    }
}

#[test]
fn group_that_is_to_be_idle_gets_no_weight() {
    let adapted = |idle: i64| adapt_resources(format!(r#"{{"cpu": {{"shares": 512, "idle": {idle}}}}}"#).as_bytes());
    let idle = adapted(1).unwrap();
    assert!(idle.unified().is_none());
    let cpu = idle.cpu().as_ref().unwrap();
    assert_eq!((cpu.shares(), cpu.idle()), (None, Some(1)));
    assert!(adapted(0).unwrap().unified().is_some());
}

#[test]
fn swap_equal_to_memory_means_no_swap() {
    let resources = adapt_resources(br#"{"memory": {"limit": 4096, "swap": 4096}}"#).unwrap();
    assert_eq!(resources.unified().as_ref().unwrap().get("memory.swap.max").map(String::as_str), Some("0"));
    assert!(adapt_resources(br#"{"memory": {"limit": 4096, "swap": 8192}}"#).unwrap().unified().is_none());
}

#[test]
fn exec_keeps_its_home() {
    let json = br#"{"cwd": "/", "args": ["id"], "env": ["HOME=/srv"], "user": {"uid": 0, "gid": 0}, "oomScoreAdj": 5}"#;
    let process = adapt_process(json, true, None).unwrap();
    assert_eq!(process.env().as_ref().unwrap(), &["HOME=/srv"]);
    assert_eq!((process.oom_score_adj(), process.terminal()), (Some(5), Some(true)));
}

#[test]
fn sets_of_capabilities_that_are_missing_are_empty() {
    use oci_spec::runtime::Capability::{Chown, Kill};
    let sets = |process: &Process| {
        let sets = process.capabilities().as_ref().unwrap();
        [sets.bounding(), sets.effective(), sets.inheritable(), sets.permitted(), sets.ambient()]
            .map(|set| set.as_ref().unwrap().iter().copied().collect::<Vec<_>>())
    };
    let spec = adapted(None);
    let init = spec.process().as_ref().unwrap();
    assert_eq!(sets(init), [const { Vec::new() }; 5]);
    let some = r#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": ["CAP_CHOWN"]}}"#;
    let process = adapt_process(some.as_bytes(), false, None).unwrap();
    assert_eq!(sets(&process), [vec![Chown], vec![], vec![], vec![], vec![]]);

    let none = br#"{"cwd": "/", "user": {"uid": 0, "gid": 0}}"#;
    let mut of_init = init.clone();
    let mut own = init.capabilities().clone().unwrap();
    own.set_permitted(Some([Kill].into()));
    of_init.set_capabilities(Some(own));
    let limit =
        |soft| serde_json::from_value(serde_json::json!({ "type": "RLIMIT_CORE", "soft": soft, "hard": 9 })).unwrap();
    of_init.set_rlimits(Some(vec![limit(3)]));
    let process = adapt_process(none, false, Some(&of_init)).unwrap();
    assert_eq!(sets(&process), [vec![], vec![], vec![], vec![Kill], vec![]]);
    assert_eq!(process.rlimits().as_deref(), Some(&[limit(3)][..]));
    let some =
        br#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "rlimits": [{"type": "RLIMIT_CORE", "soft": 4, "hard": 9}]}"#;
    let process = adapt_process(some, false, Some(&of_init)).unwrap();
    assert_eq!(process.rlimits().as_deref(), Some(&[limit(4)][..]));
}

#[test]
fn namespaces_of_a_pod_with_a_user_namespace_are_joined() {
    use LinuxNamespaceType::{Mount, Network, Pid, User};
    let with_user = SPEC.replace(r#"{"type": "cgroup"}"#, r#"{"type": "user"}"#);
    let placement = |holder| Placement { cgroup: "/pod/c".into(), pid_namespace: None, holder, terminal: false };
    let of = |kind: &str| Some(format!("/proc/7/ns/{kind}"));
    let spec = adapt(with_user.as_bytes(), &placement(Some(7))).unwrap();
    assert_eq!(kinds(&spec), [(Mount, None), (User, of("user")), (Network, of("net")), (Pid, None)]);
    let refused = adapt(with_user.as_bytes(), &placement(None));
    assert!(matches!(refused, Err(ContainerError::NoUserNamespace)));
}

#[test]
fn specs_that_lack_something_are_refused() {
    let placement = Placement { cgroup: "/pod/c".into(), pid_namespace: None, holder: None, terminal: false };
    assert!(matches!(adapt(b"{", &placement), Err(ContainerError::Json { .. })));
    let bare = br#"{"ociVersion": "1.0.2", "root": {"path": "/x"}}"#;
    assert!(matches!(adapt(bare, &placement), Err(ContainerError::Incomplete { what: "process" })));
}

#[test]
fn resources_that_are_none_are_refused() {
    assert!(matches!(adapt_resources(b"{"), Err(ContainerError::Json { what: "resources", .. })));
}

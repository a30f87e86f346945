//! Sizes of pods, on a node of 8 CPUs and 16 GiB.

use serde_json::{Value, json};

use super::*;
use crate::config::Node;

const NODE: Node = Node { cpus: 8, memory_mib: 16 << 10 };

fn plan(config: &str, request: Request) -> Result<Plan, SizeError> {
    Plan::new(&Config::validate(toml::from_str(config).unwrap(), NODE).unwrap(), &request)
}

fn limits(value: Value) -> Limits {
    Limits::of(&serde_json::from_value(value).unwrap())
}

fn memory(mib: u64) -> Limits {
    Limits { memory: Some(mib << 20), ..Limits::default() }
}

#[test]
fn pod_boots_small_and_may_grow_to_what_the_node_has() {
    let plan = plan("", Request::default()).unwrap();
    assert_eq!((plan.vcpus, plan.boot_mib, plan.hotplug_mib), (8, 256, 16 * 1024 - 256));
    assert_eq!(plan.initial, Target { cpus: 4, ..Target::default() });
}

#[test]
fn annotations_tell_the_size_before_there_are_containers() {
    let request = Request { cpus: Some(3), memory: Some(512 << 20), ..Request::default() };
    let plan = plan("default_vcpus = 1\nmax_vcpus = 4\nmax_memory_mib = 1000", request).unwrap();
    assert_eq!((plan.vcpus, plan.hotplug_mib), (4, 640));
    assert_eq!((plan.initial.cpus, plan.initial.plugged_mib), (3, 512));
}

#[test]
fn own_annotations_fix_the_size() {
    let request = Request { own_vcpus: Some(2), own_memory_mib: Some(512), ..Request::default() };
    let fixed = plan("", request).unwrap();
    assert_eq!((fixed.vcpus, fixed.boot_mib, fixed.hotplug_mib), (2, 512, 0));
    let large = limits(json!({"memory": {"limit": 1i64 << 40}, "cpu": {"quota": 500_000, "period": 100_000}}));
    assert_eq!(fixed.target([&large]).unwrap(), Target { cpus: 2, ..Target::default() });
    assert!(plan("", Request { own_vcpus: Some(9), ..Request::default() }).is_err());
    assert!(plan("", Request { own_memory_mib: Some(1), ..Request::default() }).is_err());
}

#[test]
fn large_images_need_room_for_their_pages_notes() {
    let plan = plan("default_vcpus = 2", Request::default()).unwrap();
    let images = |mib: u64| Limits { image_bytes: mib << 20, ..Limits::default() };
    let plugged = |containers: &[&Limits]| plan.target(containers.iter().copied()).unwrap().plugged_mib;
    assert_eq!(plugged(&[&images(1024)]), 0);
    assert_eq!(plugged(&[&images(640), &images(640)]), 20);
    assert_eq!(plugged(&[&images(2048), &memory(100)]), 132);
}

#[test]
fn containers_add_up() {
    let plan = plan("default_vcpus = 2", Request::default()).unwrap();
    let half = limits(json!({"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": 100 << 20}}));
    let none = limits(json!({"cpu": {"quota": -1, "period": 100_000}, "memory": {"limit": -1}}));
    assert_eq!(plan.target([&half, &none]).unwrap(), Target { cpus: 2, plugged_mib: 100, ..Target::default() });
    assert_eq!(plan.target([&half, &half, &none]).unwrap().cpus, 3);
    assert_eq!(plan.target([&half; 20]).unwrap().cpus, 8);
    assert_eq!(plan.target([&memory(1), &memory(2)]).unwrap().plugged_mib, 3);
    assert_eq!(plan.target([]).unwrap(), Target { cpus: 2, ..Target::default() });
}

#[test]
fn cpus_are_those_of_limits_or_of_requests_whichever_are_more() {
    let plan = plan("default_vcpus = 2", Request::default()).unwrap();
    let of = |shares: u64, quota: i64| limits(json!({"cpu": {"shares": shares, "quota": quota, "period": 100_000}}));
    let cpus = |containers: &[Limits]| plan.target(containers).unwrap().cpus;
    assert_eq!(cpus(&[of(2, -1)]), 2);
    assert_eq!(cpus(&[of(2560, -1), of(512, -1)]), 3);
    assert_eq!(cpus(&[of(2560, -1), of(513, -1)]), 4);
    assert_eq!(cpus(&[of(1024, 500_000)]), 5);
    assert_eq!(cpus(&[of(3072, 100_000)]), 3);
    assert_eq!(cpus(&vec![of(2, -1); 2000]), 2, "the kubelet's 2 is a request for nothing");
    assert_eq!(cpus(&[of(u64::MAX, i64::MAX), of(u64::MAX, i64::MAX)]), 8);
}

#[test]
fn huge_pages_are_memory_of_their_own() {
    let plan = plan("", Request::default()).unwrap();
    let huge = limits(json!({
        "memory": {"limit": 64 << 20},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 32 << 20}, {"pageSize": "1GB", "limit": 0}]
    }));
    let target = plan.target([&huge, &huge]).unwrap();
    assert_eq!(target.plugged_mib, 192);
    assert_eq!(target.huge_pages, [(2048, 32), (1 << 20, 0)].into());
}

#[test]
fn ceiling_that_the_operator_set_is_an_error_and_the_nodes_own_is_not() {
    let set = plan("max_memory_mib = 512", Request::default()).unwrap();
    assert!(set.target([&memory(256)]).is_ok());
    let error = set.target([&memory(200), &memory(57)]).unwrap_err().to_string();
    assert!(error.contains("257 MiB") && error.contains("max_memory_mib"), "{error}");
    let open = plan("", Request::default()).unwrap();
    assert_eq!(open.target([&memory(64 << 10)]).unwrap().plugged_mib, open.hotplug_mib);
}

#[test]
fn memory_without_a_limit_doubles_and_is_halved_within_what_the_host_and_the_operator_have() {
    let steps = |plan: &Plan, limits_mib, most_mib| {
        let mut steps = vec![0];
        while let Some(next) = plan.step_up(*steps.last().unwrap(), limits_mib, most_mib) {
            steps.push(next);
        }
        steps
    };
    let plan = plan("max_memory_mib = 4096", Request::default()).unwrap();
    let all = [0, 256, 768, 1792, 3840];
    assert_eq!(steps(&plan, 0, u64::MAX), all);
    assert_eq!(steps(&plan, 0, 1000), [0, 256, 640], "whole blocks of what the host has");
    assert_eq!(steps(&plan, 1000, u64::MAX), [0, 256, 768, 1792, 2816], "what has a limit keeps it");
    assert_eq!(steps(&plan, 0, 256), [0]);
    assert_eq!(steps(&plan, u64::MAX, 0), [0]);
    let down: Vec<_> = std::iter::successors(Some(3840), |now| plan.step_down(*now)).collect();
    assert_eq!(down, all.iter().rev().copied().collect::<Vec<_>>());
    assert_eq!(plan.step_down(128), Some(0));
    let fixed = self::plan("", Request { own_memory_mib: Some(512), ..Request::default() }).unwrap();
    assert_eq!(steps(&fixed, 0, u64::MAX), [0]);
}

#[test]
fn update_changes_what_it_names() {
    let mut limits = limits(json!({"cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 1 << 20}}));
    let before = limits.clone();
    limits.update(&serde_json::from_value(json!({"cpu": {"shares": 2}, "memory": {"limit": 0}})).unwrap());
    assert_eq!(limits, before);
    limits
        .update(&serde_json::from_value(json!({"cpu": {"quota": 200_000, "period": 100_000, "cpus": "0-3"}})).unwrap());
    assert_eq!(
        (limits.millicpus, limits.memory, limits.host_cpus.as_deref()),
        (Some(2000), Some(1 << 20), Some("0-3"))
    );
    limits.update(&serde_json::from_value(json!({"cpu": {"quota": -1}, "memory": {"limit": -1}})).unwrap());
    assert_eq!((limits.millicpus, limits.memory), (None, None));
    assert_eq!(limits.larger(&before), Limits { host_cpus: None, ..before });
}

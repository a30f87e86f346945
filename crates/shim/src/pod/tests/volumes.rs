//! What a guest is told of its containers' volumes.

use serde_json::{Value, json};

use super::*;

/// The bundle of a container with a volume of its own and one that the kubelet updates.
fn bundle(at: PathBuf, data: &Path, map: &Path) -> PathBuf {
    std::fs::create_dir_all(at.join("rootfs")).unwrap();
    let bind = |to: &str, source: &Path, access: &str| json!({ "destination": to, "type": "bind", "source": source, "options": ["rbind", access] });
    let spec = json!({
        "ociVersion": "1.1.0",
        "root": { "path": "rootfs" },
        "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "annotations": {
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s",
        },
        "mounts": [bind("/map", map, "ro"), bind("/data", data, "rw"), bind("/again", data, "rw")],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
    });
    std::fs::write(at.join("config.json"), spec.to_string()).unwrap();
    at
}

#[test]
fn guest_is_told_under_which_number_each_volume_is_in_the_share() {
    with_mounts(async |dir| {
        let fixture = pod_that_mounts(&dir).await;
        let (data, map) = (dir.join("data"), dir.join("volumes/kubernetes.io~configmap/map"));
        std::fs::create_dir(&data).unwrap();
        std::fs::create_dir_all(map.join("..1")).unwrap();
        std::os::unix::fs::symlink("..1", map.join("..data")).unwrap();
        let mut told = Vec::new();
        for id in ["one", "two"] {
            let bundle = bundle(dir.join(id), &data, &map);
            let task = CreateTask { id: id.into(), bundle, ..CreateTask::default() };
            fixture.pod.clone().create(creation(), task).await.unwrap();
            let request = fixture.agent.created(id);
            let spec: Value = serde_json::from_slice(&request.spec).unwrap();
            let sources = [0, 1, 2].map(|mount: usize| spec["mounts"][mount]["source"].clone());
            let [data, map] = request.volumes[..] else { panic!("{:?}", request.volumes) };
            let shared = json!(format!("/run/bulkhead/share/.volumes/{data}"));
            assert_eq!(sources, [json!(format!("/run/bulkhead/volumes/{id}/{map}")), shared.clone(), shared]);
            let copied: Vec<_> = request.copied_volumes.iter().map(|one| (one.number, &*one.version)).collect();
            assert_eq!(copied, [(map, "..1")]);
            told.push(request.volumes);
        }
        assert_eq!(told[0], told[1], "the containers have them in common");
        let share = fixture.pod.identity.run_dir.share();
        let names = |at: &str| {
            let entries = std::fs::read_dir(share.join(at)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names("one"), ["rootfs"], "a volume has no other name");
        for left in [2, 0] {
            fixture.delete(if left == 2 { "one" } else { "two" }, "").await.unwrap().unwrap();
            assert_eq!(names(".volumes").len(), left);
        }
    });
}

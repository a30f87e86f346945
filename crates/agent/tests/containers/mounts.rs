//! Mounts that libcontainer alone would make otherwise than runc, or not at all.

use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::stdio::Stream;
use serde_json::{Value, json};

use crate::fixture::{self, Guest, streams};

/// The output of a container that runs a script as root.
async fn run(guest: &Guest, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let spec = fixture::spec(guest, id, &["sh", "-c", script], |spec| {
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        spec["process"]["cwd"] = "/".into();
        let capabilities = ["CAP_DAC_OVERRIDE"];
        spec["process"]["capabilities"] =
            json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
        change(spec);
    });
    guest.create_with(id, spec, streams("oe"), PidNamespace::PID_NAMESPACE_OWN, "").await.unwrap();
    guest.start_container(id).await.unwrap();
    guest.wait(id, "").await.unwrap();
    guest.read(id, "", Stream::Stdout).await + &guest.read(id, "", Stream::Stderr).await
}

fn add(spec: &mut Value, mounts: &[Value]) {
    spec["mounts"].as_array_mut().unwrap().extend_from_slice(mounts);
}

fn put(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A root file system with something of everything in /run.
fn with_run(guest: &Guest, id: &str) -> std::path::PathBuf {
    let rootfs = guest.dir().join(id).join("rootfs");
    fixture::make_rootfs(&rootfs);
    put(&rootfs.join("run/app/config"), "of the image");
    put(&rootfs.join("run/secrets/image"), "hidden");
    symlink("app/config", rootfs.join("run/link")).unwrap();
    // The owner first: a change of it clears set-id bits.
    for (path, owner, mode) in [("run", 0, 0o751), ("run/app", 33, 0o2770), ("run/app/config", 33, 0o4640)] {
        chown(rootfs.join(path), Some(owner), Some(owner)).unwrap();
        std::fs::set_permissions(rootfs.join(path), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    rootfs
}

const LOOK: &str = "ls -ldn /run /run/app /run/app/config | while read a b c d e; do echo $a $c $d; done; cat /run/link; \
                    ls /run/secrets; test -e /run/new; grep -c ' /run tmpfs' /proc/mounts";

const SEEN: &str = "drwxr-x--x 0 0\ndrwxrws--- 33 33\n-rwSr----- 33 33\nof the image";

#[tokio::test]
async fn tmpfs_gets_what_the_image_has_at_its_place() {
    let guest = Guest::start().await;
    guest.create_sandbox(&fixture::with_user_namespace()).await.unwrap();
    for id in ["plain", "user-namespace"] {
        let rootfs = with_run(&guest, id);
        let volume = guest.dir().join(format!("{id}-volume"));
        std::fs::create_dir(&volume).unwrap();
        let output = run(&guest, id, &format!("{LOOK}; echo x > /run/new && echo written"), |spec| {
            add(
                spec,
                &[
                    json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "nosuid", "tmpcopyup"]}),
                    json!({"destination": "/run/secrets", "type": "bind", "source": volume, "options": ["rbind"]}),
                ],
            );
            spec["root"]["readonly"] = true.into();
            if id == "user-namespace" {
                spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "user"}]);
            }
        })
        .await;
        assert_eq!(output, format!("{SEEN}1\nwritten\n"), "{id}");
        assert_eq!(std::fs::read_dir(&volume).unwrap().count(), 0, "a volume is no place of the image's");
        assert!(!rootfs.join("run/new").exists());
    }
}

#[tokio::test]
async fn tmpfs_that_is_read_only_gets_its_copy_first() {
    let guest = Guest::start().await;
    with_run(&guest, "c");
    let script = format!("{LOOK}; echo x > /run/new; grep -o ' /run tmpfs [a-z,]*' /proc/mounts");
    let output = run(&guest, "c", &script, |spec| {
        let options = ["ro", "nosuid", "noexec", "nodev", "tmpcopyup"];
        add(spec, &[json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": options})]);
    })
    .await;
    assert!(output.starts_with(&format!("{SEEN}image\n1\n")), "{output}");
    assert!(output.contains(" /run tmpfs ro,nosuid,nodev,noexec,") && output.contains("Read-only"), "{output}");
}

#[tokio::test]
async fn tmpfs_has_the_mode_of_what_it_hides() {
    let guest = Guest::start().await;
    with_run(&guest, "c");
    let output = run(&guest, "c", "ls -ld /run /new | cut -c1-10; ls /run", |spec| {
        let tmpfs = |at: &str| json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]});
        add(spec, &[tmpfs("/run"), tmpfs("/new")]);
    })
    .await;
    assert_eq!(output, "drwxrwxrwt\ndrwxr-x--x\n");
}

/// What the shim makes of a bind of one device onto another.
#[tokio::test]
async fn device_of_the_spec_takes_the_place_of_a_containers_own() {
    let guest = Guest::start().await;
    let output = run(&guest, "c", "ls -l /dev/random | grep -o '1, *[0-9]*'; head -c 4 /dev/random | wc -c", |spec| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/random", "type": "c", "major": 1, "minor": 9, "fileMode": 0o666}]);
    })
    .await;
    assert_eq!(output, "1,   9\n4\n");
}

//! Pods with a user namespace (`hostUsers: false`). containerd 2.x makes the network of such a pod only when its sandbox
//! runs; older versions know nothing of it and make an ordinary pod, of which the rest holds as well.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;

use crate::volumes::KubeletDir;
use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_cli::net;
use bulkhead_e2e::port_forward::http_get;
use bulkhead_e2e::{Node, PATIENCE, on_node, sh};

/// What the kubelet gives a pod: 65536 ids that are no other pod's.
fn user_namespace() -> v1::UserNamespace {
    let ids = vec![v1::IdMapping { host_id: 131_072, container_id: 0, length: 65_536 }];
    v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids }
}

fn pod(config: &mut v1::PodSandboxConfig) {
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(options) = security.and_then(|security| security.namespace_options.as_mut()) {
        options.userns_options = Some(user_namespace());
    }
}

fn container(mut config: v1::ContainerConfig, pid: v1::NamespaceMode) -> v1::ContainerConfig {
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(options) = security.and_then(|security| security.namespace_options.as_mut()) {
        options.userns_options = Some(user_namespace());
        options.set_pid(pid);
    }
    config
}

/// Whether this containerd knows user namespaces.
async fn is_known(node: &Node) -> Result<bool> {
    let version = node.cri.runtime().version(v1::VersionRequest::default()).await?.into_inner().runtime_version;
    Ok(version.trim_start_matches('v').starts_with("2."))
}

#[test]
fn pod_has_its_network_its_ids_and_the_capabilities_over_its_own() {
    on_node(async |node| {
        let pod = node.pod_with("users", "bulkhead", pod).await?;
        let ids = if is_known(node).await? { "0 0 65536" } else { "0 0 4294967295" };
        let keeper = sh("main", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done");
        let main = pod.run(container(keeper, v1::NamespaceMode::Container)).await?;
        let map = pod.sh(&main, "cat /proc/self/uid_map").await?;
        ensure!(map.split_whitespace().collect::<Vec<_>>().join(" ") == ids, "{map}");
        // A raw socket, and a port below 1024: what root may do in a network namespace of its own.
        let script = "ping -c 1 -W 20 127.0.0.1 >/dev/null && mkdir /www && echo page > /www/index.html && \
                      busybox httpd -p 80 -h /www && ip -o addr show eth0";
        let shown = pod.sh(&main, script).await?;
        for address in pod.addresses().await? {
            ensure!(shown.contains(&format!("{address}/")), "{address} is not on the guest's eth0: {shown}");
            let address: IpAddr = address.parse()?;
            net::ping(address).await?;
            ensure!(net::http_get(address, 80, "/", PATIENCE).await?.trim() == "page", "wrong page from {address}");
        }
        ensure!(http_get(&pod, 80, "/").await? == "page", "port-forward does not reach the pod");
        // A second container has the same network and its own root; files are as they are on disk.
        let other = sh(
            "other",
            "wget -qO- http://127.0.0.1/ && stat -c '%u %g' / /etc/passwd && touch /made && stat -c %u /made",
        );
        let (status, out) = pod.run_to_end(container(other, v1::NamespaceMode::Container)).await?;
        ensure!(status.exit_code == 0 && out == "page\n0 0\n0 0\n0\n", "{} {out}", status.exit_code);
        Ok(())
    });
}

#[test]
fn pids_are_shared_and_volumes_keep_their_owners() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("users")?;
        let volume = kubelet.volume("empty-dir", "data")?;
        std::os::unix::fs::chown(&volume, Some(1000), Some(1000))?;
        let pod = node.pod_with("shared-users", "bulkhead", pod).await?;
        let keeper = sh("main", "exec sleep 3600");
        let main = pod.run(container(keeper, v1::NamespaceMode::Pod)).await?;
        let mut other =
            sh("other", "grep -al ^sleep /proc/[0-9]*/cmdline | wc -l; cd /volume; stat -c %u .; touch mine; echo $?");
        let ids = user_namespace();
        other.mounts.push(v1::Mount {
            container_path: "/volume".into(),
            host_path: volume.to_str().context("path")?.into(),
            uid_mappings: ids.uids,
            gid_mappings: ids.gids,
            ..Default::default()
        });
        let (status, out) = pod.run_to_end(container(other, v1::NamespaceMode::Pod)).await?;
        ensure!(status.exit_code == 0 && out == "1\n1000\n0\n", "{} {out}", status.exit_code);
        ensure!(std::fs::metadata(volume.join("mine"))?.uid() == 0, "root's file is not root's");
        pod.stop(&main, std::time::Duration::ZERO).await
    });
}

//! Pods with a configuration of their own: sysctls, names, shared pids, user, privileges.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use bulkhead_cli::cri::v1;

use super::plain::STATUS;
use crate::compat::Area::{Lifecycle, Network, Security};
use crate::compat::stage::ending;
use crate::compat::{Act, Group, Probe, Stage, act, pod_security, security, shell};

/// One pod for each configuration.
pub fn groups() -> Vec<Group> {
    vec![configured(), shared_pids(), privileged(), unlimited(), crowded()]
}

/// A cgroup on the node for a pod with this place.
fn own_cgroup(place: &Path) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(place.file_name().unwrap_or_default())
}

/// A pod that takes much of the node, for which the others' cases would have to wait.
fn unlimited() -> Group {
    Group::new("unlimited").acts(vec![act!(Lifecycle, "400 MiB and 2 GiB in a container without a limit", |stage| {
        let fill = "dd if=/dev/zero of=/dev/null count=1 2> /dev/null bs=";
        let script =
            format!("{fill}400M; echo $?; {fill}2000M; echo $?; grep -c 'oom_kill 0' /sys/fs/cgroup/memory.events");
        let id = stage.run(shell("roomy", &script)).await?;
        let status = stage.wait_exit(&id, 2 * crate::PATIENCE).await?;
        Ok(ending(&status) + &stage.text(&id, "stdout").await?)
    })])
}

/// A pod whose cgroup has less than what its containers, which have no limit, want: as it is with that of all pods.
fn crowded() -> Group {
    Group::new("crowded")
        .pod(|config, place| {
            let group = own_cgroup(place.root());
            // A failure shows in the case.
            let _ = std::fs::create_dir_all(&group);
            let _ = std::fs::write(group.join("memory.max"), "700M");
            let name = group.file_name().unwrap_or_default();
            config.linux.get_or_insert_default().cgroup_parent = format!("/{}", name.display());
        })
        .acts(vec![act!(Lifecycle, "processes that take memory without end, and no limit but the pod's", |stage| {
            let group = own_cgroup(stage.place.root());
            let sibling = stage.sleeper().await?;
            let fill = "tail -c 2000000000 /dev/zero";
            let bomb = shell("bomb", &format!("for i in 1 2 3; do {fill} & done; exec {fill}"));
            let bomb = stage.run(bomb).await?;
            let ended = ending(&stage.wait_exit(&bomb, 2 * crate::PATIENCE).await?);
            let alive = stage.shell(&sibling, "echo alive").await?;
            let limit = std::fs::read_to_string(group.join("memory.max"))?;
            // The group is nobody's but this case's, and must be gone with the pod.
            stage.cri().remove_pod(&stage.id).await?;
            std::fs::remove_dir(group)?;
            Ok(format!("{limit}{ended}{alive:?}"))
        })])
}

fn configured() -> Group {
    Group::new("configured.example")
        .pod(|config, _| {
            let sysctls = [
                ("net.ipv4.ip_unprivileged_port_start", "1000"),
                ("net.ipv4.ping_group_range", "100 200"),
                ("net.ipv4.ip_local_port_range", "20000 30000"),
                ("net.ipv4.tcp_syncookies", "0"),
                ("kernel.shm_rmid_forced", "1"),
                ("net.core.somaxconn", "777"),
                ("kernel.msgmax", "65536"),
                ("fs.mqueue.msg_max", "20"),
            ];
            let sysctls = sysctls.map(|(key, value)| (key.to_owned(), value.to_owned()));
            config.linux.get_or_insert_default().sysctls = HashMap::from(sysctls);
            config.dns_config = Some(v1::DnsConfig {
                servers: vec!["192.0.2.1".into(), "2001:db8::1".into()],
                searches: vec!["one.example".into(), "two.example".into()],
                options: vec!["ndots:2".into(), "timeout:1".into()],
            });
            pod_security(config).run_as_user = Some(v1::Int64Value { value: 1000 });
            pod_security(config).supplemental_groups = vec![77];
        })
        .probes([Probe::new("configured")
            .case(Security, "sysctls of the pod", "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range net/ipv4/ip_local_port_range net/ipv4/tcp_syncookies kernel/shm_rmid_forced net/core/somaxconn kernel/msgmax fs/mqueue/msg_max; ping -c 1 -W 5 127.0.0.1 | tail -2 | head -1")
            .case(Network, "DNS configuration of the pod", "cat /etc/resolv.conf")
            .case(Network, "host name with a domain", "hostname; hostname -f 2>&1; hostname -d 2>&1; cat /etc/hostname; cat /proc/sys/kernel/hostname; uname -n; env | grep HOSTNAME")
            .case(Security, "user of the pod is not the container's", STATUS)])
}

fn pids_of_pod(config: &mut v1::ContainerConfig) {
    let options = security(config).namespace_options.get_or_insert_default();
    options.pid = v1::NamespaceMode::Pod.into();
}

async fn shared(stage: &Stage, name: &str, script: &str) -> Result<(v1::ContainerConfig, String)> {
    let mut config = shell(name, script);
    pids_of_pod(&mut config);
    let id = stage.run(config.clone()).await?;
    Ok((config, id))
}

/// In a script: the pid of the process with these arguments.
fn pid_of(args: &str) -> String {
    format!("$(ps -o pid,args | awk '$2 \" \" $3 == \"{args}\" {{ print $1 }}')")
}

fn shared_pids() -> Group {
    let acts = shared_pid_acts();
    Group::new("shared-pids")
        .pod(|config, _| {
            pod_security(config).namespace_options.get_or_insert_default().pid = v1::NamespaceMode::Pod.into();
        })
        .acts(acts)
}

fn shared_pid_acts() -> Vec<Act> {
    vec![
        act!(Security, "processes of the pod are seen by all its containers", |stage| {
            let (_, one) = shared(stage, "one", "exec sleep 1111").await?;
            let (_, two) = shared(stage, "two", "exec sleep 2222").await?;
            let seen = stage.shell(&two, "ps -o user,args | grep -c '[s]leep [12][12]'; [ $(cat /proc/1/comm) != sh ] && echo pid 1 is the pod; [ $$ != 1 ] && echo own pid").await?;
            let other = stage.shell(&one, &format!("kill {}; echo $?", pid_of("sleep 2222"))).await?;
            let ended = stage.wait_exit(&two, crate::PATIENCE).await?;
            Ok(format!("{seen:?} {other:?} {}", ended.exit_code))
        }),
        act!(Security, "files of a sibling through its process", |stage| {
            let (config, one) = shared(stage, "owner", "echo secret > /only-here; echo ready; exec sleep 3333").await?;
            stage.wait_log(&config, "ready").await?;
            let (_, two) = shared(stage, "reader", "exec sleep 4444").await?;
            let seen = stage
                .shell(&two, &format!("cd /proc/{}/root && cat only-here; ls /only-here", pid_of("sleep 3333")))
                .await?;
            let signal = stage.shell(&one, &format!("kill -0 {} && echo may signal", pid_of("sleep 4444"))).await?;
            Ok(format!("{seen:?} {signal:?}"))
        }),
        act!(Security, "orphans in a shared pid namespace", |stage| {
            let (_, one) = shared(stage, "orphans", "(sh -c 'sleep 1 & exit' &); exec sleep 5555").await?;
            let seen = stage.shell(&one, "sleep 2; ps -o stat,comm | grep -c '^Z'; ps -o pid,ppid,args | awk '/sleep 5555/ && !/awk/ { print ($2 == 0) }'").await?;
            Ok(format!("{seen:?}"))
        }),
        act!(Security, "end of a container ends what it left in the shared namespace", |stage| {
            let (_, one) = shared(stage, "leaver", "sleep 6666 & sleep 1; exit 3").await?;
            let status = stage.wait_exit(&one, crate::PATIENCE).await?;
            stage.remove_container(&one).await?;
            let (_, two) = shared(stage, "witness", "exec sleep 7777").await?;
            let seen = stage.shell(&two, "ps -o args | grep -c '[s]leep 6666'").await?;
            Ok(format!("{} {seen:?}", status.exit_code))
        }),
        act!(Security, "ephemeral container with a target", |stage| {
            let target = stage.run(shell("target", "exec sleep 8888")).await?;
            let mut config = shell(
                "debugger",
                "ps -o pid,args | grep '[s]leep 8888'; cat /proc/1/comm; ls /proc/1/root/bin/probe; readlink /proc/1/exe; echo done; exec sleep 1000",
            );
            let options = security(&mut config).namespace_options.get_or_insert_default();
            options.pid = v1::NamespaceMode::Target.into();
            options.target_id.clone_from(&target);
            let id = stage.run(config.clone()).await?;
            stage.wait_log(&config, "done").await?;
            let out = stage.tagged_log(&id).await?;
            stage.stop(&target, std::time::Duration::ZERO).await?;
            let end = stage.wait_exit(&id, crate::PATIENCE).await?;
            Ok(format!("{out}with its target ends {}", end.exit_code))
        }),
        act!(Security, "memory shared between containers", |stage| {
            let (_, one) = shared(stage, "writer", "exec sleep 9999").await?;
            let (_, two) = shared(stage, "other", "exec sleep 9998").await?;
            stage.shell(&one, "echo shared > /dev/shm/file").await?;
            Ok(format!("{:?}", stage.shell(&two, "cat /dev/shm/file; readlink /proc/self/ns/ipc | cut -c1-4").await?))
        }),
    ]
}

fn privileged() -> Group {
    Group::new("privileged")
        .on_disk()
        .pod(|config, _| pod_security(config).privileged = true)
        .acts(super::files::privileged_acts())
        .probes([
            Probe::new("privileged")
                .security(|security| {
                    security.privileged = true;
                    security.masked_paths.clear();
                    security.readonly_paths.clear();
                })
                .case(Security, "status of a privileged container", STATUS)
                .case(Security, "mounts of a privileged container", "awk '{ n = 6; while ($(++n) != \"-\"); print $5, $6, $(n + 1) }' /proc/self/mountinfo | grep -E '^/(dev|proc|sys)'")
                .case(Security, "what a privileged container may", "mkdir -p /mnt; mount -t tmpfs x /mnt && umount /mnt && echo mount; touch /sys/fs/cgroup/x 2>&1; mkdir /sys/fs/cgroup/y && rmdir /sys/fs/cgroup/y && echo cgroup; cat /proc/sys/vm/swappiness > /tmp/s && cat /tmp/s > /proc/sys/vm/swappiness && echo sysctl; ip link set lo down && ip link set lo up && echo link; unshare -n true && echo namespace; dmesg >/dev/null && echo log; cd /dev/shm; mknod d c 1 3 && echo x > d && echo device; rm -f d")
                .case(Security, "exec rights of a privileged container", "probe calls | grep -E '^(mount|clock|chroot|setns|ptrace|syslog|socket packet|socket raw|unshare (mount|network|ipc)|trusted|mlockall|real-time|setpriority)'")
                .case(Security, "device nodes of a privileged container", "ls /dev")
                .differs("a privileged container has its guest's devices, which are others than the node's"),
            Probe::by_exec("privileged-exec")
                .security(|security| security.privileged = true)
                .case(Security, "exec in a privileged container", STATUS),
        ])
}

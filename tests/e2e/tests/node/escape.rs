//! What a container with all capabilities, and root of its guest, try against the host and other pods. Each test says what
//! is attempted, and asserts what the host sees of it; that it leaves nothing is the fixture's to check.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::guest_root::{self, privileged};
use bulkhead_e2e::processes::Processes;
use bulkhead_e2e::{Node, PATIENCE, TestPod, on_node, sh};
use bulkhead_protocol::guest::{ROOT_DIR, SHARED_VOLUMES};
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Where the guest's root has the pod's share.
const SHARE: &str = "/run/bulkhead/share";

/// What every host file that nobody may read says.
const SECRET: &str = "a secret of the host";

/// What of the host does not change, whatever a guest does.
#[derive(Debug, Eq, PartialEq)]
struct Host(BTreeMap<String, String>);

impl Host {
    fn look() -> Result<Self> {
        let mut seen = BTreeMap::new();
        for name in [
            "kernel/hostname",
            "kernel/core_pattern",
            "kernel/core_pipe_limit",
            "kernel/panic_on_oops",
            "vm/swappiness",
            "vm/panic_on_oom",
            "net/ipv4/ip_forward",
        ] {
            seen.insert(name.to_owned(), crate::read(&format!("/proc/sys/{name}"))?);
        }
        let modules = crate::read("/proc/modules")?;
        seen.insert("modules".into(), modules.lines().filter_map(|line| line.split(' ').next()).collect());
        seen.insert("devices".into(), listing(Path::new("/dev"))?);
        seen.insert("root".into(), listing(Path::new("/"))?);
        for file in ["bin/containerd-shim-bulkhead-v2", "lib/bulkhead-vmm", "lib/initramfs.cpio"] {
            let mut hasher = DefaultHasher::new();
            fs::read(format!("/run/node/{file}"))?.hash(&mut hasher);
            seen.insert(file.into(), hasher.finish().to_string());
        }
        Ok(Self(seen))
    }

    fn assert_unchanged(&self) -> Result<()> {
        let now = Self::look()?;
        for (what, before) in &self.0 {
            let now = now.0.get(what).map_or("", String::as_str);
            ensure!(now == before, "{what} of the host was {before:?} and is {now:?}");
        }
        Ok(())
    }
}

fn listing(directory: &Path) -> Result<String> {
    let mut names: Vec<_> = fs::read_dir(directory)?.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    Ok(names.iter().map(|name| format!("{} ", name.display())).collect())
}

/// A directory of the host that no pod is given, with a file in it that says [`SECRET`]; removed with the value.
struct Outside(PathBuf);

impl Outside {
    fn new(name: &str) -> Result<Self> {
        let directory = PathBuf::from(format!("/run/node/escape-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("host-secret"), SECRET)?;
        Ok(Self(directory))
    }

    /// Another directory beside it, for a volume.
    fn volume(&self) -> Result<PathBuf> {
        let directory = self.0.join("volume");
        fs::create_dir_all(&directory)?;
        Ok(directory)
    }

    fn secret(&self) -> PathBuf {
        self.0.join("host-secret")
    }

    /// Nothing but the secret is in it, and nothing is mounted.
    fn assert_untouched(&self) -> Result<()> {
        let list = listing(&self.0)?;
        ensure!(list == "host-secret ", "{} has {list}", self.0.display());
        ensure!(fs::read_to_string(self.secret())? == SECRET, "the host's file was changed");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains(&*self.0.to_string_lossy()), "something is mounted in {}", self.0.display());
        Ok(())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // Where a test has failed something may be mounted there, whose files are not this directory's.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().rev().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(&self.0)) {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn with_volume(mut config: v1::ContainerConfig, host: &Path, readonly: bool) -> v1::ContainerConfig {
    let host_path = host.display().to_string();
    config.mounts.push(v1::Mount { container_path: "/volume".into(), host_path, readonly, ..Default::default() });
    config
}

/// A pod with one container that has all capabilities.
async fn hostile(node: &Node, name: &str) -> Result<(TestPod, String)> {
    let pod = guest_root::pod(node, name).await?;
    let container = pod.run(privileged("main")).await?;
    Ok((pod, container))
}

#[test]
fn mounts_and_sysctls_of_the_guests_root_stay_in_the_guest() {
    on_node(async |node| {
        let host = Host::look()?;
        let (pod, container) = hostile(node, "mounts").await?;
        let out = guest_root::sh(
            &pod,
            &container,
            "for kind in tmpfs proc sysfs devtmpfs devpts cgroup2 mqueue debugfs tracefs securityfs configfs bpf; do
               $run mkdir -p /tmp/$kind; $run mount -t $kind $kind /tmp/$kind 2> /dev/null && echo mounted $kind
             done
             $run ls /tmp/devtmpfs /tmp/cgroup2
             $run mount -t tmpfs tmpfs /dev; $run mount --make-rshared /
             echo evil > /proc/sys/kernel/hostname; echo 7 > /proc/sys/vm/swappiness; echo 1 > /proc/sys/vm/panic_on_oom
             echo 0 > /proc/sys/net/ipv4/ip_forward
             $run cat /proc/1/comm /proc/mounts; $run ps",
        )
        .await?;
        ensure!(out.contains("mounted tmpfs") && out.contains("mounted proc"), "not the guest's root: {out}");
        for of_host in ["containerd", "docker-registry", "bulkhead-vmm", "/run/node", "cni0"] {
            ensure!(!out.contains(of_host), "the guest sees {of_host} of the host: {out}");
        }
        host.assert_unchanged()?;
        node.cri.remove_pod(&pod.id).await
    });
}

#[test]
fn device_numbers_of_the_host_lead_nowhere() {
    on_node(async |node| {
        let host = Host::look()?;
        let (pod, container) = hostile(node, "mknod").await?;
        // Disks, memory, ports, KVM, vhost, microcode; and what the guest itself has is a null device or none. Its loop devices
        // have nothing behind them.
        let script = "
            cd /dev && for device in 'b 8 0' 'b 8 1' 'b 252 0' 'b 253 0' 'b 254 0' 'b 259 0' 'b 1 0' 'c 1 1' 'c 1 2' \
                'c 1 4' 'c 10 232' 'c 10 237' 'c 10 238' 'c 10 241' 'c 10 184' 'c 10 229' 'c 4 64' 'c 5 3'; do
              rm -f node; mknod node $device || { echo no node $device; continue; }
              head -c 16 node > /dev/null 2>&1 && echo read $device
              echo x 2> /dev/null > node && echo wrote $device
            done
            rm -f node; mknod node b 7 0; echo loop $(head -c 16 node 2> /dev/null | wc -c); echo x 2> /dev/null > node && echo wrote loop; true";
        let out = pod.sh(&container, script).await?;
        ensure!(out == "loop 0", "{out}");
        let list = async |at: &str| pod.sh(&container, &format!("ls -d {at} 2> /dev/null; true")).await;
        ensure!(list("/sys/class/net/eth0").await? == "/sys/class/net/eth0", "no /sys to look into");
        ensure!(pod.sh(&container, "cat /sys/block/loop*/size | sort -u").await? == "0", "a loop device has a file");
        for absent in ["/sys/block/*", "/sys/bus/pci", "/sys/class/block/*", "/dev/kvm", "/dev/vhost*"] {
            let out = list(absent).await?;
            let out: Vec<_> = out.lines().filter(|line| !line.contains("/block/loop")).collect();
            ensure!(out.is_empty(), "in the guest there is {out:?}");
        }
        host.assert_unchanged()
    });
}

#[test]
fn kernel_modules_are_loaded_nowhere() {
    on_node(async |node| {
        let host = Host::look()?;
        let (pod, container) = hostile(node, "module").await?;
        let out = pod.sh(&container, "escape module").await?;
        ensure!(out == "init_module: ENOSYS\nfinit_module: ENOSYS", "{out}");
        host.assert_unchanged()
    });
}

#[test]
fn write_to_the_guest_image_is_seen_by_no_other_pod() {
    on_node(async |node| {
        let host = Host::look()?;
        let (pod, container) = hostile(node, "image").await?;
        let write = "$run mount -o remount,rw /; echo x > /planted; $run rm -f /init; echo x > /init; $run ls /";
        let out = guest_root::sh(&pod, &container, write).await?;
        ensure!(out.contains("planted"), "not the guest's root: {out}");
        let other = guest_root::pod(node, "next").await?;
        let container = other.run(privileged("main")).await?;
        let out = guest_root::sh(&other, &container, "$run ls / /init; $run wc -c /init").await?;
        ensure!(!out.contains("planted") && !out.contains("\n2 /init"), "{out}");
        host.assert_unchanged()
    });
}

#[test]
fn names_and_links_in_a_volume_do_not_reach_files_of_the_host() {
    on_node(async |node| {
        let outside = Outside::new("names")?;
        let volume = outside.volume()?;
        let secret = outside.secret();
        // Of the host's making, and of the container's.
        symlink(&secret, volume.join("absolute"))?;
        symlink("../host-secret", volume.join("relative"))?;
        symlink("..", volume.join("up"))?;
        // What may be read, by all the same ways.
        fs::write(volume.join("within"), "of the volume\n")?;
        symlink("within", volume.join("own-link"))?;
        let pod = guest_root::pod(node, "names").await?;
        let container = pod.run(with_volume(privileged("main"), &volume, false)).await?;
        let script = format!(
            "cd /volume; cat within own-link; ln -s {0} own; ln -s ../../../../../../{0} chain; ln -s /proc/self/root/{0} magic
             for name in absolute relative up/host-secret own chain magic ../host-secret ../../{0} {0}; do
               cat /volume/$name 2> /dev/null; ln /volume/$name hard 2> /dev/null && cat hard
             done; true",
            secret.display()
        );
        let out = pod.sh(&container, &script).await?;
        ensure!(out == "of the volume\nof the volume", "{out}");
        let script = format!(
            "$run cat {SHARE}/{SHARED_VOLUMES}/*/own-link
             for name in absolute relative up/host-secret own chain magic ../host-secret ../../../../../../{0}; do
               $run cat {SHARE}/{SHARED_VOLUMES}/*/$name 2> /dev/null
             done
             $run find {SHARE}/.. {SHARE} -name host-secret",
            secret.display()
        );
        let out = guest_root::sh(&pod, &container, &script).await?;
        ensure!(out.contains("of the volume"), "the guest's root does not reach the volume: {out}");
        ensure!(!out.contains(SECRET) && !out.contains("host-secret"), "{out}");
        node.cri.remove_pod(&pod.id).await?;
        ensure!(fs::read_to_string(&secret)? == SECRET, "the host's file was changed");
        Ok(())
    });
}

/// CVE-2021-30465: while a container exchanges a directory of a volume for a link, others mount the volume, and another one
/// below that directory, whose mount must not go where the link leads: not on the host, and not in the guest.
#[test]
fn hostile_25_swaps_of_directories_and_links_lead_neither_anyone_nor_a_mount_out() {
    on_node(async |node| {
        let outside = Outside::new("swaps")?;
        let (volume, second) = (outside.volume()?, outside.0.join("second"));
        fs::create_dir(&second)?;
        // One link leads to the host's directory, the other one to the guest's.
        for (directory, link, to) in [("inside", "link", &*outside.0), ("guest", "guest-link", Path::new("/run"))] {
            fs::create_dir(volume.join(directory))?;
            fs::write(volume.join(directory).join("host-secret"), "of the volume")?;
            symlink(to, volume.join(link))?;
        }
        fs::write(second.join("mark"), "of the second volume")?;
        let pod = guest_root::pod(node, "swaps").await?;
        let swapper = with_volume(privileged("swapper"), &volume, false);
        let swapper = pod.run(swapper).await?;
        let in_guest = "$run ls /run";
        let before = guest_root::sh(&pod, &swapper, in_guest).await?;
        let swap = "for pair in 'inside /volume/link' 'guest /volume/guest-link'; do
              escape swap /volume/$pair > /dev/null 2>&1 &
            done";
        pod.sh(&swapper, swap).await?;
        // Another container of the pod walks, and others come and go with the volume meanwhile.
        let mut walker = with_volume(sh("walker", ""), &volume, false);
        walker.command[2] =
            "i=0; while [ $i -lt 300 ]; do for way in inside link; do l=; read -r l < /volume/$way/host-secret; \
                             echo $l; done 2> /dev/null; i=$((i+1)); done; find /volume || true" // it meets swaps as well
                .into();
        let walker = pod.run(walker).await?;
        let late = |name: &str, below: &str| {
            let look = "cat /volume/*/host-secret; cat /volume/*/mounted/mark /run/mounted/mark; exit 0";
            let mut config = with_volume(with_volume(sh(name, look), &volume, false), &second, false);
            if let Some(mount) = config.mounts.last_mut() {
                mount.container_path = format!("/volume/{below}/mounted");
            }
            config
        };
        for number in 0..4 {
            match pod.run_to_end(late(&format!("late-{number}"), ["inside", "guest"][number % 2])).await {
                Ok((status, out)) => {
                    println!("escape: late-{number} says {out:?}");
                    ensure!(status.exit_code == 0 && !out.contains(SECRET), "{status:?} {out}");
                }
                // The directory was exchanged in the middle.
                Err(error) => println!("escape: late-{number} was refused: {error:#}"),
            }
        }
        let status = pod.wait_exit(&walker, PATIENCE).await?;
        let out = bulkhead_cli::log::text_of(&pod.log(&walker).await?, "stdout");
        ensure!(status.exit_code == 0 && out.contains("of the volume") && !out.contains(SECRET), "{status:?} {out}");
        pod.sh(&swapper, "killall escape").await?;
        // With everything in its place again, the same mount is where it should be.
        for (below, link) in [("inside", "link"), ("guest", "guest-link")] {
            if volume.join(below).is_symlink() {
                renameat_with(CWD, volume.join(below), CWD, volume.join(link), RenameFlags::EXCHANGE)?;
            }
            let (status, out) = pod.run_to_end(late(&format!("last-{below}"), below)).await?;
            ensure!(status.exit_code == 0 && out.contains("of the second volume"), "{status:?} {out}");
            ensure!(!out.contains(SECRET), "{out}");
        }
        let after = guest_root::sh(&pod, &swapper, in_guest).await?;
        ensure!(before == after, "the guest's /run had {before:?} and has {after:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains("/mounted"), "something is mounted on the host: {mounts}");
        node.cri.remove_pod(&pod.id).await?;
        fs::remove_dir_all(volume)?;
        ensure!(listing(&second)? == "mark ", "the second volume has {}", listing(&second)?);
        fs::remove_dir_all(second)?;
        outside.assert_untouched()
    });
}

#[test]
fn device_nodes_on_the_share_are_refused() {
    on_node(async |node| {
        let outside = Outside::new("nodes")?;
        let volume = outside.volume()?;
        let pod = guest_root::pod(node, "nodes").await?;
        let container = pod.run(with_volume(privileged("main"), &volume, false)).await?;
        // A fifo is made by the same call at the same place, and is no device.
        let made = "for where in /volume /; do
              mknod $where/fifo p && echo a fifo in $where
              mknod $where/null c 1 3 && echo made; mknod $where/disk b 8 0 && echo made
            done; true";
        let out = pod.sh(&container, made).await?;
        ensure!(out == "a fifo in /volume\na fifo in /", "{out}");
        let made = format!(
            "for where in {SHARE}/{SHARED_VOLUMES}/* {SHARE}/{container}/rootfs; do
               $run mknod $where/fifo-$$ p && echo a fifo in $where; $run rm $where/fifo-$$
               $run mknod $where/null c 1 3 && echo made; $run mknod $where/disk b 8 0 && echo made
             done"
        );
        let out = guest_root::sh(&pod, &container, &made).await?;
        for place in [format!("{container}/rootfs"), format!("{SHARED_VOLUMES}/")] {
            ensure!(out.contains(&format!("a fifo in {SHARE}/{place}")), "not {place}: {out}");
        }
        ensure!(!out.contains("made"), "{out}");
        // As the VMM has it: its mounts are not the node's.
        let share = PathBuf::from(format!("/proc/{}/root", Processes::of(&pod)?.vmm));
        let root = share.join(&container).join("rootfs");
        for directory in [volume, root] {
            ensure!(fs::symlink_metadata(directory.join("fifo"))?.file_type().is_fifo(), "not the pod's directory");
            for entry in fs::read_dir(directory)?.flatten() {
                let kind = entry.file_type()?;
                ensure!(!kind.is_block_device() && !kind.is_char_device(), "{} is a device", entry.path().display());
            }
        }
        Ok(())
    });
}

#[test]
fn shares_of_other_pods_and_the_hosts_files_are_not_in_a_guests_reach() {
    on_node(async |node| {
        let outside = Outside::new("search")?;
        let (pod, container) = hostile(node, "search").await?;
        // Another container of the same pod is of the same guest, and shows that the search finds what is there.
        let neighbour = pod.sleeper("neighbour").await?;
        pod.sh(&neighbour, "echo x > /of-the-own-pod").await?;
        let other = node.pod("other").await?;
        let victim = other.sleeper("main").await?;
        other.sh(&victim, "echo x > /of-another-pod").await?;
        let search = format!(
            "$run mount -t virtiofs share /tmp 2> /dev/null
             for root in {SHARE} {SHARE}/.. {SHARE}/../../../.. /tmp /tmp/..; do
               $run find $root -xdev -maxdepth 4 2> /dev/null | $run grep -e of-the-own-pod -e of-another-pod -e host-secret
             done
             $run find {SHARE} -name 'of-*' 2> /dev/null; $run ls -la {SHARE}"
        );
        let out = guest_root::sh(&pod, &container, &search).await?;
        ensure!(out.contains("of-the-own-pod"), "the search finds nothing: {out}");
        ensure!(!out.contains("of-another-pod") && !out.contains("host-secret"), "{out}");
        ensure!(!out.contains(&victim) && !out.contains(&other.id), "{out}");
        outside.assert_untouched()
    });
}

#[test]
fn vsock_connections_from_the_guest_are_reset() {
    on_node(async |node| {
        let (pod, container) = hostile(node, "vsock").await?;
        let out = pod.sh(&container, "escape vsock").await?;
        ensure!(out.lines().count() > 100 && !out.contains("connected"), "{out}");
        let to_host: Vec<_> = out.lines().filter(|line| line.starts_with("2:")).collect();
        ensure!(to_host.iter().step_by(2).all(|line| line.ends_with("ECONNRESET")), "{to_host:?}");
        ensure!(pod.sh(&container, "echo alive").await? == "alive", "the pod does not answer any more");
        Ok(())
    });
}

#[test]
fn read_only_volume_that_is_remounted_in_the_guest_refuses_writes() {
    on_node(async |node| {
        let outside = Outside::new("read-only")?;
        let volume = outside.volume()?;
        let file = volume.join("file");
        fs::write(&file, "as it was")?;
        let before = fs::metadata(&file)?;
        let pod = guest_root::pod(node, "read-only").await?;
        let container = pod.run(with_volume(privileged("main"), &volume, true)).await?;
        let writes = "mount -o remount,rw,bind /volume; mount -o remount,rw /volume; cd /volume
            for write in 'echo x > file' 'echo x >> file' 'truncate -s 0 file' 'rm file' 'mv file other' 'touch new' 'mkdir new' \
                'ln file hard' 'ln -s x soft' 'chmod 777 file' 'chown 1 file' 'touch -d 2000-01-01 file' 'mkfifo fifo' \
                'dd if=/dev/zero of=file conv=notrunc'; do
              sh -c \"$write\" 2> /dev/null && echo done: $write
            done; true";
        let out = pod.sh(&container, writes).await?;
        ensure!(out.is_empty(), "{out}");
        let writes = format!(
            "for at in {SHARE} {SHARE}/{SHARED_VOLUMES}/*; do $run mount -o remount,rw $at; done
             for file in {SHARE}/{SHARED_VOLUMES}/*/file; do
               $run cat $file && echo \" in $file\"
               echo x > $file && echo done; $run rm $file && echo done; $run chmod 777 $file && echo done
               $run truncate -s 0 $file && echo done
             done"
        );
        let out = guest_root::sh(&pod, &container, &writes).await?;
        ensure!(out.contains(&format!("as it was in {SHARE}/{SHARED_VOLUMES}/")) && !out.contains("done"), "{out}");
        let after = fs::metadata(&file)?;
        ensure!(listing(&volume)? == "file " && fs::read_to_string(&file)? == "as it was", "the volume was changed");
        let facts = |m: &fs::Metadata| (m.mode(), m.uid(), m.mtime(), m.mtime_nsec(), m.ino(), m.nlink());
        ensure!(facts(&before) == facts(&after), "the file was changed: {after:?}");
        Ok(())
    });
}

#[test]
fn localhost_and_interfaces_of_the_node_are_not_the_guests() {
    on_node(async |node| {
        let (pod, container) = hostile(node, "localhost").await?;
        // The registry listens on the node's localhost.
        std::net::TcpStream::connect("127.0.0.1:5000").context("the node has no registry")?;
        let look = "for address in 127.0.0.1 ::1 10.88.0.1 fd00:88::1; do
              $run nc -w 2 $address 5000 < /dev/null > /dev/null 2>&1 && echo connected to $address
            done
            $run ip -o link; $run ls /run/netns /proc/1/ns 2>&1; $run readlink /proc/1/ns/net; $run ip route";
        let out = guest_root::sh(&pod, &container, look).await?;
        ensure!(!out.contains("connected"), "{out}");
        for of_host in ["cni0", "veth", "tap-", "cni-"] {
            ensure!(!out.contains(of_host), "{of_host} of the node is in the guest: {out}");
        }
        Ok(())
    });
}

/// Plants something in the share before the shim mounts a container there, whose id the guest knows. Whether the container
/// comes to be does not matter.
async fn planted(node: &Node, name: &str, plant: impl Fn(&Path, &str) -> String) -> Result<()> {
    let outside = Outside::new(name)?;
    let (pod, container) = hostile(node, name).await?;
    let next = pod.create(sh("next", "exit 0")).await?;
    guest_root::sh(&pod, &container, &plant(&outside.0, &format!("{SHARE}/{next}"))).await?;
    let started = pod.start(&next).await;
    println!("escape: the start says {started:?}");
    outside.assert_untouched()?;
    let _ = pod.stop(&next, PATIENCE).await;
    let removed = pod.remove_container(&next).await;
    outside.assert_untouched()?;
    removed.context("the container cannot be removed")?;
    node.cri.remove_pod(&pod.id).await?;
    outside.assert_untouched()
}

#[test]
fn link_planted_for_the_next_container_does_not_redirect_mounts_of_the_host() {
    on_node(async |node| {
        planted(node, "plant-link", |outside, share| format!("$run ln -s {} {share}", outside.display())).await
    });
}

#[test]
fn link_planted_for_the_next_containers_root_does_not_redirect_mounts_of_the_host() {
    on_node(async |node| {
        let plant = |outside: &Path, share: &str| {
            format!("$run mkdir {share}; $run ln -s {} {share}/rootfs", outside.display())
        };
        planted(node, "plant-root", plant).await
    });
}

#[test]
fn directories_of_a_container_that_guest_root_moves_away_leave_no_mount() {
    on_node(async |node| {
        let outside = Outside::new("moved")?;
        let volume = outside.volume()?;
        let pod = guest_root::pod(node, "moved").await?;
        let container = pod.run(privileged("main")).await?;
        let mover = pod.run(with_volume(sh("mover", "sleep 3600"), &volume, false)).await?;
        // Moved, and a link to the host's directory in its place.
        let script = format!(
            "$run mv {SHARE}/{mover} {SHARE}/elsewhere; $run ln -s {} {SHARE}/{mover}; $run ls {SHARE}",
            outside.0.display()
        );
        guest_root::sh(&pod, &container, &script).await?;
        pod.stop(&mover, std::time::Duration::ZERO).await?;
        pod.remove_container(&mover).await?;
        ensure!(volume.is_dir() && fs::read_to_string(outside.secret())? == SECRET, "the host's files were removed");
        node.cri.remove_pod(&pod.id).await?;
        fs::remove_dir(volume).context("the volume is still mounted, or gone")?;
        outside.assert_untouched()
    });
}

#[test]
fn guest_root_cannot_fill_the_hosts_run_directory_through_the_share() {
    on_node(async |node| {
        let (pod, container) = hostile(node, "fill").await?;
        let fill = format!(
            "for at in {SHARE} {SHARE}/{SHARED_VOLUMES} {SHARE}/{container}; do
               $run dd if=/dev/zero of=$at/ballast bs=64k count=16; $run mkdir $at/directory; $run ln -s / $at/0
             done"
        );
        guest_root::sh(&pod, &container, &fill).await?;
        let share = Path::new("/run/bulkhead/k8s.io").join(&pod.id).join("share");
        let names = |at: PathBuf| -> Result<Vec<String>> {
            Ok(fs::read_dir(at)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        };
        let mut found = names(share.clone())?;
        found.sort();
        ensure!(found == [SHARED_VOLUMES, &container], "the guest has made something of {found:?} on the host");
        for name in names(share.join(SHARED_VOLUMES))? {
            ensure!(name.parse::<u32>().is_ok(), "the guest has made {name} on the host");
        }
        let own = names(share.join(&container))?;
        ensure!(own == [ROOT_DIR], "the guest has made something of {own:?} on the host");
        Ok(())
    });
}

//! The seeds: where they come from, and that every target takes them.
//!
//! `SEEDS=write cargo test --no-default-features` writes them anew.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_fuzz::TARGETS;
use bulkhead_fuzz::script::Script;
use bulkhead_fuzz::script::Segment::{Bytes, Room, Wild};
use bulkhead_protocol::agent::{
    CpuStats, Event, ExitStatus, HugeTlbStats, InterfaceStats, IoStats, MemoryStats, OomEvent, Stats, event,
};
use bulkhead_protocol::cri::{LinuxPodSandboxConfig, PodSandboxConfig};
use protobuf::{Enum, Message, MessageField};
use serde_json::{Value, json};

type Seeds = BTreeMap<(&'static str, &'static str), Vec<u8>>;

const DIRECT: &[u8] = &[0];

fn all() -> Seeds {
    let mut seeds = Seeds::new();
    for (target, list) in [
        ("agent_replies", agent_replies()),
        ("balloon", balloon()),
        ("block", block()),
        ("console", console()),
        ("control_messages", control_messages()),
        ("fs", share()),
        ("mem", mem()),
        ("mmio_registers", mmio_registers()),
        ("net", net()),
        ("oci_spec", oci_spec()),
        ("pmem", pmem()),
        ("rng", rng()),
        ("virtqueue", virtqueue()),
        ("vmspec_config", vmspec_config()),
        ("vsock", vsock()),
    ] {
        seeds.extend(list.into_iter().map(|(name, bytes)| ((target, name), bytes)));
    }
    seeds
}

type List = Vec<(&'static str, Vec<u8>)>;

/// The steps that break rings, for a device whose requests go to `queue`.
fn hostile(prefix: &[u8], queue: u8, request: &[bulkhead_fuzz::script::Segment<'_>]) -> Vec<u8> {
    Script::new(prefix, 0)
        .chain(queue, request)
        .kick(queue)
        .indirect(queue, 0, request)
        .kick(queue)
        .indirect(queue, 1, request)
        .chain(queue, &[Wild(u64::MAX - 7, 64, true), Wild(0xff_fff0, 4096, false)])
        .kick(queue)
        .descriptor(queue, 3, 0x10_0000, 16, 1, 3)
        .offer(queue, 3)
        .offer(queue, 0xffff)
        .kick(queue)
        .reset()
        .chain(queue, request)
        .available(queue, 0x8000)
        .kick(queue)
        .bytes()
}

fn block() -> List {
    let header = |kind: u8, sector: u8| [kind, 0, 0, 0, 0, 0, 0, 0, sector, 0, 0, 0, 0, 0, 0, 0];
    let honest = Script::new(&[0], 1 << 29)
        .chain(0, &[Bytes(&header(0, 1)), Room(1024), Room(1)])
        .chain(0, &[Bytes(&header(1, 2)), Bytes(&[7; 32]), Room(1)])
        .chain(0, &[Bytes(&header(4, 0)), Room(1)])
        .kick(0)
        .own(&[0x10, 5, 0, 2])
        .own(&[0, 0, 2, 0, 0, 0, 0, 0, 0])
        .own(&[1, 120, 0, 16])
        .kick(0);
    vec![
        ("honest", honest.bytes()),
        ("hostile", hostile(&[1], 0, &[Bytes(&header(0, 0)), Room(512), Room(1)])),
        ("beyond", Script::new(&[0], 0).chain(0, &[Bytes(&[0xff; 16]), Room(512), Room(1)]).kick(0).bytes()),
    ]
}

fn rng() -> List {
    let honest = Script::new(&[], 0).chain(0, &[Room(64)]).chain(0, &[Room(1), Room(2000)]).kick(0);
    vec![("honest", honest.bytes()), ("hostile", hostile(&[], 0, &[Room(64)]))]
}

fn pmem() -> List {
    let honest = Script::new(&[], 0).chain(0, &[Bytes(&[0; 4]), Room(4)]).own(&[0]).own(&[1]).kick(0);
    vec![("honest", honest.bytes()), ("hostile", hostile(&[], 0, &[Bytes(&[0; 4]), Room(4)]))]
}

fn balloon() -> List {
    let honest = Script::new(&[], 0).own(&[0, 2, 4]).kick(2).own(&[0x10, 0, 12]).kick(2);
    vec![("honest", honest.bytes()), ("hostile", hostile(&[], 2, &[Room(4096), Wild(0x40_0000, 0x1000, true)]))]
}

fn console() -> List {
    let honest = Script::new(&[], 0).chain(1, &[Bytes(b"Linux\n")]).kick(1).own(&[1]).own(&[0]);
    let honest = honest.chain(1, &[Bytes(b"no one reads this")]).kick(1);
    vec![("honest", honest.bytes()), ("hostile", hostile(&[], 1, &[Bytes(b"x"), Bytes(b"y")]))]
}

fn mem() -> List {
    let mut request = [0; 24];
    request[8..16].copy_from_slice(&(8_u64 << 30).to_le_bytes());
    request[16] = 64;
    let plugged = Script::new(&[0, 128], 0).own(&[4, 0, 64]).own(&[4, 63, 2]).own(&[5, 10, 20]).own(&[7, 0, 255]);
    let plugged = plugged.own(&[6]).kick(0).own(&[1, 0, 1]).own(&[0, 255, 255, 255, 255, 255, 255, 255, 255]).kick(0);
    let failing = Script::new(&[2, 255], 0).own(&[4, 0, 200]).kick(0).own(&[5, 0, 64]).own(&[6]).kick(0);
    vec![
        ("plugged", plugged.bytes()),
        ("failing", failing.bytes()),
        ("hostile", hostile(&[0, 255], 0, &[Bytes(&request), Room(10)])),
    ]
}

fn net() -> List {
    let mut sent = vec![0; 12];
    sent.extend([0xff; 20]);
    let tcp = [1, 1, 54, 0, 200, 0, 34, 0, 16, 0, 0, 0];
    let honest = Script::new(&[], 0)
        .own(&[3, 8])
        .own(&[&[1, 60, 0][..], &[0xab; 40]].concat())
        .chain(1, &[Bytes(&sent)])
        .kick(1)
        .own(&[&[2, 232, 3][..], &tcp].concat())
        .kick(1)
        .own(&[0]);
    let large = Script::new(&[], 1 << 15).own(&[4]).own(&[1, 0xff, 0xff, 1, 2]).own(&[1, 20, 0]).own(&[5]).kick(0);
    let starved = Script::new(&[], 0).chain(0, &[Room(3)]).own(&[1, 0, 4]).own(&[1, 0, 4]).own(&[3, 15]);
    vec![
        ("honest", honest.bytes()),
        ("large", large.bytes()),
        ("starved", starved.bytes()),
        ("hostile", hostile(&[], 1, &[Bytes(&sent)])),
        ("hostile-rx", hostile(&[], 0, &[Room(1526), Room(4)])),
    ]
}

fn vsock() -> List {
    // Operation, connection, port, flags, window, forwarded, payload.
    let packet = |op: u8, port: u8, flags: u8, window: u16, len: u16| {
        let mut bytes = vec![1, op, port, 0, 4, 0, 0, flags];
        bytes.extend(u32::from(window).to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes
    };
    let buffers = |script: Script| (0..6).fold(script, |script, _| script.chain(0, &[Room(44), Room(4096)]));
    let connect = [0, 0, 4, 0, 0];
    let open = buffers(Script::new(&[], 0)).own(&connect).kick(0).own(&packet(2, 0, 0, 8192, 0));
    let talk = open.own(&[2, 0, 100, 0]).kick(0).own(&packet(5, 0, 0, 8192, 300)).own(&[3, 0, 0, 1]);
    let talk = talk.own(&packet(7, 0, 0, 8192, 0)).own(&[4, 0, 1, 0]).own(&packet(4, 0, 3, 8192, 0)).kick(0);
    let refused = buffers(Script::new(&[], 0)).own(&connect).own(&connect).kick(0).own(&packet(3, 0, 0, 0, 0));
    let refused = refused.own(&packet(5, 1, 0, 10, 9)).own(&[5, 1]).kick(0).reset().own(&connect);
    let starved = buffers(Script::new(&[], 0)).own(&connect).kick(0).own(&packet(2, 0, 0, 10, 0));
    let starved = starved.own(&[2, 0, 255, 255]).kick(0).own(&packet(6, 0, 0, 60000, 0)).kick(0);
    let guest = buffers(Script::new(&[], 0)).own(&packet(1, 0, 0, 1, 0)).own(&packet(8, 3, 0, 1, 65535)).kick(0);
    vec![
        ("talk", talk.bytes()),
        ("refused", refused.bytes()),
        ("starved", starved.bytes()),
        ("guest-connects", guest.bytes()),
        ("hostile", hostile(&[], 1, &[Bytes(&[1; 44]), Bytes(&[2; 8])])),
    ]
}

fn share() -> List {
    // Opcode, node, room for the reply, body.
    let message = |script: Script, opcode: u8, node: u8, body: &[u8]| {
        let len = u8::try_from(body.len()).unwrap();
        script.own(&[&[opcode, node, 0, 16, len][..], body].concat())
    };
    let start = || message(Script::new(&[], 0), 0, 0, &[]);
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let mut read = start();
    read = message(read, 1, 1, b"file\0");
    read = message(read, 3, 2, &[0; 16]);
    read = message(read, 14, 2, &words(&[0, 0]));
    read = message(read, 15, 2, &words(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0]));
    read = message(read, 18, 2, &[0; 24]);
    read = message(read, 2, 2, &words(&[1, 0]));
    let mut made = start();
    made = message(made, 35, 1, &[&words(&[2, 0o100_644, 0, 0])[..], b"new\0"].concat());
    made = message(made, 16, 2, &[&words(&[0, 0, 0, 0, 3, 0, 0, 0, 0, 0])[..], b"abc"].concat());
    made = message(made, 9, 1, &[&words(&[0o755, 0])[..], b"made\0"].concat());
    made = message(made, 12, 1, &[&words(&[1, 0])[..], b"new\0moved\0"].concat());
    made = message(made, 10, 1, b"moved\0");
    made = message(made, 11, 1, b"made\0");
    let mut names = start();
    names = message(names, 1, 1, b"../../etc\0");
    names = message(names, 6, 1, b"/etc/x\0/etc/passwd\0");
    names = message(names, 8, 1, &[&words(&[0o020_666, 0x103, 0, 0])[..], b"node\0"].concat());
    names = message(names, 13, 1, &[&words(&[1, 0])[..], b"..\0"].concat());
    names = message(names, 21, 1, &[&words(&[1, 0])[..], b"security.selinux\0x"].concat());
    let mut listed = start();
    listed = message(listed, 27, 1, &words(&[0, 0]));
    listed = message(listed, 44, 1, &words(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0]));
    listed = message(listed, 29, 1, &[0; 24]);
    listed = message(listed, 1, 1, b"link\0");
    listed = message(listed, 5, 2, &[]);
    listed = message(listed, 17, 1, &[]);
    // Handle, owner, first and last byte, kind, process, flags.
    let lock =
        |handle: u32, owner: u32, kind: u32, whole: u32| words(&[handle, 0, owner, 0, 0, 0, 9, 0, kind, 7, whole, 0]);
    let mut locked = start();
    locked = message(locked, 1, 1, b"file\0");
    locked = message(locked, 14, 2, &words(&[2, 0]));
    locked = message(locked, 14, 2, &words(&[2, 0]));
    locked = message(locked, 32, 2, &lock(0, 1, 1, 0));
    locked = message(locked, 33, 2, &lock(1, 2, 0, 0));
    locked = message(locked, 31, 2, &lock(1, 3, 1, 0));
    locked = message(locked, 36, 0, &words(&[6, 0]));
    locked = message(locked, 32, 2, &lock(0, 1, 1, 1));
    locked = message(locked, 33, 2, &lock(1, 2, 1, 1));
    locked = message(locked, 25, 2, &words(&[0, 0, 0, 0, 1, 0]));
    locked = message(locked, 18, 2, &[0; 24]);
    let raw = Script::new(&[], 0)
        .chain(1, &[Bytes(&words(&[40, 26, 1, 0, 0, 0, 0, 0, 0, 0])), Room(8)])
        .chain(1, &[Bytes(&words(&[7, 3, 1])), Bytes(&[0; 9]), Room(200)])
        .kick(1)
        .chain(0, &[Bytes(&words(&[48, 2, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]))])
        .kick(0);
    vec![
        ("read", read.bytes()),
        ("made", made.bytes()),
        ("names", names.bytes()),
        ("listed", listed.bytes()),
        ("locked", locked.bytes()),
        ("raw", raw.bytes()),
        ("hostile", hostile(&[], 1, &[Bytes(&[40, 0, 0, 0, 26]), Room(64)])),
    ]
}

fn mmio_registers() -> List {
    let initialize = |queue: u8, size: u16, rings: [u32; 3]| {
        let mut bytes = vec![4];
        bytes.extend([0; 8]);
        bytes.push(queue);
        bytes.extend(size.to_le_bytes());
        rings.iter().for_each(|ring| bytes.extend(ring.to_le_bytes()));
        bytes
    };
    let honest = initialize(0, 256, [0x1000, 0x2000, 0x3000]);
    // After DRIVER_OK: queue size, ready, features, status bits cleared, notify beyond the queues; then a reset.
    let late = [
        &honest[..],
        &[2, 11, 0xff, 0, 0, 0, 2, 13, 0, 0, 0, 0, 2, 8, 1, 0, 0, 0, 2, 17, 1, 0, 0, 0],
        &[2, 14, 0xff, 0xff, 0xff, 0xff, 5, 2, 2, 17, 0xf, 0, 0, 0, 2, 17, 0, 0, 0, 0],
        &honest[..],
    ];
    let widths = [0, 3, 0x70, 0x10, 0, 0, 0xfe, 0x0f, 1, 1, 0x70, 0x10, 1, 0, 1, 3, 0, 0x11, 1, 2, 3, 4, 5, 6, 7, 8];
    vec![
        ("honest", honest.clone()),
        ("late", late.concat()),
        ("overlap", initialize(0, 128, [0x1000, 0x1000, 0x3000])),
        ("outside", initialize(2, 3, [0xff_fff0, 0, 0x3000])),
        ("widths", widths.to_vec()),
    ]
}

fn virtqueue() -> List {
    let descriptor = |index: u16, address: u32, len: u32, flags: u16, next: u16| {
        let mut bytes = vec![0];
        bytes.extend(index.to_le_bytes());
        bytes.extend(address.to_le_bytes());
        bytes.push(0);
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let turn = |writable: u8, answer: u8, len: u16, offset: u16| {
        let mut bytes = vec![3, writable, answer];
        bytes.extend(len.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    };
    let chain = [descriptor(0, 0x8000, 64, 1, 1), descriptor(1, 0x1_fff0, 16, 0, 0), vec![1, 0, 0, 0]].concat();
    let honest = [&[0, 0, 4][..], &chain, &turn(0, 0, 70, 4)].concat();
    let staged = [&[0, 1, 4][..], &chain, &turn(0, 1, 1, 3), &chain, &turn(0, 2, 1, 0), &turn(0, 3, 1, 0)].concat();
    let looping = [&[0, 1, 2][..], &descriptor(0, 0x8000, 8, 3, 0), &[1, 0, 0, 0], &turn(1, 0, 9, 0)].concat();
    let indirect = [&[0, 0, 8][..], &descriptor(0, 0x1000, 64, 4, 0), &[1, 0, 0, 0], &turn(1, 0, 9, 0)].concat();
    let wild = [&[1, 0, 0][..], &[0, 0, 1, 0, 0, 0, 4, 0, 0, 0xff, 4, 0], &[1, 0xff, 0xff, 3, 9, 0, 3]].concat();
    vec![("honest", honest), ("staged", staged), ("looping", looping), ("indirect", indirect), ("wild", wild)]
}

/// JSON behind the digit by which a target tells its inputs apart.
fn text(kind: char, json: &Value) -> Vec<u8> {
    format!("{kind}{json}").into_bytes()
}

fn machine() -> Value {
    json!({
        "kvm": 0, "kernel": 1, "initramfs": 2, "cmdline": "quiet console=hvc0", "vcpus": 4, "boot_vcpus": 1,
        "memory_mib": 256, "hotplug_mib": 1024, "serial": null, "devices": [
            {"type": "console", "output": 3}, {"type": "vsock"}, {"type": "fs", "tag": "share", "root": 4},
            {"type": "rng"}, {"type": "balloon"}, {"type": "memory", "requested_mib": 128},
            {"type": "net", "tap": 5, "mac": [2, 0, 0, 0, 0, 1], "mtu": 1500},
            {"type": "block", "file": 6, "read_only": true, "serial": "disk"}
        ]
    })
}

fn control_messages() -> List {
    let request = |command: Value| text('0', &json!({"id": 7, "command": command}));
    vec![
        ("boot", request(json!({"boot": machine()}))),
        ("add-device", request(json!({"add_device": {"type": "block", "file": 0, "read_only": false, "serial": ""}}))),
        ("remove-device", request(json!({"remove_device": {"slot": 9}}))),
        ("resize-memory", request(json!({"resize_memory": {"mib": 512}}))),
        ("connect-vsock", request(json!({"connect_vsock": {"port": 1024}}))),
        ("done", text('1', &json!({"done": {"id": 1}}))),
        ("added", text('1', &json!({"added": {"id": 1, "slot": 3}}))),
        ("resized", text('1', &json!({"resized": {"id": 1, "mib": 128}}))),
        ("failed", text('1', &json!({"failed": {"id": 1, "message": "no"}}))),
        ("ready", text('1', &json!("guest_ready"))),
        ("exited", text('1', &json!({"guest_exited": {"reason": "reset"}}))),
    ]
}

fn vmspec_config() -> List {
    let config = concat!(
        "1kernel = \"/k\"\ndefault_vcpus = 2\nmax_vcpus = 8\ndefault_memory_mib = 128\nmax_memory_mib = 4096\n",
        "kernel_params = \"panic=1\"\nboot_timeout_s = 30\n",
        "annotations = [\"io.bulkhead.vcpus\", \"io.bulkhead.memory-mib\"]\n---\n",
    );
    let own = r#"{"io.bulkhead.vcpus":"3","io.bulkhead.memory-mib":"512"}"#;
    let cri = concat!(
        r#"{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"s","#,
        r#""io.kubernetes.cri.sandbox-cpu-quota":"150000","io.kubernetes.cri.sandbox-cpu-period":"100000","#,
        r#""io.kubernetes.cri.sandbox-memory":"1048576"}"#
    );
    let small =
        json!({"kvm": 0, "kernel": 0, "cmdline": "", "vcpus": 65, "boot_vcpus": 0, "memory_mib": 15, "devices": []});
    vec![
        ("machine", text('0', &machine())),
        ("machine-refused", text('0', &small)),
        ("own-annotations", format!("{config}{own}").into_bytes()),
        ("cri-annotations", format!("{config}{cri}").into_bytes()),
    ]
}

fn oci_spec() -> List {
    let container = json!({
        "ociVersion": "1.1.0", "hostname": "pod",
        "root": {"path": "rootfs", "readonly": true},
        "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "apparmorProfile": "x"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/x/shm", "options": ["rbind", "ro"]},
            {"destination": "/data", "type": "bind", "source": "/data", "options": ["rbind", "rslave", "rro"]},
            {"destination": "/cm", "source": "/p/volumes/kubernetes.io~configmap/c", "options": ["bind", "ro"]},
            {"destination": "/null", "type": "bind", "source": "/dev/null", "options": ["bind"]}
        ],
        "hooks": {"poststart": [{"path": "/bin/true"}], "startContainer": [{"path": "/bin/x"}]},
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s"},
        "linux": {
            "cgroupsPath": "/kubepods/x", "sysctl": {"net.core.somaxconn": "1"},
            "namespaces": [
                {"type": "pid"}, {"type": "network", "path": "/run/netns/n"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "mount"}, {"type": "user"}
            ],
            "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65536}],
            "devices": [
                {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 0},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 0, "access": "rw"}
            ]}
        }
    });
    let shared = json!({
        "ociVersion": "1.0.2", "mounts": [{"destination": "/x", "type": "bind", "source": "/x", "options": ["rshared"]}],
        "linux": {"namespaces": [{"type": "pid", "path": "/proc/42/ns/pid"}]}
    });
    let process = json!({"user": {"uid": 1, "gid": 1}, "args": ["ls"], "cwd": "/", "selinuxLabel": "l",
        "capabilities": {"bounding": ["CAP_KILL"]}, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 9}]});
    let resources = json!({"memory": {"limit": 1_048_576}, "cpu": {"quota": 50_000, "period": 100_000, "cpus": "0-1"},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}], "pids": {"limit": 10}});
    let pod = PodSandboxConfig {
        hostname: "web".into(),
        annotations: [("io.bulkhead.vcpus".to_owned(), "2".to_owned())].into(),
        linux: MessageField::some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods.slice/kubepods-pod1.slice".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    vec![
        ("container", text('0', &container)),
        ("shared", text('0', &shared)),
        ("process", text('1', &process)),
        ("resources", text('2', &resources)),
        ("pod", [b"3".to_vec(), pod.write_to_bytes().unwrap()].concat()),
    ]
}

fn agent_replies() -> List {
    let stats = Stats {
        cpu: MessageField::some(CpuStats { usage_usec: 9, ..Default::default() }),
        memory: MessageField::some(MemoryStats {
            usage: 7,
            stat: [("workingset_refault_anon".to_owned(), u64::MAX)].into(),
            ..Default::default()
        }),
        io: vec![IoStats { major: 8, ..Default::default() }],
        network: vec![InterfaceStats { name: "eth0".into(), ..Default::default() }],
        huge_tlb: vec![HugeTlbStats { page_size: "2MB".into(), ..Default::default() }],
        ..Default::default()
    };
    let exit = ExitStatus { code: 0x189, ..Default::default() };
    let exit = exit.write_to_bytes().unwrap();
    let oom = event::Event::Oom(OomEvent { container_id: "../c".into(), ..Default::default() });
    let event = Event { event: Some(oom), ..Default::default() }.write_to_bytes().unwrap();
    let stats = stats.write_to_bytes().unwrap();
    let status = |code: i32, message: &str| {
        let mut status = ttrpc::Status::new();
        status.set_code(ttrpc::Code::from_i32(code).unwrap());
        status.message = message.into();
        status
    };
    // A response of ttrpc: status, payload; and its frame: length, stream, type 2.
    let frame = |status: Option<ttrpc::Status>, payload: &[u8]| {
        let mut response = ttrpc::Response::new();
        response.status = status.into();
        response.payload = payload.to_vec();
        let body = response.write_to_bytes().unwrap();
        let len = u32::try_from(body.len()).unwrap();
        [&len.to_be_bytes()[..], &[0, 0, 0, 1, 2, 0], &body].concat()
    };
    let with = |kind: &[u8], bytes: &[u8]| [kind, bytes].concat();
    vec![
        ("stats", with(DIRECT, &stats)),
        ("exit", with(&[1], &exit)),
        ("event", with(&[2], &event)),
        ("status", with(&[5], &status(12, "no\nsuch method").write_to_bytes().unwrap())),
        ("stats-frame", with(&[6], &frame(None, &stats))),
        ("exit-frame", with(&[7], &frame(Some(status(0, "")), &exit))),
        ("event-frame", with(&[8], &frame(None, &event))),
        ("refused-frame", with(&[9], &frame(Some(status(5, "gone")), &[]))),
        ("oversize-frame", vec![6, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0]),
        ("wrong-stream-frame", [&[6, 0, 0, 0, 2, 0, 0, 0, 3, 2, 0, 10, 0][..], &frame(None, &stats)].concat()),
    ]
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds")
}

#[test]
fn seeds_are_the_ones_described_here() {
    let seeds = all();
    if std::env::var_os("SEEDS").is_some_and(|what| what == "write") {
        let _ = fs::remove_dir_all(directory());
        for ((target, name), bytes) in &seeds {
            fs::create_dir_all(directory().join(target)).unwrap();
            fs::write(directory().join(target).join(name), bytes).unwrap();
        }
    }
    for (target, _) in TARGETS {
        let described: Vec<_> = seeds.keys().filter(|(of, _)| *of == target).map(|(_, name)| *name).collect();
        let mut there: Vec<_> = fs::read_dir(directory().join(target))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        there.sort();
        assert!(there.iter().eq(described.iter()), "{target}: {there:?} are there, {described:?} are described");
    }
    for ((target, name), bytes) in seeds {
        assert_eq!(fs::read(directory().join(target).join(name)).unwrap(), bytes, "{target}/{name} is another");
    }
}

#[test]
fn every_target_takes_its_seeds_and_nothing() {
    let seeds = all();
    for (target, run) in TARGETS {
        // virtio-fs needs a file system of its own, which takes root.
        if target == "fs" && !rustix::process::geteuid().is_root() {
            continue;
        }
        run(&[]);
        seeds.iter().filter(|((of, _), _)| *of == target).for_each(|(_, bytes)| run(bytes));
    }
}

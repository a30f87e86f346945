//! The table: what there is to wait for, how long, why so long, and as a part of what.
//!
//! Most rows rest on a few facts. What a guest does takes milliseconds on hardware, and some fifty times as long on a node whose
//! own virtualization is emulated. The kubelet gives a call of the CRI's two minutes (`runtimeRequestTimeout`), and containerd passes
//! that on. systemd gives a process 90 s when the node shuts down (systemd-system.conf(5), DefaultTimeoutStopSec). containerd
//! gives the action `delete` 5 s.

use std::time::Duration;

/// Who waits for a call, and how long.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Caller {
    /// The kubelet, through the CRI.
    Kubelet,
    /// An engine without a kubelet, as Docker, which waits for as long as it takes.
    Engine,
    /// containerd, which runs the action `delete`.
    Containerd,
    /// systemd, which ends what runs on a node that shuts down.
    Systemd,
}

impl Caller {
    /// How long it waits; `None` if for ever.
    pub const fn gives(self) -> Option<Duration> {
        match self {
            Self::Kubelet => Some(Duration::from_secs(120)),
            Self::Engine => None,
            Self::Containerd => Some(Duration::from_secs(5)),
            Self::Systemd => Some(Duration::from_secs(90)),
        }
    }
}

/// Whose time an operation has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Clock {
    /// The pod's: time in which the pod is throttled does not count.
    Pod,
    /// The host's: all time counts.
    Host,
}

/// What an operation is a part of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scope {
    /// It is a call.
    Call(Caller),
    /// It is a part of these, and of nothing else.
    Part(&'static [Operation]),
    /// It is a single question or piece of work, and any operation may consist of it.
    Step,
    /// No call waits for it, or it has its time beside the call's.
    Apart,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What has come about when it is done.
    pub name: &'static str,
    /// How long it may take.
    pub budget: Duration,
    /// Whose time that is.
    pub clock: Clock,
    /// What it is a part of.
    pub scope: Scope,
    /// The ways that it can go: what comes one after the other, each with all of its time. Other parts have what is left.
    pub ways: &'static [&'static [Operation]],
    /// Why it has so long.
    pub reason: &'static str,
}

impl Operation {
    /// How long it may take.
    pub const fn budget(self) -> Duration {
        self.row().budget
    }
}

macro_rules! operations {
    ($($operation:ident { $name:literal, $seconds:literal s of $clock:ident, $scope:expr, [$($way:expr),*], $reason:literal })*) => {
        /// What there is to wait for.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Operation {
            $(#[doc = $name] $operation,)*
        }

        impl Operation {
            /// All of them, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$operation,)*];

            /// The operation's row.
            pub const fn row(self) -> Row {
                match self {
                    $(Self::$operation => Row {
                        name: $name,
                        budget: Duration::from_secs($seconds),
                        clock: Clock::$clock,
                        scope: $scope,
                        ways: &[$(&$way),*],
                        reason: $reason,
                    },)*
                }
            }
        }
    };
}

use Caller::{Containerd, Engine, Kubelet, Systemd};
use Operation::*;
use Scope::{Apart, Call, Part, Step};

operations! {
    CreatePod {
        "pod created", 110 s of Pod, Call(Kubelet),
        [[BootGuest, TellGuestItsPod, KillVmm]],
        "It boots a VM, and kills it if that fails. An operator who raises `boot_timeout_s` raises this as well, and has to raise the kubelet's."
    }
    CreateContainer {
        "container created", 110 s of Pod, Call(Kubelet),
        [[MakeContainer, TakeBackContainer]],
        "What there is of a container that cannot be created is taken back before the kubelet is told."
    }
    CreateStandalone {
        "container without a pod created", 280 s of Pod, Call(Engine),
        [[BootGuest, TellGuestItsPod, MakeContainer, CarryNetwork, TakeBackContainer, KillVmm]],
        "It is the creation of a pod, of a container and of the container's network in one call."
    }
    StartContainer {
        "container started", 60 s of Pod, Call(Kubelet),
        [[GuestWork]],
        "The container's process is there already, and only has to be let go on."
    }
    StartStandalone {
        "container without a pod started", 120 s of Pod, Call(Engine),
        [[CarryNetwork, GuestWork]],
        "An engine may have made the network only between creation and start."
    }
    StartExec {
        "exec started", 100 s of Pod, Call(Kubelet),
        [[GuestWork, ConnectStreams]],
        "The guest makes a process, and then the process's streams are connected."
    }
    Kill {
        "signal delivered", 30 s of Pod, Call(Kubelet),
        [[GuestAnswer, KillVmm]],
        "The VM of a guest that does not deliver a signal is killed. For an exec that is being started the time begins when that is over."
    }
    Delete {
        "container or exec deleted", 105 s of Pod, Call(Kubelet),
        [
            [EndUnstarted, DrainOutput, GuestAnswer, DetachDisks],
            [EndUnstarted, DrainOutput, GuestAnswer, KillVmm],
            [StopPod, ProcessEnds, DrainOutput, StopPod]
        ],
        "A guest that removes its part lets go of disks after that; the VM of one that does not is killed, and with a pod's own container its VM ends. For an exec that is being started the time begins when that is over."
    }
    Pause {
        "container paused", 20 s of Pod, Call(Kubelet),
        [[GuestAnswer]],
        "It is one question."
    }
    Resume {
        "container resumed", 20 s of Pod, Call(Kubelet),
        [[GuestAnswer]],
        "It is one question."
    }
    Update {
        "limits of a container updated", 100 s of Pod, Call(Kubelet),
        [[GrowVm, GuestAnswer, AwaitShrinking]],
        "The VM grows before the container may use more, and shrinks after it may not any more."
    }
    ResizeTerminal {
        "terminal resized", 20 s of Pod, Call(Kubelet),
        [[GuestAnswer]],
        "It is one question."
    }
    Stats {
        "statistics told", 1 s of Host, Call(Kubelet),
        [],
        "containerd asks one container of the node after the other, and more than a hundred silent ones must fit into the kubelet's two minutes; after this time the last known numbers are told."
    }
    CreateSandbox {
        "sandbox created (Sandbox API)", 60 s of Host, Call(Kubelet),
        [[HostFiles]],
        "It makes the pod's files in containerd's directories."
    }
    SandboxStatus {
        "state of a sandbox told (Sandbox API)", 5 s of Host, Call(Kubelet),
        [[RestorePodFiles]],
        "The state itself is known; before it is told the pod's files are made again if they are gone."
    }
    StopSandbox {
        "sandbox stopped (Sandbox API)", 30 s of Host, Call(Kubelet),
        [[StopPod, ProcessEnds]],
        "It ends the VM, and waits until that end is known."
    }
    ShutdownSandbox {
        "sandbox shut down (Sandbox API)", 80 s of Host, Call(Kubelet),
        [[StopPod, HostFiles]],
        "It ends the VM if there is one, and removes the pod's files."
    }
    EndDaemon {
        "daemon ended upon a signal", 84 s of Host, Call(Systemd),
        [[FinishBoot, TakeBackBoot, StopPod, LastWords, LastWords]],
        "A node that shuts down ends its pods, one that is being booted included; then the last answers and the last events leave."
    }
    DeleteAction {
        "dead shim cleaned up after (action `delete`)", 5 s of Host, Call(Containerd),
        [[KillLeftovers]],
        "What is removed after the processes are gone is in memory."
    }

    BootGuest {
        "guest booted", 60 s of Pod, Part(&[CreatePod, CreateStandalone]),
        [],
        "From the VMM's start until its agent listens: well under a second on hardware. `boot_timeout_s` of the configuration says otherwise."
    }
    TellGuestItsPod {
        "guest told of its pod", 40 s of Pod, Part(&[CreatePod, CreateStandalone]),
        [],
        "With a guest that boots just in time, and its VMM's end, the kubelet's two minutes suffice."
    }
    MakeContainer {
        "container made in the guest", 80 s of Pod, Part(&[CreateContainer, CreateStandalone]),
        [],
        "Its parts share the time: network, size of the VM, disks, mounts, the process and its streams."
    }
    TakeBackContainer {
        "failed container taken back", 30 s of Pod, Part(&[CreateContainer, CreateStandalone]),
        [[GuestForgets, LeaveDisks]],
        "It has this time whatever the creation took of the call's."
    }
    GuestForgets {
        "failed container forgotten by the guest", 20 s of Pod, Part(&[TakeBackContainer]),
        [],
        "Its process is killed, its end awaited and the container deleted. The VMM is asked after that, and takes disks away whatever the guest does."
    }
    LeaveDisks {
        "disks of a failed container taken away", 10 s of Pod, Part(&[TakeBackContainer]),
        [],
        "The VMM empties a slot also when nobody waits for that any more."
    }
    CarryNetwork {
        "container's own network carried into the guest", 60 s of Pod, Part(&[CreateStandalone, StartStandalone]),
        [],
        "A few interfaces that a hook or an engine has made: each is a device slot, and all are one call of the agent's."
    }
    ConnectStreams {
        "streams connected", 40 s of Pod, Part(&[StartExec, MakeContainer]),
        [],
        "There are three at most, each a connection and a handshake."
    }
    GrowVm {
        "VM grown", 60 s of Pod, Part(&[MakeContainer, Update]),
        [],
        "The guest plugs memory, a GiB in some 100 ms, and brings CPUs and huge pages up. Waiting for the changes that other calls make before is included. What a guest demands has the same time."
    }
    AwaitShrinking {
        "VM shrunk", 20 s of Pod, Part(&[Update]),
        [],
        "The shrinking goes on after that, but nobody waits for it."
    }
    EndUnstarted {
        "container that was never started ended", 30 s of Pod, Part(&[Delete]),
        [[ProcessEnds, KillVmm, ProcessEnds]],
        "Its process is killed, and if it does not end the VM is."
    }
    ProcessEnds {
        "killed process seen to end", 10 s of Pod, Part(&[EndUnstarted, Delete, StopSandbox, GuestForgets]),
        [],
        "It has executed nothing and has no output to be copied. containerd gives a Delete 10 s before it asks again."
    }
    DrainOutput {
        "output drained", 5 s of Host, Part(&[Delete]),
        [],
        "What is still to come is in the guest's buffers. containerd gives the handling of an exit 10 s in all."
    }
    DetachDisks {
        "disks detached", 50 s of Pod, Part(&[Delete]),
        [[GuestAnswer, DeviceSlot]],
        "The disks of a container have as long together as one: a guest that lets go of one in time lets go of all."
    }
    StopPod {
        "VM stopped", 20 s of Host, Part(&[Delete, StopSandbox, ShutdownSandbox, EndDaemon]),
        [[OrderlyEnd, KillVmm]],
        "A guest that does not end by itself is killed."
    }
    OrderlyEnd {
        "guest ended by itself", 10 s of Host, Part(&[StopPod]),
        [],
        "It only has to kill processes: what containers wrote is in files of the host already. A pod that is throttled is killed rather than waited for."
    }
    FinishBoot {
        "boot finished", 30 s of Host, Part(&[EndDaemon]),
        [],
        "A boot takes a second. After this time its VMM is killed."
    }
    TakeBackBoot {
        "boot taken back", 30 s of Host, Part(&[EndDaemon]),
        [],
        "That waits for no guest and no file system, but a boot that has no VMM yet has to come to it first."
    }
    LastWords {
        "last messages sent", 2 s of Host, Part(&[EndDaemon]),
        [],
        "containerd waits 3 s for the answer to a Shutdown."
    }
    RestorePodFiles {
        "pod's files made again", 5 s of Host, Part(&[SandboxStatus]),
        [],
        "Four small files and two directories. The kubelet asks for the state again and again, and must not wait long for a disk that hangs; who asks meanwhile waits no longer than the first."
    }
    KillLeftovers {
        "leftover processes killed", 2 s of Host, Part(&[DeleteAction]),
        [],
        "All of them are killed at once, and waited for together."
    }

    GuestAnswer {
        "question answered by the guest", 20 s of Pod, Step,
        [],
        "A signal, a freeze, limits, a removal, its clock: nothing of it makes a process or mounts anything. A guest that takes longer is not going to answer."
    }
    GuestWork {
        "work done by the guest", 60 s of Pod, Step,
        [],
        "A process, mounts, network, CPUs and huge pages, a disk's driver, a new version of a volume: milliseconds. The agent itself gives up a process after 45 s."
    }
    GuestMemory {
        "memory plugged by the guest", 60 s of Pod, Step,
        [],
        "Linux takes some 100 ms for a GiB."
    }
    GuestConnection {
        "port of the guest connected", 30 s of Pod, Step,
        [],
        "The guest's kernel answers from its interrupt handler, so that a second is much on hardware."
    }
    StreamHandshake {
        "stream accepted by the guest", 30 s of Pod, Step,
        [],
        "As long as for the connection itself."
    }
    ForwardHandshake {
        "forwarded port accepted by the guest", 30 s of Pod, Step,
        [],
        "The agent itself gives up after 10 s."
    }
    DeviceSlot {
        "device slot filled or emptied", 30 s of Pod, Step,
        [],
        "The VMM fills or empties the slot at once and waits for no disk. What there is more is for a VMM that has little CPU."
    }
    KillVmm {
        "VMM gone after SIGKILL", 10 s of Host, Step,
        [],
        "Giving gigabytes of memory back takes a second. A VMM that stays longer waits for a disk of the host; the call goes on without its end. This has its time whatever is left of the call's."
    }
    HostFiles {
        "files of the host used or mounted", 60 s of Host, Step,
        [],
        "Milliseconds, unless a server or a disk of the host does not answer. The thread stays until it does."
    }
    OpenDisk {
        "disk of the host opened", 30 s of Host, Step,
        [],
        "open(2) of a disk whose path is being recovered may wait for ever. There is one thread for each disk."
    }
    Placeholder {
        "pid on the host made", 20 s of Host, Step,
        [],
        "Some system calls that wait for nobody, on a node that may be busy."
    }

    Hook {
        "OCI hook run", 60 s of Host, Apart,
        [],
        "Hooks come from containerd's side and are trusted. Each has its time beside the call's, or the time that it asks for."
    }
    NoteOutOfMemory {
        "lack of memory noted in the bundle", 5 s of Host, Apart,
        [],
        "The end of the container is told after that, as CRI-O reads the note then."
    }
    KilledEnds {
        "process ended after SIGKILL", 60 s of Pod, Apart,
        [[CopyOutput]],
        "The kernel takes milliseconds, but the end is not told before the output has been copied. After this time a container's VM is killed, and an exec is not waited for any more."
    }
    CopyOutput {
        "output of an ended process copied", 30 s of Pod, Apart,
        [[SilentOutput]],
        "What the guest's buffers hold takes seconds to read on an emulated node; a process left behind that writes for ever must not hide the end."
    }
    SilentOutput {
        "output of an ended process silent", 5 s of Host, Apart,
        [],
        "This is for where the guest does not say how much was written. What was is in the guest's buffers and comes at once."
    }
    ExecsEnd {
        "execs ended after their init", 2 s of Host, Apart,
        [],
        "The kernel has killed them with the pid namespace, and their reports are on the way. containerd wants theirs first, but the container's must not depend on them."
    }
    LateProcess {
        "late process made or ended", 300 s of Host, Apart,
        [],
        "The agent gives up within a minute. The VM of a guest that has not answered after this time is killed: it would keep what it is asked for, and what it is asked for next, for ever."
    }
    DiscardProcess {
        "late process discarded", 340 s of Host, Apart,
        [[GuestAnswer, LateProcess, GuestAnswer]],
        "It is killed, its end awaited and the process deleted."
    }
    LostAgent {
        "VM ended after its agent", 10 s of Host, Apart,
        [],
        "The agent does so at an orderly end too, just before the VM's."
    }
    VmmExit {
        "VMM ended after its guest", 3 s of Host, Apart,
        [],
        "It still has to say why, and to give the guest's memory back. Then it is killed."
    }
    GiveBack {
        "size given back", 60 s of Pod, Apart,
        [[GuestWork]],
        "It is one question to the guest."
    }
    UpdateNetwork {
        "change of the network carried", 40 s of Pod, Apart,
        [],
        "A guest answers in milliseconds. What fails is tried again."
    }
    UpdateVolume {
        "version of a volume carried", 60 s of Pod, Apart,
        [[GuestWork]],
        "It is one question. What fails is tried again."
    }
    LookAtVolumes {
        "versions of volumes read", 60 s of Host, Apart,
        [],
        "A link is read for each. There is one thread for that; what hangs is looked at again later."
    }
    SyncClock {
        "clocks compared", 40 s of Pod, Apart,
        [],
        "It is a few questions, of which each is answered at once. What fails is done again with the next comparison."
    }
    ForwardConnection {
        "forwarded connection made", 60 s of Pod, Apart,
        [[GuestConnection, ForwardHandshake]],
        "Who has dialled waits for as long as it likes."
    }
    DialServer {
        "server in the namespace connected", 5 s of Host, Apart,
        [],
        "On a loopback interface that is at once, unless the server's backlog is full."
    }
    ForwardEvent {
        "event given to containerd", 5 s of Host, Apart,
        [],
        "containerd's own bound for one event. It is tried a few times."
    }
    DeliverEvents {
        "events taken by containerd", 5 s of Host, Apart,
        [],
        "As long as for one event: a container's end is told after the reason for it, if containerd listens."
    }
    ContainerdVersion {
        "part of containerd's version read", 2 s of Host, Apart,
        [],
        "containerd waits for the action `start` and answers from memory. When it does not, the older contract serves as well."
    }
    Counters {
        "counters of the VM's devices told", 5 s of Pod, Apart,
        [],
        "The VMM reads them from its memory. An operator asks, and may ask again."
    }
}

//! Parts that are killed at every step of a pod's life, and a node that lacks what a pod needs: the kubelet can always
//! remove the pod, and nothing is left of it (the fixture checks).

use bulkhead_e2e::chaos::{self, Component, Step};
use bulkhead_e2e::on_node;

/// The table of faults: each row is a test.
macro_rules! faults {
    ($($name:ident: $component:ident, $step:ident;)+) => {
        $(
            #[test]
            fn $name() {
                on_node(async |node| chaos::killed(node, Component::$component, Step::$step).await.map(drop));
            }
        )+
    };
}

faults! {
    containerd_killed_while_booting: Containerd, WhileBooting;
    containerd_killed_after_run_pod_sandbox: Containerd, AfterRunPodSandbox;
    containerd_killed_while_create_container: Containerd, WhileCreateContainer;
    containerd_killed_after_create_container: Containerd, AfterCreateContainer;
    containerd_killed_while_task_create: Containerd, WhileTaskCreate;
    containerd_killed_while_task_start: Containerd, WhileTaskStart;
    containerd_killed_while_running: Containerd, WhileRunning;
    containerd_killed_during_exec: Containerd, DuringExec;
    containerd_killed_during_stop_container: Containerd, DuringStopContainer;
    containerd_killed_during_stop_pod_sandbox: Containerd, DuringStopPodSandbox;
    containerd_killed_during_remove_pod_sandbox: Containerd, DuringRemovePodSandbox;
    containerd_killed_after_container_ended: Containerd, AfterContainerEnded;
    shim_killed_while_booting: Shim, WhileBooting;
    shim_killed_after_run_pod_sandbox: Shim, AfterRunPodSandbox;
    shim_killed_while_create_container: Shim, WhileCreateContainer;
    shim_killed_after_create_container: Shim, AfterCreateContainer;
    shim_killed_while_task_create: Shim, WhileTaskCreate;
    shim_killed_while_task_start: Shim, WhileTaskStart;
    shim_killed_while_running: Shim, WhileRunning;
    shim_killed_during_exec: Shim, DuringExec;
    shim_killed_during_stop_container: Shim, DuringStopContainer;
    shim_killed_during_stop_pod_sandbox: Shim, DuringStopPodSandbox;
    shim_killed_during_remove_pod_sandbox: Shim, DuringRemovePodSandbox;
    shim_killed_after_container_ended: Shim, AfterContainerEnded;
    vmm_killed_while_booting: Vmm, WhileBooting;
    vmm_killed_after_run_pod_sandbox: Vmm, AfterRunPodSandbox;
    vmm_killed_while_create_container: Vmm, WhileCreateContainer;
    vmm_killed_after_create_container: Vmm, AfterCreateContainer;
    vmm_killed_while_task_create: Vmm, WhileTaskCreate;
    vmm_killed_while_task_start: Vmm, WhileTaskStart;
    vmm_killed_while_running: Vmm, WhileRunning;
    vmm_killed_during_exec: Vmm, DuringExec;
    vmm_killed_during_stop_container: Vmm, DuringStopContainer;
    vmm_killed_during_stop_pod_sandbox: Vmm, DuringStopPodSandbox;
    vmm_killed_during_remove_pod_sandbox: Vmm, DuringRemovePodSandbox;
    vmm_killed_after_container_ended: Vmm, AfterContainerEnded;
    agent_killed_while_booting: Agent, WhileBooting;
    agent_killed_after_run_pod_sandbox: Agent, AfterRunPodSandbox;
    agent_killed_while_create_container: Agent, WhileCreateContainer;
    agent_killed_after_create_container: Agent, AfterCreateContainer;
    agent_killed_while_task_create: Agent, WhileTaskCreate;
    agent_killed_while_task_start: Agent, WhileTaskStart;
    agent_killed_while_running: Agent, WhileRunning;
    agent_killed_during_exec: Agent, DuringExec;
    agent_killed_during_stop_container: Agent, DuringStopContainer;
    agent_killed_during_stop_pod_sandbox: Agent, DuringStopPodSandbox;
    agent_killed_during_remove_pod_sandbox: Agent, DuringRemovePodSandbox;
    agent_killed_after_container_ended: Agent, AfterContainerEnded;
}

//! `Start` and `Exec`: processes begin, and each is waited for from then on.

use std::sync::Arc;

use bulkhead_protocol::agent::ExecRequest;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskStart};
use containerd_shim_protos::types::task::Status;
use protobuf::MessageField;

use super::Pod;
use super::container::{Container, Kind};
use super::error::{TaskError, expect_identifier};
use super::process::{Exit, Process};
use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::io::{ProcessIo, Stdio, Written};
use crate::sandbox::Sandbox;
use crate::sandbox::agent::{AgentError, ProcessKey};
use crate::spec;

/// What containerd asks to execute.
#[derive(Clone, Debug, Default)]
pub struct ExecTask {
    /// The container.
    pub id: String,
    /// The exec.
    pub exec_id: String,
    /// Its streams.
    pub stdio: Stdio,
    /// Its OCI process as JSON.
    pub process: Vec<u8>,
}

impl Pod {
    /// Starts a container's init or an exec and answers its pid.
    pub async fn start(self: Arc<Self>, deadline: Deadline, id: String, exec: String) -> Result<u32, TaskError> {
        let container = self.container(&id)?;
        if exec.is_empty() {
            self.start_init(deadline, &container).await
        } else {
            self.start_exec(deadline.turned_into(Operation::StartExec), &container, &exec).await
        }
    }

    async fn start_init(&self, mut deadline: Deadline, container: &Container) -> Result<u32, TaskError> {
        let init = &container.init;
        let _order = init.order.lock().await;
        init.expect("start", &[Status::CREATED])?;
        let sandbox = self.sandbox()?;
        if container.kind == Kind::Standalone {
            // An engine may make the network only between creation and start.
            deadline = deadline.turned_into(Operation::StartStandalone);
            sandbox.follow_network(deadline.part(Operation::CarryNetwork)).await?;
        }
        if container.kind != Kind::Sandbox {
            sandbox.agent.start_container(deadline, &container.id).await?;
        }
        init.set_status(Status::RUNNING);
        let (container_id, pid) = (container.id.clone(), init.pid());
        self.publisher.publish(&TaskStart { container_id, pid, ..TaskStart::default() });
        container.hooks.started(pid).await;
        Ok(pid)
    }

    async fn start_exec(
        self: &Arc<Self>,
        deadline: Deadline,
        container: &Arc<Container>,
        exec: &str,
    ) -> Result<u32, TaskError> {
        let process = container.exec(exec)?;
        let order = process.order.lock().await;
        process.expect("start", &[Status::CREATED])?;
        container.init.expect("execute in", &[Status::RUNNING])?;
        let sandbox = self.sandbox()?;
        let pid = process.assign_pid(&self.keeper, &spec::process_arguments(&container.exec_spec(exec)?))?;
        let ran = run_exec(deadline, &sandbox, container, &process).await;
        // It has ended already if its container has been deleted meanwhile.
        if let Err(error) = ran.and_then(|()| process.expect("start", &[Status::CREATED])) {
            // Whoever waits for it is told. No event: its start was not told either.
            process.ended(Exit::now(Exit::KILLED));
            return Err(error);
        }
        process.set_status(Status::RUNNING);
        let (container_id, exec_id) = (container.id.clone(), exec.to_owned());
        self.publisher.publish(&TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() });
        drop(order);
        about::spawn(self.clone().follow(container.clone(), process, sandbox));
        Ok(pid)
    }

    /// Adds an exec, to be started later.
    pub fn exec(&self, task: ExecTask) -> Result<(), TaskError> {
        let container = self.container(&task.id)?;
        if container.kind == Kind::Sandbox {
            return Err(TaskError::Unsupported("executing in a sandbox, which has no process of its own,"));
        }
        expect_identifier(&task.exec_id, "the exec id is not an identifier of containerd")?;
        container.init.expect("execute in", &[Status::CREATED, Status::RUNNING])?;
        let (spec, console) = spec::translate_process(&task.process)?;
        let key = ProcessKey { container: task.id.clone(), exec: task.exec_id.clone() };
        container.add_exec(Arc::new(Process::new(key, Stdio { console, ..task.stdio })), spec)?;
        let (container_id, exec_id) = (task.id, task.exec_id);
        self.publisher.publish(&TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Waits for a created container's init from now on: it may be killed before it is started.
    pub(super) fn watch_init(self: &Arc<Self>, container: Arc<Container>, sandbox: Arc<Sandbox>) {
        let init = container.init.clone();
        match container.kind {
            Kind::Sandbox => about::spawn(self.clone().follow_vm(container, sandbox)),
            Kind::Member | Kind::Standalone => about::spawn(self.clone().follow(container, init, sandbox)),
        };
    }

    async fn follow_vm(self: Arc<Self>, container: Arc<Container>, sandbox: Arc<Sandbox>) {
        sandbox.vm.ended().await;
        let init = container.init.clone();
        if let Some(io) = init.io() {
            io.finish(Deadline::begin(Operation::DrainOutput)).await;
        }
        self.process_ended(&container, &init, Exit::KILLED).await;
    }

    /// Waits for a process in the guest. Its VM's end is its end; a guest that does not say how a process ended is not one.
    async fn follow(self: Arc<Self>, container: Arc<Container>, process: Arc<Process>, sandbox: Arc<Sandbox>) {
        let unknown = Written::default();
        let (code, written) = tokio::select! {
            answer = sandbox.agent.wait(&process.key) => match answer {
                Ok(status) => {
                    if status.oom_killed {
                        self.tell_oom(&container).await;
                    }
                    (status.code, Written { stdout: status.stdout_bytes, stderr: status.stderr_bytes })
                }
                Err(error) => {
                    if !matches!(error, AgentError::Refused { .. }) {
                        sandbox.vm.kill().await;
                        // The VMM may write to the pod's files as long as its process is there.
                        sandbox.vm.ended().await;
                    }
                    tracing::warn!(%error, "the guest does not say how a process ended; reporting exit code 137");
                    (Exit::KILLED, unknown)
                }
            },
            () = sandbox.vm.ended() => (Exit::KILLED, unknown),
            // An exec, by the deletion of its container.
            _ = process.wait() => return,
        };
        if let Some(io) = process.io() {
            io.process_ended(Deadline::begin(Operation::CopyOutput), written).await;
        }
        if process.key.exec.is_empty() {
            sandbox.container_ended(&container.id);
        }
        self.process_ended(&container, &process, code).await;
    }

    /// Says that a container was out of memory, if that was not said before, and waits until containerd knows: the reason
    /// that the kubelet sees is settled by what containerd knows when it learns of the end.
    async fn tell_oom(&self, container: &Container) {
        if container.out_of_memory().await {
            let container_id = container.id.clone();
            self.publisher.publish(&TaskOOM { container_id, ..TaskOOM::default() });
        }
        self.publisher.delivered().await;
    }

    async fn process_ended(&self, container: &Container, process: &Process, code: u32) {
        // Not before its start has been told, nor an init's before its execs' ends.
        let _order = process.order.lock().await;
        let is_init = process.key.exec.is_empty();
        if is_init {
            container.execs_ended().await;
        }
        let exit = Exit::now(code);
        if process.ended(exit.clone()) {
            self.tell_exit(container, process, exit);
        }
    }

    /// Says that a process has ended whose start was told.
    pub(super) fn tell_exit(&self, container: &Container, process: &Process, exit: Exit) {
        let exec = &process.key.exec;
        let id = if exec.is_empty() { &container.id } else { exec };
        self.publisher.publish(&TaskExit {
            container_id: container.id.clone(),
            id: id.clone(),
            pid: process.pid(),
            exit_status: exit.code,
            exited_at: MessageField::some(exit.at),
            ..TaskExit::default()
        });
    }
}

/// Makes an exec's process in the guest, and connects its streams. On an error nothing of it is left there.
async fn run_exec(
    deadline: Deadline,
    sandbox: &Sandbox,
    container: &Container,
    process: &Process,
) -> Result<(), TaskError> {
    let request = ExecRequest {
        container_id: container.id.clone(),
        exec_id: process.key.exec.clone(),
        process: container.exec_spec(&process.key.exec)?.to_vec(),
        streams: MessageField::some(process.stdio.streams()),
        ..ExecRequest::default()
    };
    sandbox.agent.exec(deadline, request).await?;
    match ProcessIo::connect(deadline, &sandbox.agent, &process.key, &process.stdio).await {
        Ok(io) => process.set_io(io),
        Err(error) => {
            let (agent, key) = (sandbox.agent.clone(), process.key.clone());
            tokio::spawn(async move { agent.discard(&key).await });
            return Err(error.into());
        }
    }
    Ok(())
}

//! The services that containerd and an operator's commands call, over one socket.

mod operator;
mod sandbox;
mod status;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_protocol::operator::create_operator;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use ttrpc::asynchronous::Service;

use crate::pod::Pod;
use operator::OperatorService;
use sandbox::SandboxService;
use task::TaskService;

/// What the generated code calls the service; version 2 has the same methods and messages.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// Every service by its full name: one implementation under both names of the Task API, the Sandbox API, and the operator's.
pub fn services(pod: Arc<Pod>) -> HashMap<String, Service> {
    let mut services = create_sandbox(Arc::new(SandboxService::new(pod.clone())));
    services.extend(create_operator(Arc::new(OperatorService::new(pod.clone()))));
    for name in [TASK_V2, TASK_V3] {
        let made = create_task(Arc::new(TaskService::new(pod.clone())));
        services.extend(made.into_iter().map(|(generated, service)| {
            let name = if generated == TASK_V3 { name.to_owned() } else { generated };
            (name, service)
        }));
    }
    services
}

#[cfg(test)]
mod tests;

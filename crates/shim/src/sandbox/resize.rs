//! Keeps the VM as large as its containers need (ARCHITECTURE.md, D4): it grows before a container may use more, and shrinks
//! after it may not any more. [`crate::sizing`] says how large that is.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::agent::{Agent, AgentError};
use super::vm::{Vm, VmError};
use crate::deadlines::{Deadline, Operation};
use crate::sizing::{Limits, Plan, SizeError, Target};

/// The size of a VM and what it follows from.
#[derive(Debug)]
pub struct Resizer {
    plan: Plan,
    /// Containers whose init has not ended, by id.
    containers: Mutex<HashMap<String, Limits>>,
    /// Held while the size changes; never together with `containers` across an await.
    size: tokio::sync::Mutex<Size>,
}

#[derive(Debug)]
struct Size {
    /// What was asked for.
    asked: Target,
    /// MiB that the guest has plugged for sure.
    plugged_mib: u64,
    /// MiB of what was asked for that the guest has asked for itself, beyond what the containers' limits come to.
    on_demand_mib: u64,
}

impl Resizer {
    /// The size of a VM that has just booted.
    pub fn new(plan: Plan) -> Self {
        // The driver plugs what the annotations let expect by itself; whether it has is seen when it is needed.
        let size = tokio::sync::Mutex::new(Size { asked: plan.initial.clone(), plugged_mib: 0, on_demand_mib: 0 });
        Self { plan, containers: Mutex::default(), size }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Limits>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a container may use; nothing if it has ended or never was.
    pub fn limits(&self, id: &str) -> Limits {
        self.containers().get(id).cloned().unwrap_or_default()
    }

    /// All CPUs of the host that containers are bound to, as cpuset(7) lists them; empty if one is bound to none.
    pub fn host_cpus(&self) -> String {
        let containers = self.containers();
        let sets: Option<Vec<&str>> = containers.values().map(|limits| limits.host_cpus.as_deref()).collect();
        sets.unwrap_or_default().join(",")
    }

    /// The lowest `oom_score_adj` of the containers; `None` without any.
    pub fn oom_score_adj(&self) -> Option<i32> {
        self.containers().values().map(|limits| limits.oom_score_adj).min()
    }

    /// Whether a container may use huge pages of a size.
    pub fn has_huge_pages(&self, page_kib: u64) -> bool {
        self.containers().values().any(|limits| limits.huge_pages.get(&page_kib).is_some_and(|bytes| *bytes > 0))
    }

    /// Notes what a container may use from now on, without doing anything about it.
    pub fn note(&self, id: &str, limits: Limits) {
        self.containers().insert(id.to_owned(), limits);
    }

    /// Notes other limits of a container, unless it has been forgotten meanwhile.
    pub fn change(&self, id: &str, limits: Limits) {
        if let Some(known) = self.containers().get_mut(id) {
            *known = limits;
        }
    }

    /// Forgets a container.
    pub fn forget(&self, id: &str) {
        self.containers().remove(id);
    }

    fn needed(&self) -> Result<Target, SizeError> {
        self.plan.target(self.containers().values())
    }

    fn target(&self, on_demand_mib: u64) -> Result<Target, SizeError> {
        let needed = self.needed()?;
        let plugged_mib = needed.plugged_mib.saturating_add(on_demand_mib).min(self.plan.hotplug_mib);
        Ok(Target { plugged_mib, ..needed })
    }

    /// Whether the VM can grow at all.
    pub fn can_grow(&self) -> bool {
        self.plan.hotplug_mib > 0
    }

    /// Whether the VM has grown on demand.
    pub async fn has_grown(&self) -> bool {
        self.size.lock().await.on_demand_mib > 0
    }

    /// Gives the guest more memory, one step and no more than `most_mib` in all; `false` if there is none.
    pub async fn grow_on_demand(&self, vm: &Vm, agent: &Agent, most_mib: u64) -> Result<bool, ResizeError> {
        let mut size = self.size.lock().await;
        let deadline = Deadline::begin(Operation::GrowVm);
        let before = size.on_demand_mib;
        let Some(next) = self.plan.step_up(before, self.needed()?.plugged_mib, most_mib) else { return Ok(false) };
        size.on_demand_mib = next;
        let grown = self.grow_to(deadline, &mut size, vm, agent).await;
        if grown.is_err() {
            size.on_demand_mib = before;
        }
        grown.map(|()| true)
    }

    /// Takes back one step of what the guest has asked for.
    pub async fn shrink_on_demand(&self, vm: &Vm, agent: &Agent) {
        let mut size = self.size.lock().await;
        if let Some(next) = self.plan.step_down(size.on_demand_mib) {
            size.on_demand_mib = next;
            self.shrink_to(&mut size, vm, agent).await;
        }
    }

    /// Makes the VM at least as large as the containers need; returns when it is.
    pub async fn grow(&self, deadline: Deadline, vm: &Vm, agent: &Agent) -> Result<(), ResizeError> {
        let deadline = deadline.part(Operation::GrowVm);
        let mut size = deadline.timeout(self.size.lock()).await.map_err(ResizeError::Busy)?;
        self.grow_to(deadline, &mut size, vm, agent).await
    }

    async fn grow_to(&self, deadline: Deadline, size: &mut Size, vm: &Vm, agent: &Agent) -> Result<(), ResizeError> {
        let wanted = size.asked.larger(&self.target(size.on_demand_mib)?);
        let known = size.asked.clone();
        if wanted.plugged_mib > size.plugged_mib {
            if let Err(error) = vm.grow_memory(deadline, wanted.plugged_mib).await {
                // Take the request back: else the guest would go on trying to plug memory that it cannot have.
                let _ = vm.shrink_memory(size.asked.plugged_mib).await;
                return Err(error.into());
            }
            size.plugged_mib = wanted.plugged_mib;
            size.asked.plugged_mib = wanted.plugged_mib;
        }
        if wanted != known {
            agent.resize_guest(deadline, &wanted, self.plan.boot_mib).await?;
            size.asked = wanted;
        }
        Ok(())
    }

    /// Makes the VM as small as the containers allow. Memory is given back as soon as the guest can; nobody waits for it. This has
    /// its own time: it must not end with a call that waits for it.
    pub async fn shrink(&self, vm: &Vm, agent: &Agent) {
        self.shrink_to(&mut *self.size.lock().await, vm, agent).await;
    }

    async fn shrink_to(&self, size: &mut Size, vm: &Vm, agent: &Agent) {
        // It has been possible before, and fewer containers need no more.
        let Ok(mut wanted) = self.target(size.on_demand_mib) else { return };
        for kib in size.asked.huge_pages.keys() {
            wanted.huge_pages.entry(*kib).or_default();
        }
        if wanted == size.asked || vm.has_ended() {
            return;
        }
        // It keeps its containers from using what is about to go.
        if let Err(error) = agent.resize_guest(Deadline::begin(Operation::GiveBack), &wanted, self.plan.boot_mib).await
        {
            tracing::warn!(%error, "the guest does not shrink");
            return;
        }
        if wanted.plugged_mib < size.asked.plugged_mib && vm.shrink_memory(wanted.plugged_mib).await.is_ok() {
            size.plugged_mib = size.plugged_mib.min(wanted.plugged_mib);
        }
        size.asked = wanted;
    }
}

/// The VM cannot be as large as it should.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It may not.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// It is being changed for others.
    #[error("the size of the pod's VM has been changed for other containers for {0:?}; try again when that is done")]
    Busy(Duration),
    /// The VMM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::annotations::Request;
    use crate::config::{Config, Node, RawConfig};
    use crate::sandbox::Sandbox;

    #[test]
    fn change_of_a_container_that_has_ended_is_none() {
        let config = Config::validate(RawConfig::default(), Node { cpus: 8, memory_mib: 4096 }).unwrap();
        let resizer = Resizer::new(Plan::new(&config, &Request::default()).unwrap());
        let bound = Limits { host_cpus: Some("1".to_owned()), ..Limits::default() };
        resizer.note("a", Limits::default());
        resizer.change("a", bound.clone());
        assert_eq!(resizer.host_cpus(), "1");
        resizer.forget("a");
        resizer.change("a", bound);
        assert_eq!(resizer.limits("a"), Limits::default());
    }

    #[test]
    fn cpusets_count_when_every_container_has_one() {
        let config = Config::validate(RawConfig::default(), Node { cpus: 8, memory_mib: 4096 }).unwrap();
        let resizer = Resizer::new(Plan::new(&config, &Request::default()).unwrap());
        let bound = |cpus: &str| Limits { host_cpus: Some(cpus.to_owned()), ..Limits::default() };
        assert_eq!(resizer.host_cpus(), "");
        resizer.note("a", bound("2-3"));
        assert_eq!(resizer.host_cpus(), "2-3");
        resizer.note("b", Limits::default());
        assert_eq!(resizer.host_cpus(), "");
        resizer.forget("b");
        resizer.note("a", bound("1"));
        assert_eq!(resizer.host_cpus(), "1");
    }

    #[tokio::test]
    async fn size_that_is_changed_for_others_is_waited_for_no_longer_than_the_call_has() {
        let dir = tempfile::tempdir().unwrap();
        let (sandbox, _) = Sandbox::fake(dir.path()).await;
        let config = Config::validate(RawConfig::default(), Node { cpus: 8, memory_mib: 4096 }).unwrap();
        let resizer = Resizer::new(Plan::new(&config, &Request::default()).unwrap());
        let _changing = resizer.size.lock().await;
        tokio::time::pause();
        let grown = resizer.grow(Deadline::begin(Operation::Update), &sandbox.vm, &sandbox.agent).await;
        let limit = Operation::GrowVm.budget();
        assert!(matches!(grown, Err(ResizeError::Busy(waited)) if waited == limit), "{grown:?}");
    }
}

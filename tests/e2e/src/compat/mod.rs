//! The A/B suite: what a pod on Bulkhead shows is compared with what the same pod shows on runc.
//!
//! The table ([`cases`]) is made of groups. A group is a pod, run once with each handler; in it run probes, containers whose
//! script makes many observations, and acts, which drive the CRI themselves. An observation is text, and the two texts of a
//! case must be equal, unless the case says why they differ; then they must differ, and docs/compatibility.md must say so.

pub mod cases;
pub mod compare;
mod containers;
pub mod document;
pub mod run;
mod stage;

use anyhow::Result;
use bulkhead_cli::cri::v1;
use futures::future::LocalBoxFuture;

pub use containers::{IMAGE, pod_security, security, shell};
pub use stage::Stage;

/// What a case is about.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Area {
    /// Containers and execs as the kubelet drives them.
    Lifecycle,
    /// Identity, privileges and what of the kernel a container sees.
    Security,
    /// Volumes and file systems.
    Volumes,
    /// Interfaces, routes, names.
    Network,
}

impl Area {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::Security => "security",
            Self::Volumes => "volumes",
            Self::Network => "network",
        }
    }
}

/// One thing that must be the same.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it is about.
    pub area: Area,
    /// Unique in its group.
    pub name: &'static str,
    /// Why the two differ, for the few that do.
    pub difference: Option<&'static str>,
}

/// An observation by a script in a probe's container.
pub struct Script {
    /// The case.
    pub case: Case,
    /// Its output and exit code are the observation. Its standard input is empty.
    pub text: &'static str,
}

/// Changes a pod's or container's configuration before it is used.
pub type Change<Config> = Box<dyn Fn(&mut Config, &stage::Place)>;

/// A container whose process makes observations.
pub struct Probe {
    /// Unique in its group.
    pub name: &'static str,
    /// Whether the scripts run in an exec of the container instead of its init.
    pub by_exec: bool,
    change: Change<v1::ContainerConfig>,
    /// In their order.
    pub scripts: Vec<Script>,
}

/// What an act does.
type Deed = Box<dyn for<'a> Fn(&'a Stage) -> LocalBoxFuture<'a, Result<String>>>;

/// A case that drives the CRI.
pub struct Act {
    /// The case.
    pub case: Case,
    deed: Deed,
}

/// A pod and what is observed in it.
pub struct Group {
    /// Unique; the pod's host name.
    pub name: &'static str,
    change: Change<v1::PodSandboxConfig>,
    /// Run one after another.
    pub probes: Vec<Probe>,
    /// Run after the probes, several at once.
    pub acts: Vec<Act>,
    /// Whether its volumes are on an ext4 of their own.
    pub on_disk: bool,
}

impl Group {
    /// An ordinary pod.
    pub fn new(name: &'static str) -> Self {
        Self { name, change: Box::new(|_, _| {}), probes: Vec::new(), acts: Vec::new(), on_disk: false }
    }

    /// Puts the pod's volumes on an ext4 of their own.
    pub fn on_disk(mut self) -> Self {
        self.on_disk = true;
        self
    }

    /// Changes the pod's configuration.
    pub fn pod(mut self, change: impl Fn(&mut v1::PodSandboxConfig, &stage::Place) + 'static) -> Self {
        self.change = Box::new(change);
        self
    }

    /// Adds containers with scripts.
    pub fn probes(mut self, probes: impl IntoIterator<Item = Probe>) -> Self {
        self.probes.extend(probes);
        self
    }

    /// Adds acts.
    pub fn acts(mut self, acts: impl IntoIterator<Item = Act>) -> Self {
        self.acts.extend(acts);
        self
    }

    /// All cases.
    pub fn cases(&self) -> impl Iterator<Item = Case> {
        let scripts = self.probes.iter().flat_map(|probe| probe.scripts.iter().map(|script| script.case));
        scripts.chain(self.acts.iter().map(|act| act.case))
    }
}

impl Probe {
    /// An ordinary container whose init runs the scripts.
    pub fn new(name: &'static str) -> Self {
        Self { name, by_exec: false, change: Box::new(|_, _| {}), scripts: Vec::new() }
    }

    /// An ordinary container in which an exec runs the scripts.
    pub fn by_exec(name: &'static str) -> Self {
        Self { by_exec: true, ..Self::new(name) }
    }

    /// Changes the container's configuration.
    pub fn config(mut self, change: impl Fn(&mut v1::ContainerConfig, &stage::Place) + 'static) -> Self {
        self.change = Box::new(change);
        self
    }

    /// Changes the container's security context.
    pub fn security(self, change: impl Fn(&mut v1::LinuxContainerSecurityContext) + 'static) -> Self {
        self.config(move |config, _| change(security(config)))
    }

    /// Adds a case.
    pub fn case(mut self, area: Area, name: &'static str, text: &'static str) -> Self {
        self.scripts.push(Script { case: Case { area, name, difference: None }, text });
        self
    }

    /// Says why the last case differs.
    pub fn differs(mut self, reason: &'static str) -> Self {
        if let Some(script) = self.scripts.last_mut() {
            script.case.difference = Some(reason);
        }
        self
    }
}

impl Act {
    /// A case that drives the CRI.
    pub fn new<F>(area: Area, name: &'static str, deed: F) -> Self
    where
        F: for<'a> Fn(&'a Stage) -> LocalBoxFuture<'a, Result<String>> + 'static,
    {
        Self { case: Case { area, name, difference: None }, deed: Box::new(deed) }
    }

    /// Says why it differs.
    pub fn differs(mut self, reason: &'static str) -> Self {
        self.case.difference = Some(reason);
        self
    }
}

/// A case whose deed is an async block.
macro_rules! act {
    ($area:expr, $name:expr, |$stage:ident| $body:block) => {
        $crate::compat::Act::new($area, $name, |$stage| Box::pin(async move $body))
    };
}
pub(crate) use act;

//! Who has written a container's spec: what a person can do about a refusal has another name for each.

use std::fmt;

use oci_spec::runtime::Spec;

use crate::annotations;

/// Who asks for a container.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Asker {
    /// The CRI of containerd.
    Containerd,
    /// CRI-O.
    CriO,
    /// Docker.
    Docker,
    /// `ctr run`, or another client of containerd's.
    Client,
}

impl Asker {
    /// By what only each of them writes: annotations, and Docker's name in the path of the control group (moby:
    /// daemon/oci_linux.go, WithCgroups).
    pub fn of(spec: &Spec) -> Self {
        let annotations = spec.annotations().as_ref();
        if annotations.is_some_and(annotations::is_of_crio) {
            return Self::CriO;
        }
        if annotations.is_some_and(annotations::is_of_cri) {
            return Self::Containerd;
        }
        let cgroup = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
        let cgroup = cgroup.map(|path| path.to_string_lossy()).unwrap_or_default();
        if cgroup.split(['/', ':']).any(|part| part == "docker") { Self::Docker } else { Self::Client }
    }

    /// How it is asked for no devices of the host.
    pub fn without_host_devices(self) -> impl fmt::Display {
        match self {
            Self::Containerd => {
                "a privileged pod needs privileged_without_host_devices = true for the runtime in containerd's configuration"
            }
            Self::CriO => {
                "a privileged pod needs privileged_without_host_devices = true for the runtime in CRI-O's configuration"
            }
            Self::Docker => "leave it out of --device",
            Self::Client => {
                "leave it out of --device, and add --privileged-without-host-devices (ctr 1.7 or later) to --privileged"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn asker(annotations: Value, cgroup: &str) -> Asker {
        let spec = json!({"ociVersion": "1.1.0", "annotations": annotations, "linux": {"cgroupsPath": cgroup}});
        Asker::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn each_is_known_by_what_it_writes() {
        let cri = json!({"io.kubernetes.cri.container-type": "container"});
        let crio = json!({"io.kubernetes.cri-o.ContainerType": "container"});
        assert_eq!(asker(cri, "/docker/x"), Asker::Containerd);
        assert_eq!(asker(crio, ""), Asker::CriO);
        for cgroup in ["system.slice:docker:0a1b", "/docker/0a1b"] {
            assert_eq!(asker(json!({}), cgroup), Asker::Docker);
        }
        assert_eq!(asker(json!({}), "/default/web"), Asker::Client);
    }
}

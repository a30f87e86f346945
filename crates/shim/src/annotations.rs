//! The annotations that say what a container is to its pod, and how large the pod is.
//!
//! containerd: internal/cri/annotations/annotations.go; CRI-O: pkg/annotations. Annotations of `io.bulkhead.` come from
//! whoever writes the pod, so each is refused unless the node's configuration allows it.

use std::collections::HashMap;

use bulkhead_protocol::guest::is_identifier;

const CRI_TYPE: &str = "io.kubernetes.cri.container-type";
const CRI_SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
const CRI_POD_UID: &str = "io.kubernetes.cri.sandbox-uid";
const CRIO_TYPE: &str = "io.kubernetes.cri-o.ContainerType";
const CRIO_SANDBOX: &str = "io.kubernetes.cri-o.SandboxID";
pub(crate) const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub(crate) const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
pub(crate) const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// What all of our own annotations begin with.
pub const OWN_PREFIX: &str = "io.bulkhead.";

/// Annotation that sets the number of vCPUs.
pub const OWN_VCPUS: &str = "io.bulkhead.vcpus";
/// Annotation that sets the memory in MiB.
pub const OWN_MEMORY: &str = "io.bulkhead.memory-mib";

/// A container's place in its pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// The pod's own ("pause") container: the VM stands for it.
    Sandbox,
    /// A container of the pod with this sandbox id.
    Member(String),
    /// No pod around it (`ctr run`): a VM of its own.
    Standalone,
}

/// Reads the role from a spec's annotations. CRI-O passes on what the pod's author wrote, under containerd's names as well;
/// a containerd that was told to pass on everything does the same with CRI-O's. So what each manager says counts as a whole,
/// CRI-O's first, and a pod in which the two differ is refused.
pub fn role(annotations: &HashMap<String, String>) -> Result<Role, AnnotationError> {
    if !annotations.contains_key(CRIO_TYPE) {
        return role_by(annotations, CRI_TYPE, CRI_SANDBOX);
    }
    let role = role_by(annotations, CRIO_TYPE, CRIO_SANDBOX)?;
    if annotations.contains_key(CRI_TYPE) && role_by(annotations, CRI_TYPE, CRI_SANDBOX).as_ref() != Ok(&role) {
        return Err(AnnotationError::TwoRoles);
    }
    Ok(role)
}

/// The role by the annotations of one manager.
fn role_by(
    annotations: &HashMap<String, String>,
    type_name: &'static str,
    sandbox_name: &'static str,
) -> Result<Role, AnnotationError> {
    let find = |name| annotations.get(name).map(String::as_str);
    match (find(type_name), find(sandbox_name).filter(|id| !id.is_empty())) {
        (Some("sandbox"), _) => Ok(Role::Sandbox),
        (Some("container") | None, Some(id)) if is_identifier(id) => Ok(Role::Member(id.to_owned())),
        (Some("container") | None, Some(id)) => Err(AnnotationError::bad(sandbox_name, id)),
        (Some("container"), None) => Err(AnnotationError::NoSandbox(sandbox_name)),
        (None, None) => Ok(Role::Standalone),
        (Some(other), _) => Err(AnnotationError::bad(type_name, other)),
    }
}

/// The uid of the pod's object in the API server, by which the kubelet names the pod's directory. CRI-O does not say it, and
/// passes on whatever the pod's author says.
pub fn pod_uid(annotations: &HashMap<String, String>) -> Option<&str> {
    if annotations.contains_key(CRIO_TYPE) {
        return None;
    }
    annotations.get(CRI_POD_UID).map(String::as_str).filter(|uid| is_identifier(uid))
}

/// Whether it is CRI-O that has written a container's spec.
pub fn is_of_crio(annotations: &HashMap<String, String>) -> bool {
    annotations.contains_key(CRIO_TYPE)
}

/// Whether it is the CRI of containerd.
pub fn is_of_cri(annotations: &HashMap<String, String>) -> bool {
    annotations.contains_key(CRI_TYPE)
}

/// What a pod asks for; `None` where it does not say.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Request {
    /// Whole CPUs, the sum of the containers' limits rounded up.
    pub cpus: Option<u64>,
    /// Bytes, the sum of the containers' limits.
    pub memory: Option<u64>,
    /// vCPUs by our own annotation.
    pub own_vcpus: Option<u64>,
    /// MiB by our own annotation.
    pub own_memory_mib: Option<u64>,
}

/// Reads the sizes. `allowed` lists which of our own annotations the node accepts. CRI-O tells no size: what is there under
/// containerd's names is the pod's author's.
pub fn request(annotations: &HashMap<String, String>, allowed: &[String]) -> Result<Request, AnnotationError> {
    for name in annotations.keys().filter(|name| name.starts_with(OWN_PREFIX)) {
        if ![OWN_VCPUS, OWN_MEMORY].contains(&name.as_str()) {
            return Err(AnnotationError::Unknown(name.clone()));
        }
        if !allowed.contains(name) {
            return Err(AnnotationError::NotAllowed(name.clone()));
        }
    }
    let none = HashMap::new();
    let told = if annotations.contains_key(CRIO_TYPE) { &none } else { annotations };
    let quota = number::<i64>(told, CPU_QUOTA)?.and_then(|quota| u64::try_from(quota).ok());
    let period = number::<u64>(told, CPU_PERIOD)?.filter(|period| *period > 0).unwrap_or(100_000);
    let memory = number::<i64>(told, MEMORY)?.and_then(|bytes| u64::try_from(bytes).ok());
    Ok(Request {
        cpus: quota.filter(|quota| *quota > 0).map(|quota| quota.div_ceil(period)),
        memory: memory.filter(|bytes| *bytes > 0),
        own_vcpus: number(annotations, OWN_VCPUS)?,
        own_memory_mib: number(annotations, OWN_MEMORY)?,
    })
}

fn number<T: std::str::FromStr>(
    annotations: &HashMap<String, String>,
    name: &'static str,
) -> Result<Option<T>, AnnotationError> {
    let Some(text) = annotations.get(name) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| AnnotationError::bad(name, text))
}

/// An annotation that cannot be followed.
#[derive(Debug, thiserror::Error, Eq, PartialEq)]
pub enum AnnotationError {
    /// Not a value of the annotation.
    #[error("annotation {name} has the value {value:?}, which is malformed; correct it or remove it")]
    Malformed {
        /// The annotation.
        name: &'static str,
        /// Its value, shortened.
        value: String,
    },
    /// A member without a sandbox.
    #[error(
        "the container is one of a pod's by its annotations, but the annotation {0}, which names the pod's sandbox, is missing"
    )]
    NoSandbox(&'static str),
    /// Two managers.
    #[error(
        "annotations {CRIO_TYPE} and {CRI_TYPE} contradict each other, so one is not the container runtime's; remove it from the pod's own annotations"
    )]
    TwoRoles,
    /// Ours, but known to nobody.
    #[error("annotation {0:?} is unknown; Bulkhead reads {OWN_VCPUS} and {OWN_MEMORY}")]
    Unknown(String),
    /// Ours, but the node's owner did not allow it.
    #[error("annotation {0:?} is not allowed on this node; list it under `annotations` in /etc/bulkhead/config.toml")]
    NotAllowed(String),
}

impl AnnotationError {
    fn bad(name: &'static str, value: &str) -> Self {
        Self::Malformed { name, value: value.chars().take(64).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn role_follows_either_runtimes_annotations() {
        assert_eq!(role(&map(&[(CRI_TYPE, "sandbox"), (CRI_SANDBOX, "s")])), Ok(Role::Sandbox));
        assert_eq!(role(&map(&[(CRI_TYPE, "container"), (CRI_SANDBOX, "s")])), Ok(Role::Member("s".into())));
        assert_eq!(role(&map(&[(CRIO_TYPE, "container"), (CRIO_SANDBOX, "s")])), Ok(Role::Member("s".into())));
        assert_eq!(role(&map(&[])), Ok(Role::Standalone));
        assert_eq!(role(&map(&[(CRI_TYPE, "container")])), Err(AnnotationError::NoSandbox(CRI_SANDBOX)));
        assert!(role(&map(&[(CRI_TYPE, "podlet")])).is_err());
        assert!(role(&map(&[(CRI_TYPE, "container"), (CRI_SANDBOX, "../x")])).is_err());
    }

    #[test]
    fn what_a_pods_author_wrote_under_the_other_managers_names_is_not_believed() {
        let crio = [(CRIO_TYPE, "container"), (CRIO_SANDBOX, "own")];
        let with = |others: &[(&str, &str)]| role(&map(&[&crio, others].concat()));
        let own = Ok(Role::Member("own".into()));
        assert_eq!(with(&[(CRI_SANDBOX, "other")]), own);
        assert_eq!(with(&[(CRI_TYPE, "container"), (CRI_SANDBOX, "own")]), own);
        assert_eq!(with(&[(CRI_TYPE, "container"), (CRI_SANDBOX, "other")]), Err(AnnotationError::TwoRoles));
        assert_eq!(with(&[(CRI_TYPE, "sandbox")]), Err(AnnotationError::TwoRoles));
        assert_eq!(with(&[(CRI_TYPE, "podlet")]), Err(AnnotationError::TwoRoles));
        assert_eq!(
            role(&map(&[(CRI_TYPE, "container"), (CRIO_SANDBOX, "other")])),
            Err(AnnotationError::NoSandbox(CRI_SANDBOX))
        );
        let sizes = map(&[(CRIO_TYPE, "sandbox"), (MEMORY, "1048576"), (CPU_QUOTA, "900000"), (CPU_PERIOD, "0")]);
        assert_eq!(request(&sizes, &[]), Ok(Request::default()));
    }

    #[test]
    fn sizes_are_rounded_up_and_unlimited_means_none() {
        let got = request(&map(&[(CPU_QUOTA, "150000"), (CPU_PERIOD, "100000"), (MEMORY, "1048576")]), &[]).unwrap();
        assert_eq!((got.cpus, got.memory), (Some(2), Some(1 << 20)));
        let none = request(&map(&[(CPU_QUOTA, "-1"), (MEMORY, "0")]), &[]).unwrap();
        assert_eq!(none, Request::default());
        let usual_period = request(&map(&[(CPU_QUOTA, "150000"), (CPU_PERIOD, "0")]), &[]).unwrap();
        assert_eq!(usual_period.cpus, Some(2));
    }

    #[test]
    fn malformed_sizes_are_named() {
        assert!(matches!(
            request(&map(&[(MEMORY, "lots")]), &[]),
            Err(AnnotationError::Malformed { name: MEMORY, .. })
        ));
    }

    #[test]
    fn own_annotations_are_denied_by_default() {
        assert!(matches!(request(&map(&[(OWN_VCPUS, "2")]), &[]), Err(AnnotationError::NotAllowed(_))));
        assert_eq!(request(&map(&[(OWN_VCPUS, "2")]), &[OWN_VCPUS.into()]).unwrap().own_vcpus, Some(2));
        assert!(matches!(request(&map(&[("io.bulkhead.kernel", "/x")]), &[]), Err(AnnotationError::Unknown(_))));
    }
}

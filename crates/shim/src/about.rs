//! Whom a line of the log is about, see [`crate::cli::logging`].

use std::collections::HashMap;
use std::sync::OnceLock;

use tracing::{Instrument, Span};

/// The pod as Kubernetes calls it. A daemon has one.
static POD: OnceLock<String> = OnceLock::new();

/// Names of a pod and of its namespace, as containerd and CRI-O tell them.
const NAMES: [(&str, &str); 2] = [
    ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name"),
    ("io.kubernetes.cri-o.Namespace", "io.kubernetes.cri-o.KubeName"),
];

/// Longest name of a Kubernetes object, a DNS subdomain (RFC 1123).
const MAX_NAME: usize = 253;

/// Notes the pod's name by the annotations of one of its containers; the pod's author may be able to write those.
pub fn note_pod(annotations: Option<&HashMap<String, String>>) {
    let Some(annotations) = annotations else { return };
    let find = |(namespace, name): &(&str, &str)| Some((annotations.get(*namespace)?, annotations.get(*name)?));
    if let Some((namespace, name)) = NAMES.iter().find_map(find) {
        note_pod_name(namespace, name);
    }
}

/// Notes the pod's name.
pub fn note_pod_name(namespace: &str, name: &str) {
    if is_name(namespace) && is_name(name) {
        let _ = POD.set(format!("{namespace}/{name}"));
    }
}

fn is_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    !text.is_empty() && text.len() <= MAX_NAME && text.bytes().all(fits)
}

/// `namespace/name`, once it is known.
pub fn pod_name() -> Option<&'static str> {
    POD.get().map(String::as_str)
}

/// What is about a container's process; an empty exec id means its init.
pub fn process(container: &str, exec: &str) -> Span {
    let exec = (!exec.is_empty()).then(|| tracing::field::display(exec));
    tracing::info_span!(parent: None, "process", %container, exec)
}

/// Runs a task that is about what its creator is about.
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::spawn(task.in_current_span())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_kubernetes_gives_are_taken() {
        assert!(
            is_name("web-5d8.x") && !is_name("") && !is_name("a b") && !is_name("a\nb") && !is_name(&"a".repeat(254))
        );
    }
}

//! OCI hooks, sorted by where they can run (runtime-spec: config.md, POSIX-platform Hooks).
//!
//! Hooks of the runtime's namespace are programs of the host and run there; a `startContainer` hook is a program of the
//! container's own and runs in it. A `createContainer` hook would be a program of the host in the container's namespaces,
//! which are in another kernel: it is refused.

use oci_spec::runtime::{Hook, Hooks, Spec};

use super::SpecError;

/// Hooks that run on the host, by when they do.
#[derive(Clone, Debug, Default)]
pub struct HostHooks {
    /// Once the container is created: `prestart` and `createRuntime`.
    pub created: Vec<Hook>,
    /// Once it has been started: `poststart`.
    pub started: Vec<Hook>,
    /// Once it has been deleted: `poststop`.
    pub deleted: Vec<Hook>,
}

/// Takes the host's hooks out of a spec, and leaves the container's.
pub fn take(spec: &mut Spec) -> Result<HostHooks, SpecError> {
    let Some(hooks) = spec.hooks().clone() else { return Ok(HostHooks::default()) };
    if hooks.create_container().as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(SpecError::CreateContainerHook);
    }
    let mut created = hooks.prestart().clone().unwrap_or_default();
    created.extend(hooks.create_runtime().clone().unwrap_or_default());
    let in_container = hooks.start_container().clone().filter(|list| !list.is_empty());
    spec.set_hooks(in_container.map(|list| {
        let mut kept = Hooks::default();
        kept.set_start_container(Some(list));
        kept
    }));
    Ok(HostHooks {
        created,
        started: hooks.poststart().clone().unwrap_or_default(),
        deleted: hooks.poststop().clone().unwrap_or_default(),
    })
}

//! Bulkhead's virtual machine monitor: boots a guest from a [`VmSpec`](bulkhead_protocol::vmspec::VmSpec) under KVM and
//! emulates its devices. Knows nothing of containers, opens nothing: it works on descriptors that it was handed.

pub mod event_loop;
pub mod virtio;

//! Bulkhead's virtual machine monitor: boots a guest from a [`VmSpec`](bulkhead_protocol::vmspec::VmSpec) under KVM and
//! emulates its devices. Knows nothing of containers, opens nothing: it works on descriptors that it was handed.

pub mod boot;
pub mod bus;
pub mod control;
pub mod descriptors;
pub mod devices;
pub mod event_loop;
pub mod exit;
pub mod irq;
pub mod jail;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod log;
pub mod machine;
pub mod memory;
pub mod ratelimit;
pub mod register_page;
pub mod virtio;

//! What `bulkhead` is made of, and what the end-to-end suite shares with it: a client of the Kubernetes CRI, and one of the shims.

pub mod counters;
pub mod cri;
pub mod log;
pub mod net;
pub mod pods;

//! What `bulkhead` is made of, and what the end-to-end suite shares with it: a client of the Kubernetes CRI.

pub mod cri;
pub mod log;
pub mod net;

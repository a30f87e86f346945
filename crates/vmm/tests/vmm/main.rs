//! Tests of the VMM on a real /dev/kvm. One that emulates is enough: the payloads are a few instructions long.
#![allow(clippy::unwrap_used, clippy::expect_used)] // the helpers are tests as well

mod common;
mod control;
mod hostile_guest;
mod hotplug;
mod images;
mod jail;
mod machine;
mod tap;

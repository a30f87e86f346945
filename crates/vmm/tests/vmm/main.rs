//! Tests of the VMM on a real /dev/kvm. One that emulates is enough: the payloads are a few instructions long.

mod common;
mod control;
mod machine;

//! `containerd-shim-bulkhead-v2`: the host side of one pod (ARCHITECTURE.md, bird's eye).
//!
//! containerd runs this binary with `start` for every container of a pod, the first of which leaves a daemon behind
//! that serves the pod, and with `delete` when the daemon's connection closed (containerd: core/runtime/v2/README.md).

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_shim::run(std::env::args_os().skip(1))
}

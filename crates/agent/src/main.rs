//! `bulkhead-agent`: PID 1 of the guest (ARCHITECTURE.md, D6, D8).
//!
//! The shim asks over vsock (ttrpc for control, one connection for each standard stream), the agent answers. What it asks
//! of the kernel it does itself, except for the creation of containers: libcontainer forks and blocks, so the agent has
//! single-threaded helpers for that ([`runtime`]).
#![cfg_attr(not(test), no_main)]

mod boot;
mod cgroup;
mod containers;
mod devices;
mod entry;
mod events;
mod forward;
mod guest_time;
mod handover;
mod layers;
mod listen;
mod log;
mod netns;
mod power;
mod reaper;
mod rpc;
mod runtime;
mod sandbox;
mod stdio;
mod sys;
mod volumes;

use std::convert::Infallible;
use std::path::PathBuf;

/// What this process is for.
#[derive(Debug, Eq, PartialEq)]
enum Mode {
    /// PID 1 of a guest.
    Init,
    /// PID 1 of a pid namespace that the pod's containers share.
    PidNamespace,
    /// Makes a container's working directory, as a hook of libcontainer's.
    Directory { rootfs: PathBuf, cwd: PathBuf },
    /// Copies directories of the image into what is mounted on them, as a hook of libcontainer's.
    CopyUp { rootfs: PathBuf, places: Vec<PathBuf> },
    /// Serves on Unix sockets in a directory, outside of a guest: for developers and tests.
    Serve(PathBuf),
}

impl Mode {
    /// The kernel hands words of its command line to init, so only the agent's own words count.
    fn from_args(mut args: impl Iterator<Item = String>, pid: u32) -> Option<Self> {
        match (args.next().as_deref(), args.next()) {
            (Some(runtime::pid_namespace::ARGUMENT), _) => Some(Self::PidNamespace),
            (Some(runtime::directory::DIRECTORY_ARG), Some(rootfs)) => {
                args.next().map(|cwd| Self::Directory { rootfs: rootfs.into(), cwd: cwd.into() })
            }
            (Some(runtime::tmpfs::COPY_UP_ARG), Some(rootfs)) => {
                Some(Self::CopyUp { rootfs: rootfs.into(), places: args.map(PathBuf::from).collect() })
            }
            (Some("serve"), Some(dir)) => Some(Self::Serve(dir.into())),
            _ if pid == 1 => Some(Self::Init),
            _ => None,
        }
    }
}

/// Runs the agent in the mode that its arguments ask for; answers the exit status.
#[cfg_attr(test, allow(dead_code))]
fn run() -> i32 {
    match Mode::from_args(std::env::args().skip(1), std::process::id()) {
        Some(Mode::PidNamespace) => runtime::pid_namespace::main(),
        Some(Mode::Directory { rootfs, cwd }) => runtime::directory::main(&rootfs, &cwd),
        Some(Mode::CopyUp { rootfs, places }) => runtime::tmpfs::main(&rootfs, &places),
        Some(Mode::Serve(dir)) => report(listen::serve_unix(&dir)),
        Some(Mode::Init) => report(power::reboot_after(boot::init)),
        None => {
            eprintln!("bulkhead-agent is the init of a Bulkhead guest; outside of one: bulkhead-agent serve DIRECTORY");
            2
        }
    }
}

fn report<E: std::error::Error>(outcome: Result<Infallible, E>) -> i32 {
    let Err(error) = outcome;
    eprintln!("bulkhead-agent: {}", bulkhead_protocol::error::chain(&error));
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(args: &[&str], pid: u32) -> Option<Mode> {
        Mode::from_args(args.iter().map(ToString::to_string), pid)
    }

    #[test]
    fn words_of_the_kernel_command_line_do_not_change_init() {
        assert_eq!(mode(&["quiet", "splash"], 1), Some(Mode::Init));
        assert_eq!(mode(&[], 1), Some(Mode::Init));
    }

    #[test]
    fn own_words_choose_the_mode() {
        assert_eq!(mode(&[runtime::pid_namespace::ARGUMENT], 1), Some(Mode::PidNamespace));
        let directory = Mode::Directory { rootfs: "/r".into(), cwd: "/c".into() };
        assert_eq!(mode(&[runtime::directory::DIRECTORY_ARG, "/r", "/c"], 1), Some(directory));
        let copy_up = Mode::CopyUp { rootfs: "/r".into(), places: vec!["/a".into(), "/b".into()] };
        assert_eq!(mode(&[runtime::tmpfs::COPY_UP_ARG, "/r", "/a", "/b"], 1), Some(copy_up));
        assert_eq!(mode(&["serve", "/run/x"], 7), Some(Mode::Serve("/run/x".into())));
        assert_eq!(mode(&[], 7), None);
    }
}

//! The last step inside the container: finding the program and becoming it.
//!
//! libcontainer's own executor refuses programs that only their owner may execute, keeps ignored signals ignored, and
//! resolves a missing HOME through the C library's NSS. This one does what runc does, and also installs the seccomp filter
//! and runs the startContainer hooks.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_protocol::error::chain;
use libcontainer::capabilities::drop_privileges;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::utils::parse_env;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::{Capability, Hook, LinuxCapabilities, Process, Spec};
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, accessat, fcntl_getfl, fstat, makedev, open, stat};
use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};

use super::home_dir;
use super::message::WindowSize;
use super::seccomp::Filter;
use crate::sys;

/// Search path of a process whose environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes a container's program.
#[derive(Clone)]
pub struct AgentExecutor {
    /// What only a container's init does; `None` for an exec.
    pub init: Option<Init>,
    /// Size of the terminal that is standard input.
    pub window: Option<WindowSize>,
    /// What is still to be done to the process.
    pub confinement: Option<Confinement>,
}

/// A container's init on its way to the program.
#[derive(Clone)]
pub struct Init {
    /// Id of the container.
    pub id: String,
    /// Directory of its configuration.
    pub bundle: PathBuf,
    /// Its startContainer hooks. They are programs of the image, so they run as confined as the container's own: with its
    /// capabilities and, as runc has it, under its filter.
    pub hooks: Vec<Hook>,
}

impl Init {
    fn run_hooks(&self, env: &[String], annotations: Option<&HashMap<String, String>>) -> Result<(), ExecutorError> {
        let pid = i32::try_from(std::process::id()).ok();
        let mut state = State::new(&self.id, ContainerStatus::Created, pid, self.bundle.clone());
        state.annotations = annotations.cloned();
        run_hooks(Some(&self.hooks), Some(&state), None, None, Some(&parse_env(env)))
            .map_err(|error| ExecutorError::Other(format!("startContainer hook: {}", chain(&error))))
    }
}

/// The seccomp filter. libcontainer 0.7 does not apply it to execs, and to an init long before its program: whatever it
/// calls up to there, and a profile made for the program may refuse.
///
/// Installing a filter takes CAP_SYS_ADMIN or no_new_privs (seccomp(2)), and the executor runs when capabilities are
/// dropped already. Without no_new_privs the process is therefore described with that capability, and CAP_SETPCAP to get
/// rid of both, and the executor drops to the real set after the filter is in place: runc's order. An init has both while it
/// waits for its start. It is not dumpable, so in a shared pid namespace only a container with CAP_SYS_PTRACE can reach them.
#[derive(Clone)]
pub struct Confinement {
    /// The filter.
    pub filter: Filter,
    /// The real set, if the process was described with a wider one.
    pub capabilities: Option<LinuxCapabilities>,
}

impl Confinement {
    /// Describes a process so that a filter can be installed in it at last; answers its real capabilities if that changed them.
    pub fn widen(process: &mut Process) -> Option<LinuxCapabilities> {
        if process.no_new_privileges() == Some(true) {
            return None;
        }
        let real = process.capabilities().clone()?;
        let mut wider = real.clone();
        let with = |set: &Option<oci_spec::runtime::Capabilities>| {
            let mut set = set.clone().unwrap_or_default();
            set.extend([Capability::SysAdmin, Capability::Setpcap]);
            Some(set)
        };
        wider.set_bounding(with(real.bounding()));
        wider.set_effective(with(real.effective()));
        wider.set_permitted(with(real.permitted()));
        process.set_capabilities(Some(wider));
        Some(real)
    }

    fn apply(&self) -> Result<(), ExecutorError> {
        let failed = |what: &str, error: &dyn std::error::Error| {
            ExecutorError::Other(format!("cannot {what}: {}", chain(error)))
        };
        self.filter.install().map_err(|error| failed("install the seccomp filter", &error))?;
        if let Some(capabilities) = &self.capabilities {
            let syscall = create_syscall();
            drop_privileges(capabilities, syscall.as_ref()).map_err(|error| failed("drop capabilities", &error))?;
        }
        Ok(())
    }
}

impl AgentExecutor {
    /// Becomes the program. Returns only if it cannot.
    fn become_program(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let program = find_program(process).map_err(ExecutorError::Other)?;
        let mut env = process.env().clone().unwrap_or_default();
        home_dir::fill_in(&mut env, process.user().uid());
        let path = c_string(program.as_os_str().as_encoded_bytes())?;
        let args = c_strings(process.args().as_deref())?;
        let environment = c_strings(Some(&env))?;
        if let Some(window) = self.window.filter(|window| window.width > 0 && window.height > 0) {
            let size = Winsize { ws_col: window.width, ws_row: window.height, ws_xpixel: 0, ws_ypixel: 0 };
            let _ = tcsetwinsize(rustix::stdio::stdin(), size);
        }
        // Without it the streams are what they were.
        let _ = reopen_null();
        sys::default_signals();
        if let Some(confinement) = &self.confinement {
            confinement.apply()?;
        }
        // From here on every system call is one that the profile has to allow.
        if let Some(init) = self.init.as_ref().filter(|init| !init.hooks.is_empty()) {
            // A hook need not read its input.
            sys::ignore_sigpipe();
            init.run_hooks(&env, spec.annotations().as_ref())?;
            sys::default_signals();
        }
        let Err(errno) = nix::unistd::execve(&path, &args, &environment);
        Err(ExecutorError::Other(format!("exec {}: {}", program.display(), words(errno.desc()))))
    }
}

impl Executor for AgentExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let outcome = self.become_program(spec);
        if let Err(error) = &outcome
            && self.init.is_some()
        {
            // Whoever waited for init's creation has gone on, so this is for the container's log; the status is runc 1.1's.
            let _ = rustix::io::write(rustix::stdio::stderr(), format!("{error}\n").as_bytes());
            std::process::exit(1);
        }
        outcome
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let process =
            process.ok_or_else(|| ExecutorValidationError::ArgValidationError("spec has no process".into()))?;
        find_program(process).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    /// The environment goes to execve as it is in the spec.
    fn setup_envs(&self, _envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}

/// Opens for writing too what libcontainer has opened for reading alone: of the standard streams of an init, each that is
/// /dev/null. A program may write there.
fn reopen_null() -> rustix::io::Result<()> {
    use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout};
    writable_null(stdin())?.map(dup2_stdin).transpose()?;
    writable_null(stdout())?.map(dup2_stdout).transpose()?;
    writable_null(stderr())?.map(dup2_stderr).transpose()?;
    Ok(())
}

/// What to put in the place of a descriptor, if it is a /dev/null that cannot be written to.
fn writable_null(fd: BorrowedFd<'_>) -> rustix::io::Result<Option<OwnedFd>> {
    let is_null = |fd: BorrowedFd<'_>| {
        let found = fstat(fd)?;
        let kind = FileType::from_raw_mode(found.st_mode);
        Ok(kind == FileType::CharacterDevice && found.st_rdev == makedev(1, 3))
    };
    if !is_null(fd)? || fcntl_getfl(fd)? & OFlags::ACCMODE != OFlags::RDONLY {
        return Ok(None);
    }
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?;
    Ok(is_null(null.as_fd())?.then_some(null))
}

fn c_string(bytes: &[u8]) -> Result<CString, ExecutorError> {
    CString::new(bytes).map_err(|_| ExecutorError::InvalidArg)
}

fn c_strings(words: Option<&[String]>) -> Result<Vec<CString>, ExecutorError> {
    words.unwrap_or_default().iter().map(|word| c_string(word.as_bytes())).collect()
}

/// The file that the process's first argument names, searched for as a shell would.
fn find_program(process: &Process) -> Result<PathBuf, String> {
    let name = process.args().as_ref().and_then(|args| args.first()).filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| "the process has no program to execute".to_owned())?;
    if name.contains('/') {
        return executable(Path::new(name)).map(|()| name.into()).map_err(|why| format!("exec: {name:?}: {why}"));
    }
    let env = process.env().as_deref().unwrap_or_default();
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    path.split(':')
        .filter(|dir| dir.starts_with('/'))
        .map(|dir| Path::new(dir).join(name))
        .find(|candidate| executable(candidate).is_ok())
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

/// Says what runc says: tools, and people, look for its words.
fn executable(path: &Path) -> Result<(), String> {
    let found = stat(path).map_err(|errno| format!("stat {}: {}", path.display(), describe(errno)))?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        return Err(describe(Errno::ACCESS));
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(describe)
}

fn describe(errno: Errno) -> String {
    words(nix::errno::Errno::from_raw(errno.raw_os_error()).desc())
}

/// The C library's description of an error as Go writes it.
fn words(description: &str) -> String {
    description.to_lowercase()
}

#[cfg(test)]
mod tests;

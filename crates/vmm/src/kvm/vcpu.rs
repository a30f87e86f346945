//! A vCPU and the thread that runs it.
//!
//! A thread leaves KVM_RUN for an exit or a kick. A kick sets `immediate_exit` in the vCPU's run page and then signals the
//! thread: whether the signal comes before KVM_RUN or within, KVM_RUN returns EINTR (api.rst, section 5, `kvm_run`).
//!
//! KVM_RUN returns EAGAIN for two reasons. A vCPU that waits for its startup IPI was woken for something. Or, since Linux 6.14,
//! KVM makes a task of its own for the VM when a vCPU first runs (`kvm-nx-lpage-recovery`), in the VMM's process, and the
//! limit of tasks does not allow it. The vCPU's state tells them apart ([`Again`]).
#![allow(unsafe_code)] // reason: `immediate_exit` is written by another thread, and pthread_kill(3)

use std::fmt;
use std::io;
use std::ops::Add;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};

use bulkhead_protocol::control::ExitReason;
use kvm_bindings::{
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::images::ImageSpace;
use crate::bus::Bus;
use crate::exit::ExitSignal;
use crate::jail::{self, Kind};

/// A vCPU that does not run.
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
    counts: ExitCounts,
}

/// How often vCPUs left KVM for the VMM, by reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitCounts {
    mmio: u64,
    pio: u64,
    other: u64,
}

impl Add for ExitCounts {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        Self { mmio: self.mmio + more.mmio, pio: self.pio + more.pio, other: self.other + more.other }
    }
}

impl fmt::Display for ExitCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} mmio, {} pio, {} other", self.mmio, self.pio, self.other)
    }
}

/// What a vCPU's exits go to.
#[derive(Clone)]
pub struct Buses {
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Images, whose pages no read exits for.
    pub images: ImageSpace,
}

/// Prepares the process for kicks; once, before the first vCPU runs.
pub fn register_kick_signal() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(io::Error::from)
}

impl Vcpu {
    pub(super) fn new(id: u8, fd: VcpuFd) -> Self {
        Self { id, fd, counts: ExitCounts::default() }
    }

    /// Starts the thread. The guest's end, seen by any vCPU, is raised in `exit`.
    pub fn spawn(mut self, buses: Buses, exit: Arc<ExitSignal>) -> io::Result<VcpuThread> {
        let flag = ImmediateExit(&raw mut self.fd.get_kvm_run().immediate_exit);
        let thread = thread::Builder::new().name(format!("vcpu{}", self.id)).spawn(move || {
            jail::confine_thread(Kind::Vcpu);
            if let Some(reason) = self.run(&buses) {
                exit.raise(reason);
            }
            self
        })?;
        Ok(VcpuThread { thread, flag })
    }

    /// What it left KVM for so far.
    pub fn exit_counts(&self) -> ExitCounts {
        self.counts
    }

    /// Logs an ioctl that failed.
    fn failed(&self, ioctl: &str, error: errno::Error) -> ExitReason {
        crate::vmm_log!("vcpu{}: {ioctl} failed: {error}", self.id);
        ExitReason::VcpuFault
    }

    /// Runs until the guest ends (then the reason) or a kick.
    fn run(&mut self, buses: &Buses) -> Option<ExitReason> {
        let mut again = Again::default();
        loop {
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                // A kick, see the module's head.
                Err(error) if error.errno() == libc::EINTR => {
                    if self.fd.get_kvm_run().immediate_exit != 0 {
                        return None;
                    }
                    continue;
                }
                Err(error) if error.errno() == libc::EAGAIN => match self.fd.get_mp_state() {
                    Ok(state) if again.is_a_wait(state.mp_state) => continue,
                    Ok(_) => {
                        crate::vmm_log!("vcpu{}: KVM cannot make a task that it needs: pids.max is reached", self.id);
                        return Some(ExitReason::NoTask);
                    }
                    Err(error) => return Some(self.failed("KVM_GET_MP_STATE", error)),
                },
                Err(error) if error.errno() == libc::EFAULT => return Some(memory_is_gone(self.id)),
                Err(error) => return Some(self.failed("KVM_RUN", error)),
            };
            again = Again::default();
            let counts = &mut self.counts;
            match &exit {
                VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => counts.mmio += 1,
                VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => counts.pio += 1,
                _ => counts.other += 1,
            }
            match exit {
                VcpuExit::MmioRead(address, _) if buses.images.has(address) => return Some(memory_is_gone(self.id)),
                VcpuExit::MmioRead(address, data) => buses.mmio.read(address, data),
                VcpuExit::MmioWrite(address, data) => buses.mmio.write(address, data),
                VcpuExit::IoIn(port, data) => buses.pio.read(u64::from(port), data),
                VcpuExit::IoOut(port, data) => buses.pio.write(u64::from(port), data),
                VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {}
                VcpuExit::MemoryFault { .. } => return Some(memory_is_gone(self.id)),
                other => return Some(last_exit(self.id, &other)),
            }
        }
    }
}

/// What EAGAIN of KVM_RUN means.
#[derive(Default)]
struct Again {
    /// It came for a vCPU that can run, and nothing has come since.
    seen: bool,
}

impl Again {
    /// Whether KVM_RUN has only waited, for a vCPU that is in this state now. One that is waiting for its startup has. One that
    /// is not may have been started by what ended the wait, but then it runs the next time.
    fn is_a_wait(&mut self, state: u32) -> bool {
        let waits = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED];
        waits.contains(&state) || !std::mem::replace(&mut self.seen, true)
    }
}

/// The host cannot give the guest a page: of an image whose file was cut short or whose disk fails (`images`). Newer kernels have
/// an exit of its own for it (KVM_EXIT_MEMORY_FAULT) instead of EFAULT. Where KVM emulates the instruction that reads the page, it
/// takes the page for one of a device's.
fn memory_is_gone(id: u8) -> ExitReason {
    crate::vmm_log!("vcpu{id}: {}", ExitReason::MEMORY_GONE);
    ExitReason::MemoryGone
}

/// Why an exit that has no answer ends the guest.
fn last_exit(id: u8, exit: &VcpuExit<'_>) -> ExitReason {
    match exit {
        // Our guests reset by the keyboard controller; this one met a fault that it could not handle, and could not say so.
        VcpuExit::Shutdown => {
            crate::vmm_log!("vcpu{id}: the guest has crashed (triple fault)");
            ExitReason::Reset
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET, _) => ExitReason::Reset,
        fault => {
            crate::vmm_log!("vcpu{id}: KVM cannot run the guest any further: {fault:?}");
            ExitReason::VcpuFault
        }
    }
}

/// A vCPU's thread.
pub struct VcpuThread {
    thread: JoinHandle<Vcpu>,
    flag: ImmediateExit,
}

impl VcpuThread {
    /// Makes the thread leave KVM_RUN and end. Does not wait.
    pub fn kick(&self) -> io::Result<()> {
        self.flag.set();
        // SAFETY: the thread has not been joined, so its handle is valid; the signal has a handler that does nothing.
        match unsafe { libc::pthread_kill(self.thread.as_pthread_t(), SIGRTMIN()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Waits for the thread's end.
    pub fn join(self) -> Option<Vcpu> {
        self.thread.join().ok()
    }
}

/// The `immediate_exit` byte of a vCPU's run page.
struct ImmediateExit(*mut u8);

// SAFETY: the byte is accessed atomically, and KVM defines it to be set by other threads.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn set(&self) {
        // SAFETY: the run page is mapped as long as the `VcpuFd` lives, which the thread owns until it is joined, and the
        // flag's owner has not joined it. A panic in the thread ends the process.
        unsafe { AtomicU8::from_ptr(self.0) }.store(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE};

    #[test]
    fn hostile_27_again_is_a_wait_for_a_vcpu_that_is_not_started_however_often_it_comes() {
        let mut again = Again::default();
        for _ in 0..1000 {
            for state in [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED] {
                assert!(again.is_a_wait(state));
            }
        }
        // It was started by what ended the wait.
        assert!(again.is_a_wait(KVM_MP_STATE_RUNNABLE));
    }

    #[test]
    fn hostile_27_again_that_repeats_for_a_vcpu_that_can_run_is_a_task_that_cannot_be_made() {
        for state in [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED] {
            let mut again = Again::default();
            assert!(again.is_a_wait(state));
            assert!(!again.is_a_wait(state) && !again.is_a_wait(state));
        }
    }
}

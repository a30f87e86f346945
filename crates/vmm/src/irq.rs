//! Interrupt lines of the machine.

/// An edge-triggered line.
pub trait IrqLine: Send + Sync {
    /// Raises it and lets it go: one interrupt, unless one of its is waiting to be taken.
    fn pulse(&self);
}

#[cfg(any(test, feature = "testing"))]
impl IrqLine for vmm_sys_util::eventfd::EventFd {
    fn pulse(&self) {
        // A full counter is an interrupt that is pending.
        let _ = self.write(1);
    }
}

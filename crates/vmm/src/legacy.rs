//! The two PC devices that are not virtio: a keyboard controller that can only reset the machine, and a serial port for
//! debugging a kernel that dies before its console does.

use std::io;
use std::sync::Arc;

use bulkhead_protocol::control::ExitReason;
use vm_superio::serial::NoEvents;
use vm_superio::{I8042Device, Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::exit::ExitSignal;
use crate::virtio::console::output::Output;

/// The keyboard controller's reset line (`reboot=k`).
pub struct I8042(I8042Device<ResetLine>);

/// Number of ports from 0x60 on.
pub const I8042_PORTS: u64 = 5;

struct ResetLine(Arc<ExitSignal>);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.raise(ExitReason::Reset);
        Ok(())
    }
}

impl I8042 {
    /// A controller whose reset command ends the guest.
    pub fn new(exit: Arc<ExitSignal>) -> Self {
        Self(I8042Device::new(ResetLine(exit)))
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let Ok(()) = self.0.write(offset, *byte);
        }
    }
}

/// A 16550-like serial port, output only.
pub struct SerialPort(Serial<Irq, NoEvents, Output>);

/// Number of ports from 0x3f8 on.
pub const SERIAL_PORTS: u64 = 8;

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialPort {
    /// A port that writes to `output`, with `irq` for the transmitter's interrupt.
    pub fn new(irq: EventFd, output: Output) -> Self {
        Self(Serial::new(Irq(irq), output))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // It fails if the interrupt cannot be raised, which is as much as a port can do about it.
            let _ = self.0.write(offset, *byte);
        }
    }
}

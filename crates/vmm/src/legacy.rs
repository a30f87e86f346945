//! The two PC devices that are not virtio: a keyboard controller that can only reset the machine, and a serial port for
//! debugging a kernel that dies before its console does.

use std::io;
use std::sync::Arc;

use bulkhead_protocol::control::ExitReason;
use vm_superio::serial::NoEvents;
use vm_superio::{I8042Device, Serial, Trigger};

use crate::bus::BusDevice;
use crate::exit::ExitSignal;
use crate::irq::IrqLine;
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

struct Irq(Box<dyn IrqLine>);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse();
        Ok(())
    }
}

impl SerialPort {
    /// A port that writes to `output`, with `irq` for the transmitter's interrupt.
    pub fn new(irq: Box<dyn IrqLine>, output: Output) -> Self {
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    const DATA: u64 = 0;
    const MODEM_CONTROL: u64 = 4;
    const LINE_STATUS: u64 = 5;
    const LOOPBACK: u8 = 0x10;

    fn port() -> (SerialPort, std::io::PipeReader) {
        let (reader, writer) = std::io::pipe().unwrap();
        (SerialPort::new(Box::new(EventFd::new(EFD_NONBLOCK).unwrap()), Output::new(writer.into()).unwrap()), reader)
    }

    #[test]
    fn hostile_14_serial_flood_that_nobody_reads_is_dropped_without_blocking() {
        let (mut port, mut reader) = port();
        for _ in 0..200_000 {
            port.write(DATA, b"x");
        }
        drop(port);
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        // A pipe holds 64 KiB unless told otherwise.
        assert!(!text.is_empty() && text.len() <= 0x1_0000);
    }

    #[test]
    fn hostile_14_serial_output_to_a_closed_pipe_is_dropped() {
        let (mut port, reader) = port();
        drop(reader);
        for _ in 0..1000 {
            port.write(DATA, b"x");
        }
    }

    /// CVE-2020-27174.
    #[test]
    fn hostile_14_serial_loopback_keeps_no_more_than_its_fifo() {
        let (mut port, _reader) = port();
        port.write(MODEM_CONTROL, &[LOOPBACK]);
        for _ in 0..100_000 {
            port.write(DATA, b"x");
        }
        let mut kept = 0;
        let mut byte = [0];
        loop {
            port.read(LINE_STATUS, &mut byte);
            if byte[0] & 1 == 0 {
                break;
            }
            port.read(DATA, &mut byte);
            kept += 1;
        }
        assert!(kept <= 64, "{kept}");
    }

    #[test]
    fn hostile_02_ports_are_bytes() {
        let (mut port, _reader) = port();
        let exit = Arc::new(ExitSignal::new().unwrap());
        let mut keyboard = I8042::new(exit.clone());
        for width in [0, 2, 4, 8] {
            for offset in [0, 4, 7, u64::MAX] {
                let mut data = vec![0; width];
                port.read(offset, &mut data);
                port.write(offset, &vec![0xfe; width]);
                keyboard.read(offset, &mut data);
                keyboard.write(offset, &vec![0xfe; width]);
                assert_eq!(data, vec![0; width]);
            }
        }
        for offset in [5, 100, 256, u64::MAX] {
            keyboard.write(offset, &[0xfe]);
        }
        assert_eq!(exit.reason(), None);
    }
}

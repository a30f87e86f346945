//! How a driver reaches a device. There is one transport, virtio-mmio; a PCI transport would be a second module here.

mod interrupt;
mod mmio;
mod queue;
mod slot;

pub use interrupt::MmioInterrupt;
pub use mmio::MmioTransport;
pub use slot::{Slot, SlotError};

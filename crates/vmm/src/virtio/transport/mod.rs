//! How a driver reaches a device. There is one transport, virtio-mmio; a PCI transport would be a second module here.

mod interrupt;
mod mmio;
mod queue;

pub use interrupt::MmioInterrupt;
pub use mmio::{MAGIC, MmioTransport, QUEUE_NOTIFY, REG_MAGIC, REG_VERSION, VERSION};

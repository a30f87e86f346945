//! Stand-ins until the devices land.

use std::os::fd::OwnedFd;

use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::EventLoop;

/// Not built.
#[derive(Debug, thiserror::Error)]
#[error("this build has no {0} device")]
pub struct Unbuilt(&'static str);

/// Not built.
pub type NetError = NetUnbuilt;

macro_rules! device {
    ($device:ident, $error:ident, $name:literal) => {
        /// Not built.
        #[derive(Debug, thiserror::Error)]
        #[error("this build has no {} device", $name)]
        pub struct $error;
        /// Not built.
        pub struct $device(std::convert::Infallible);
        impl VirtioDevice for $device {
            fn device_type(&self) -> u32 {
                match self.0 {}
            }
            fn queue_sizes(&self) -> &[u16] {
                match self.0 {}
            }
            fn features(&self) -> u64 {
                match self.0 {}
            }
            fn read_config(&self, _: u64, _: &mut [u8]) {}
            fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
                match self.0 {}
            }
            fn reset(&mut self) {}
        }
    };
}
device!(Net, NetUnbuilt, "net");

#[allow(missing_docs)]
impl Net {
    pub fn new(_: OwnedFd, _: [u8; 6], _: u16, _: EventLoop) -> Result<Self, NetError> {
        Err(NetUnbuilt)
    }
}

//! The way to the guest, made by whoever knows its VM: what is dialled in the namespace goes there.

use std::error::Error;

use tokio::net::UnixStream;

use crate::deadlines::Deadline;

/// Why there is no connection to the guest.
pub type NoConnection = Box<dyn Error + Send + Sync>;

/// Connects to one guest. Cheap to clone.
pub trait Connector: Clone + Send + Sync + 'static {
    /// A connection to be forwarded to the guest's localhost ([`bulkhead_protocol::forward`]).
    fn forward(&self, deadline: Deadline) -> impl Future<Output = Result<UnixStream, NoConnection>> + Send;

    /// A connection for what the guest hands over ([`bulkhead_protocol::handover`]).
    fn handover(&self, deadline: Deadline) -> impl Future<Output = Result<UnixStream, NoConnection>> + Send;

    /// Returns when the VM is gone.
    fn vm_ended(&self) -> impl Future<Output = ()> + Send;
}

//! How a call runs and how its error is told, the same for every service.

use bulkhead_protocol::error::chain;

use crate::about;
use crate::pod::error::TaskError;

/// The one place where an error becomes a status.
pub fn status(error: TaskError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
}

/// Runs a call that changes something in a task of its own: a caller who gives up or goes away must not leave it half done.
pub async fn detached<T: Send + 'static>(
    call: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    about::spawn(call).await.unwrap_or(Err(TaskError::Ending)).map_err(status)
}

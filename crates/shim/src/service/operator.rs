//! What an operator's command asks (`proto/operator.proto`), over the socket that containerd has.

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::operator::{CountersRequest, CountersResponse, Operator};
use ttrpc::asynchronous::TtrpcContext;

use super::status::status;
use crate::deadlines::{Deadline, Operation};
use crate::pod::Pod;

/// The service of one pod.
pub struct OperatorService {
    pod: Arc<Pod>,
}

impl OperatorService {
    /// Serves a pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

#[async_trait]
impl Operator for OperatorService {
    async fn counters(&self, _: &TtrpcContext, _: CountersRequest) -> ttrpc::Result<CountersResponse> {
        let counters = self.pod.counters(Deadline::begin(Operation::Counters)).await.map_err(status)?;
        // Numbers under fixed names, which can always be written.
        let devices = serde_json::to_string(&counters).unwrap_or_default();
        Ok(CountersResponse { devices, ..Default::default() })
    }
}

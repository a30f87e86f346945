//! The agent's answers, as messages and as the bytes of a connection, and what the shim makes of them.

use std::time::Duration;

use bulkhead_protocol::agent::{
    AgentClient, BlockDevice, ContainerRequest, CreateSandboxRequest, CreateSandboxResponse, Demand, DemandRequest,
    Empty, Event, ExitStatus, ProcessRequest, Stats,
};
use bulkhead_protocol::error::chain;
use bulkhead_shim::pod::error::TaskError;
use bulkhead_shim::pod::process::Exit;
use bulkhead_shim::sandbox::agent::AgentError;
use bulkhead_shim::stats;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

/// Far more than an answer of a connection that has ended takes.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a frame's header: length, stream, type, flags.
const FRAME: usize = 10;
/// Longest text of the guest's that gets into an error, in characters, and what the shim says around it.
const MAX_TEXT: usize = 1024 + 256;
/// Entries and bytes that numbers are cut to.
const MAX_METRICS: usize = 64 * 1024;

/// The target. The first byte chooses what the rest is: one message, or all that the agent ever sends.
pub fn agent_replies(data: &[u8]) {
    let (kind, bytes) = data.split_first().unwrap_or((&0, &[]));
    match kind % 11 {
        0 => Stats::parse_from_bytes(bytes).into_iter().for_each(pack),
        1 => ExitStatus::parse_from_bytes(bytes).iter().for_each(exit),
        2 => drop((Event::parse_from_bytes(bytes), Demand::parse_from_bytes(bytes))),
        3 => drop(CreateSandboxResponse::parse_from_bytes(bytes)),
        4 => drop(BlockDevice::parse_from_bytes(bytes)),
        5 => {
            if let Ok(status) = ttrpc::Status::parse_from_bytes(bytes) {
                refuse(ttrpc::Error::RpcStatus(status));
            }
        }
        method => connection(method, bytes),
    }
}

fn pack(stats: Stats) {
    let any = stats::pack(stats).expect("numbers of any kind can be encoded");
    assert!(any.value.len() <= MAX_METRICS, "{} bytes of numbers", any.value.len());
}

fn exit(status: &ExitStatus) {
    assert!(Exit::now(status.code).code <= 255);
}

/// An error of the guest's making, on its way to containerd and into the log.
fn refuse(error: ttrpc::Error) {
    let error = TaskError::from(AgentError::from(error));
    assert_ne!(error.code(), ttrpc::Code::UNIMPLEMENTED);
    let text = chain(&error);
    assert!(text.chars().count() <= MAX_TEXT && !text.contains('\n'), "an error of {} bytes", text.len());
}

/// One call, answered with these bytes and the end of the connection. It must end, and with it all that it began.
fn connection(method: u8, bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = AgentClient::new(Client::new(Socket::from(ours)));
        let call = tokio::time::timeout(PATIENCE, call(client, method));
        let (answered, ()) = tokio::join!(call, answer(theirs, bytes));
        answered.expect("a call goes on after the end of its connection");
    });
}

async fn call(client: AgentClient, method: u8) {
    let context = Context::default();
    let failed = match method {
        6 => client.get_stats(context, &ContainerRequest::new()).await.map(pack).err(),
        7 => client.wait_process(context, &ProcessRequest::new()).await.map(|status| exit(&status)).err(),
        8 => client.next_event(context, &Empty::new()).await.err(),
        10 => client.next_demand(context, &DemandRequest::new()).await.err(),
        _ => client.create_sandbox(context, &CreateSandboxRequest::new()).await.err(),
    };
    if let Some(error) = failed {
        refuse(error);
    }
}

/// The agent: waits for the request, so that its answer is not too early, and then sends everything.
async fn answer(mut stream: UnixStream, bytes: &[u8]) {
    let mut header = [0; FRAME];
    if stream.read_exact(&mut header).await.is_ok() {
        let _ = stream.write_all(bytes).await;
    }
}

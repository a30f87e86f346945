//! The agent's service and its lies, frame by frame: a lie may be about the frames themselves (ttrpc: PROTOCOL.md).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use bulkhead_protocol::RELEASE;
use bulkhead_protocol::agent as proto;
use protobuf::{Message, MessageField};
use ttrpc::Code;

use super::control;
use super::guest::{Guest, Key, forever};

/// Kinds of frames.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 3;
const UNKNOWN: u8 = 9;

/// A call of the shim's.
struct Call {
    stream: u32,
    method: String,
    payload: Vec<u8>,
    link: Arc<Mutex<UnixStream>>,
}

/// What follows upon a lie.
enum Next {
    /// The honest answer, so often.
    Honest(u32),
    /// Nothing.
    Silence,
    /// Another answer.
    Other(std::result::Result<Vec<u8>, ttrpc::Status>),
}

/// Serves one connection.
pub(super) fn serve(guest: &Arc<Guest>, mut connection: UnixStream) -> Result<()> {
    let link = Arc::new(Mutex::new(connection.try_clone()?));
    loop {
        let mut header = [0; 10];
        connection.read_exact(&mut header)?;
        let [l0, l1, l2, l3, s0, s1, s2, s3, ..] = header;
        let (length, stream) = (u32::from_be_bytes([l0, l1, l2, l3]), u32::from_be_bytes([s0, s1, s2, s3]));
        let mut body = vec![0; usize::try_from(length)?];
        connection.read_exact(&mut body)?;
        let request = ttrpc::Request::parse_from_bytes(&body)?;
        let call = Call { stream, method: request.method, payload: request.payload, link: link.clone() };
        let guest = guest.clone();
        std::thread::spawn(move || answer(&guest, &call));
    }
}

fn answer(guest: &Arc<Guest>, call: &Call) -> Result<()> {
    let mut next = Next::Honest(1);
    for lie in guest.lies(&call.method).map(str::to_owned).collect::<Vec<_>>() {
        if !lie.starts_with("vmm-") {
            next = tell(guest, call, &lie)?;
        }
    }
    // After the guest's own, so that the VMM's lies last as long as the pod.
    control::strike(guest, &call.method)?;
    match next {
        Next::Silence => Ok(()),
        Next::Other(answer) => call.send(RESPONSE, &encode(answer)?),
        Next::Honest(times) => {
            let answer = honest(guest, call)?;
            let response = encode(answer)?;
            (0..times).try_for_each(|_| call.send(RESPONSE, &response))
        }
    }
}

impl Call {
    fn send(&self, kind: u8, payload: &[u8]) -> Result<()> {
        self.send_to(self.stream, kind, payload)
    }

    fn send_to(&self, stream: u32, kind: u8, payload: &[u8]) -> Result<()> {
        self.raw(&[&header(payload.len(), stream, kind)?, payload].concat())
    }

    fn raw(&self, bytes: &[u8]) -> Result<()> {
        Ok(self.link.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes)?)
    }

    fn request<T: Message>(&self) -> Result<T> {
        Ok(T::parse_from_bytes(&self.payload)?)
    }
}

fn header(length: usize, stream: u32, kind: u8) -> Result<Vec<u8>> {
    let mut bytes = u32::try_from(length)?.to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    Ok(bytes)
}

fn encode(answer: std::result::Result<Vec<u8>, ttrpc::Status>) -> Result<Vec<u8>> {
    let mut response = ttrpc::Response::new();
    match answer {
        Ok(payload) => response.payload = payload,
        Err(status) => response.status = MessageField::some(status),
    }
    Ok(response.write_to_bytes()?)
}

fn refusal(code: i32, message: String) -> Next {
    let mut status = ttrpc::Status::new();
    status.code = protobuf::EnumOrUnknown::from_i32(code);
    status.message = message;
    Next::Other(Err(status))
}

/// Tells one lie.
fn tell(guest: &Guest, call: &Call, lie: &str) -> Result<Next> {
    let sentence = "\u{1b}[31m a lie\r\n\u{0}\u{202e}";
    match lie {
        "exit" => std::process::exit(1),
        "silent" => return Ok(Next::Silence),
        "close" => {
            let link = call.link.lock().unwrap_or_else(PoisonError::into_inner);
            link.shutdown(std::net::Shutdown::Both)?;
            return Ok(Next::Silence);
        }
        // Frames that are not as long as they say, or longer than anything that is ever said.
        "oversize" => call.send(RESPONSE, &vec![0; 5 << 20])?,
        "largest" => call.send(RESPONSE, &vec![0; 4 << 20])?,
        "endless" => {
            call.raw(&header(usize::try_from(u32::MAX)?, call.stream, RESPONSE)?)?;
            loop {
                call.raw(&[0x7b; 64 << 10])?;
            }
        }
        "truncated" => call.raw(&[header(60_000, call.stream, RESPONSE)?, vec![0; 100]].concat())?,
        "truncated-large" => call.raw(&[header(4 << 20, call.stream, RESPONSE)?, vec![0; 100]].concat())?,
        "half-header" => {
            let mut link = call.link.lock().unwrap_or_else(PoisonError::into_inner);
            link.write_all(&[0; 5])?;
            forever();
        }
        "garbage" => call.raw(&[0xa5; 64 << 10])?,
        "empty" => call.send(RESPONSE, &[])?,
        // Groups in groups: field 15, which no message has, begun again and again and never ended.
        "groups" => call.send(RESPONSE, &[0x7b; 30_000])?,
        "inner-groups" => return Ok(Next::Other(Ok(vec![0x7b; 30_000]))),
        "closed-groups" => return Ok(Next::Other(Ok([[0x7b; 15_000], [0x7c; 15_000]].concat()))),
        "nonsense" => return Ok(Next::Other(Ok(vec![0xff; 1000]))),
        // Unknown fields, each with a number of its own, which a parser keeps.
        "fields" => return Ok(Next::Other(Ok(unknown_fields(7_500)))),
        // Answers to somebody else, to nobody, and again.
        "strangers" => {
            for stream in [call.stream + 2, call.stream + 1, 0, u32::MAX].into_iter().chain(1_000_001..1_020_000) {
                call.send_to(stream, RESPONSE, &[0x12, 0])?;
            }
            return Ok(Next::Honest(1));
        }
        "twice" => return Ok(Next::Honest(1000)),
        "data" => {
            for _ in 0..2000 {
                call.send(DATA, &[0x12; 4000])?;
            }
            return Ok(Next::Honest(1));
        }
        "kind" => call.send(UNKNOWN, &[])?,
        "request" => call.send(REQUEST, &[])?,
        // Refusals.
        "says-much" => return Ok(refusal(2, sentence.repeat(200_000))),
        "says-control" => return Ok(refusal(2, sentence.repeat(500))),
        "says-unimplemented" => return Ok(refusal(12, sentence.to_owned())),
        "says-ok" => return Ok(refusal(0, sentence.to_owned())),
        "says-nothing-known" => return Ok(refusal(-77, sentence.to_owned())),
        "says-not-found" => return Ok(refusal(5, sentence.to_owned())),
        // Numbers.
        "entries" => return Ok(Next::Other(Ok([0x2a, 0].repeat(1_000_000)))),
        "some-entries" => return Ok(Next::Other(Ok([0x2a, 0].repeat(15_000)))),
        "numbers" => return Ok(Next::Other(Ok(numbers()?))),
        "other-release" => return Ok(Next::Other(Ok(created("\u{1b}[2J0.0.1")?))),
        "code" => {
            let status = proto::ExitStatus { code: u32::MAX, ..Default::default() };
            return Ok(Next::Other(Ok(status.write_to_bytes()?)));
        }
        // Demands, as fast as they are taken.
        "more" => return Ok(Next::Other(Ok(Vec::new()))),
        "less" => return Ok(Next::Other(Ok(vec![8, 1]))),
        // Events, as fast as they are taken.
        "oom-of-nobody" => return Ok(Next::Other(Ok(oom("../nobody\u{1b}".to_owned())?))),
        "oom-of-many" => return Ok(Next::Other(Ok(oom("x".repeat(20_000))?))),
        "oom" => {
            let known = guest.processes().keys().next().map(|(container, _)| container.clone());
            return Ok(Next::Other(Ok(oom(known.unwrap_or_default())?)));
        }
        slow => {
            if let Some(seconds) = slow.strip_prefix("slow-") {
                std::thread::sleep(std::time::Duration::from_secs(seconds.parse()?));
                return Ok(Next::Honest(1));
            }
            eprintln!("there is no lie {slow:?}");
            std::process::exit(2);
        }
    }
    Ok(Next::Silence)
}

fn created(release: &str) -> Result<Vec<u8>> {
    let answer = proto::CreateSandboxResponse { release: release.to_owned(), ..Default::default() };
    Ok(answer.write_to_bytes()?)
}

fn oom(container_id: String) -> Result<Vec<u8>> {
    let mut event = proto::Event::new();
    event.set_oom(proto::OomEvent { container_id, ..Default::default() });
    Ok(event.write_to_bytes()?)
}

fn unknown_fields(count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in 1000..1000 + count {
        let mut tag = field << 3;
        while tag > 0x7f {
            bytes.push(u8::try_from(tag & 0x7f | 0x80).unwrap_or_default());
            tag >>= 7;
        }
        bytes.extend([u8::try_from(tag).unwrap_or_default(), 1]);
    }
    bytes
}

fn numbers() -> Result<Vec<u8>> {
    const ODD: u64 = u64::MAX;
    let name = "\u{1b}[2J".repeat(1000);
    let keys = ["inactive_file", "workingset_refault_anon", "workingset_refault_file", "anon", "\u{0}"];
    let mut stats = proto::Stats::new();
    stats.memory = MessageField::some(proto::MemoryStats {
        usage: ODD,
        limit: 1,
        stat: keys.into_iter().map(|key| (key.to_owned(), ODD)).collect(),
        oom_kill: ODD,
        ..Default::default()
    });
    stats.cpu = MessageField::some(proto::CpuStats { usage_usec: ODD, nr_periods: ODD, ..Default::default() });
    stats.network = vec![proto::InterfaceStats { name: name.clone(), rx_bytes: ODD, ..Default::default() }];
    stats.huge_tlb = vec![proto::HugeTlbStats { page_size: name, current: ODD, ..Default::default() }];
    stats.io = vec![proto::IoStats { major: ODD, rbytes: ODD, ..Default::default() }; 200];
    Ok(stats.write_to_bytes()?)
}

/// What an agent answers.
fn honest(guest: &Guest, call: &Call) -> Result<std::result::Result<Vec<u8>, ttrpc::Status>> {
    let not_found = || Ok(Err(ttrpc::get_status(Code::NOT_FOUND, "there is no such process".to_owned())));
    match call.method.as_str() {
        "CreateSandbox" => return Ok(Ok(created(RELEASE)?)),
        "CreateContainer" => {
            let request: proto::CreateContainerRequest = call.request()?;
            guest.processes().insert((request.container_id, String::new()), None);
        }
        "Exec" => {
            // Ends as soon as it has begun.
            let request: proto::ExecRequest = call.request()?;
            guest.processes().insert((request.container_id, request.exec_id), Some(0));
        }
        "WaitProcess" => {
            let request: proto::ProcessRequest = call.request()?;
            let Some(code) = guest.wait(&(request.container_id, request.exec_id)) else { return not_found() };
            return Ok(Ok(proto::ExitStatus { code, ..Default::default() }.write_to_bytes()?));
        }
        "SignalProcess" => {
            let request: proto::SignalRequest = call.request()?;
            let key: Key = (request.container_id, request.exec_id);
            match guest.processes().get_mut(&key) {
                Some(code @ None) => *code = Some(128 + request.signal),
                _ => return not_found(),
            }
            guest.changed.notify_all();
        }
        "DeleteContainer" => {
            let request: proto::ContainerRequest = call.request()?;
            guest.processes().retain(|(container, _), _| *container != request.container_id);
            guest.changed.notify_all();
        }
        "DestroySandbox" => std::process::exit(0),
        // There is none.
        "NextEvent" | "NextDemand" => forever(),
        _ => {}
    }
    // What is not set is as good as empty.
    Ok(Ok(Vec::new()))
}

//! The service over a real socket, without a VM: names, codes and what a bad setup gets.

use super::*;
use crate::endpoint::Endpoint;
use crate::events::Publisher;
use crate::host_pid::Keeper;
use crate::paths::RunDir;
use crate::pod::PodIdentity;
use containerd_shim_protos::api::{ConnectRequest, CreateTaskRequest, ShutdownRequest, StateRequest};
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use ttrpc::Code;
use ttrpc::context::Context;

struct Served {
    pod: Arc<Pod>,
    client: Client,
    dir: tempfile::TempDir,
    _server: ttrpc::asynchronous::Server,
}

async fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let (publisher, _) = Publisher::start("k8s.io".into(), None);
    let run_dir = RunDir::new(&dir.path().join("run"), "k8s.io", "s");
    let endpoint = Arc::new(Endpoint::new(dir.path().join("sock")));
    let identity = PodIdentity { sandbox_id: "s".into(), run_dir, endpoint };
    let pod = Arc::new(Pod::new(identity, publisher, Keeper::start().unwrap()));
    let address = format!("unix://{}", dir.path().join("sock").display());
    let server = ttrpc::asynchronous::Server::new().bind(&address).unwrap();
    let mut server = server.register_service(services(pod.clone()));
    server.start().await.unwrap();
    let client = Client::connect(&address).await.unwrap();
    Served { pod, client, dir, _server: server }
}

fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message.clone()),
        other => panic!("{other}"),
    }
}

async fn create(served: &Served, config: serde_json::Value) -> (Code, String) {
    std::fs::write(served.dir.path().join("config.json"), config.to_string()).unwrap();
    let bundle = served.dir.path().display().to_string();
    let request = CreateTaskRequest { id: "s".into(), bundle, ..CreateTaskRequest::default() };
    let answer = TaskClient::new(served.client.clone()).create(Context::default(), &request).await;
    code(answer.unwrap_err())
}

#[tokio::test]
async fn both_versions_are_answered() {
    let served = serve().await;
    for service in [TASK_V2, TASK_V3] {
        let mut request = ttrpc::Request::new();
        request.service = service.to_owned();
        request.method = "Connect".to_owned();
        request.payload = protobuf::Message::write_to_bytes(&ConnectRequest::new()).unwrap();
        // The method is known; the pod is not there yet.
        assert_eq!(code(served.client.request(request).await.unwrap_err()).0, Code::NOT_FOUND, "{service}");
    }
}

#[tokio::test]
async fn unknown_container_is_not_found_even_by_calls_that_are_not_implemented() {
    let served = serve().await;
    let tasks = TaskClient::new(served.client.clone());
    let state = StateRequest { id: "none".into(), ..StateRequest::default() };
    assert_eq!(code(tasks.state(Context::default(), &state).await.unwrap_err()).0, Code::NOT_FOUND);
    let checkpoint = tasks.checkpoint(Context::default(), &Default::default()).await;
    assert_eq!(code(checkpoint.unwrap_err()).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn shutdown_ends_an_empty_pod() {
    let served = serve().await;
    TaskClient::new(served.client.clone()).shutdown(Context::default(), &ShutdownRequest::new()).await.unwrap();
    served.pod.finished().await;
}

#[tokio::test]
async fn bad_setup_gets_one_sentence_and_leaves_nothing() {
    let served = serve().await;
    let sandbox = |namespaces: serde_json::Value, annotation: (&str, &str)| {
        serde_json::json!({
            "ociVersion": "1.0.2",
            "annotations": {"io.kubernetes.cri.container-type": "sandbox", annotation.0: annotation.1},
            "linux": {"namespaces": namespaces}
        })
    };
    let both = serde_json::json!([{"type": "network"}, {"type": "ipc"}, {"type": "pid"}]);
    let host_network = create(&served, sandbox(serde_json::json!([{"type": "ipc"}]), ("a", "b"))).await;
    assert!(host_network.1.starts_with("hostNetwork is not possible"), "{host_network:?}");
    let host_ipc = create(&served, sandbox(serde_json::json!([{"type": "network"}]), ("a", "b"))).await;
    assert!(host_ipc.1.starts_with("hostIPC is not possible"), "{host_ipc:?}");
    let without_pid = serde_json::json!([{"type": "network"}, {"type": "ipc"}]);
    let host_pid = create(&served, sandbox(without_pid, ("a", "b"))).await;
    assert!(host_pid.1.starts_with("hostPID is not possible"), "{host_pid:?}");
    let malformed = create(&served, sandbox(both.clone(), ("io.kubernetes.cri.sandbox-memory", "lots"))).await;
    assert!(malformed.1.contains("sandbox-memory") && malformed.1.contains("malformed"), "{malformed:?}");
    let member = serde_json::json!({
        "ociVersion": "1.0.2",
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s"}
    });
    assert_eq!(create(&served, member).await.0, Code::FAILED_PRECONDITION);
    assert!(!served.dir.path().join("run").exists());
}

/// Ids become names of directories, in either API.
#[tokio::test]
async fn id_that_is_no_identifier_is_refused() {
    let served = serve().await;
    for id in ["", ".", "../escape", "a/b", "a..b", &"x".repeat(77)] {
        for service in [TASK_V2, TASK_V3] {
            let create = CreateTaskRequest { id: id.to_owned(), bundle: "/nonexistent".into(), ..Default::default() };
            let mut request = ttrpc::Request::new();
            request.service = service.to_owned();
            request.method = "Create".to_owned();
            request.payload = protobuf::Message::write_to_bytes(&create).unwrap();
            let (code, message) = code(served.client.request(request).await.unwrap_err());
            assert_eq!(code, Code::INVALID_ARGUMENT, "{service}, {id:?}: {message}");
        }
        let create = CreateSandboxRequest { sandbox_id: id.to_owned(), ..CreateSandboxRequest::default() };
        let sandboxes = SandboxClient::new(served.client.clone());
        let (code, message) = code(sandboxes.create_sandbox(Context::default(), &create).await.unwrap_err());
        assert_eq!(code, Code::INVALID_ARGUMENT, "{id:?}: {message}");
    }
    // The same checks let a good id pass, to fail for its bundle.
    assert_eq!(create(&served, serde_json::json!({"ociVersion": 1})).await.0, Code::UNKNOWN);
}

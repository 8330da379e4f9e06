//! Calls that answer once: credential, failover, retries, deadlines.

use crate::fake::{Answer, Scripted, TOKEN, client, limits, nowhere, silent};
use std::time::{Duration, Instant};
use tonic::Code;
use vlinder_client::{Client, Error, Limits};
use vlinder_config::{ClientConfig, Env, NodeAddresses, Service};
use vlinder_proto::secret::{DeleteRequest, GetRequest};

fn get() -> GetRequest {
    GetRequest::default()
}

#[tokio::test]
async fn every_call_carries_credential_and_namespace() {
    let service = Scripted::default();
    let (url, _task) = service.serve().await;
    let client = client(Service::Secret, &[&url]);
    let answer = client.get_secret(get()).await.unwrap();
    assert_eq!(answer.value, b"default");
    assert_eq!(service.seen(), [format!("get Bearer {TOKEN}")]);
}

#[tokio::test]
async fn where_nothing_listens_the_error_comes_at_once_and_says_what_to_do() {
    let url = nowhere().await;
    let began = Instant::now();
    let error = client(Service::Secret, &[&url])
        .get_secret(get())
        .await
        .unwrap_err();
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "waited for a daemon to appear"
    );
    assert_eq!(error.exit_code(), 3);
    let text = error.to_string();
    assert!(
        text.contains(&url) && text.contains("is vlinderd running?"),
        "{text}"
    );
}

#[tokio::test]
async fn a_dead_and_a_silent_address_are_passed_over() {
    let service = Scripted::default();
    let (live, _task) = service.serve().await;
    let dead = nowhere().await;
    let (mute, _listener) = silent().await;
    let client = client(Service::Secret, &[&dead, &mute, &live]);
    client.get_secret(get()).await.unwrap();
    // The second call knows where to go.
    let began = Instant::now();
    client.get_secret(get()).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "asked the silent one first again"
    );
    assert_eq!(service.seen().len(), 2);
}

#[tokio::test]
async fn a_write_that_must_not_be_repeated_still_passes_over_the_dead() {
    let service = Scripted::default();
    let (live, _task) = service.serve().await;
    let dead = nowhere().await;
    let client = client(Service::Secret, &[&dead, &live]);
    client
        .delete_secret(DeleteRequest::default())
        .await
        .unwrap();
    assert_eq!(service.seen().len(), 1);
}

#[tokio::test]
async fn reads_are_tried_again_and_deletes_are_not() {
    let away = || Answer::Refuse(Code::Unavailable);
    let service = Scripted::new([away(), away(), Answer::Ok, away()]);
    let (url, _task) = service.serve().await;
    let client = client(Service::Secret, &[&url]);
    client.get_secret(get()).await.unwrap();
    assert_eq!(service.seen().len(), 3);
    let error = client
        .delete_secret(DeleteRequest::default())
        .await
        .unwrap_err();
    assert_eq!((error.exit_code(), service.seen().len()), (3, 4));
}

#[tokio::test]
async fn a_refusal_is_final() {
    for (code, exit) in [
        (Code::NotFound, 5),
        (Code::Unauthenticated, 8),
        (Code::Aborted, 9),
        (Code::InvalidArgument, 2),
        (Code::Internal, 1),
    ] {
        let service = Scripted::new([Answer::Refuse(code)]);
        let (url, _task) = service.serve().await;
        let error = client(Service::Secret, &[&url])
            .get_secret(get())
            .await
            .unwrap_err();
        assert_eq!(
            (error.exit_code(), service.seen().len()),
            (exit, 1),
            "{code:?}"
        );
        assert_eq!(error.to_string(), "as scripted");
    }
}

#[tokio::test]
async fn a_service_that_hangs_is_given_up() {
    let service = Scripted::new([Answer::Hang, Answer::Hang, Answer::Hang, Answer::Hang]);
    let (url, _task) = service.serve().await;
    let short = Limits {
        call: Duration::from_millis(200),
        retry: Duration::from_millis(300),
        ..limits()
    };
    let client = client(Service::Secret, &[&url]).with_limits(short);
    let began = Instant::now();
    let error = client.get_secret(get()).await.unwrap_err();
    assert!(matches!(error, Error::NoAnswer { .. }), "{error:?}");
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(error.exit_code(), 3);
}

#[tokio::test]
async fn bad_addresses_and_tokens_are_usage() {
    let client = client(Service::Secret, &["https://hub:9093"]);
    assert_eq!(client.get_secret(get()).await.unwrap_err().exit_code(), 2);
    let none = client.list_nodes(Default::default()).await.unwrap_err();
    assert_eq!(none.exit_code(), 2, "{none}");
    let urls = [(Service::Secret, vec![])];
    assert!(vlinder_client::Client::of(urls, Some("a\nb"), "default").is_err());
}

/// What a node writes at its start: all services at one address, and the credential.
fn started(env: &Env, data_dir: &std::path::Path, url: &str, token: &str) -> ClientConfig {
    let mut addresses = NodeAddresses::default();
    for service in Service::ALL {
        addresses.set(service, url.parse().unwrap());
    }
    addresses.write(data_dir).unwrap();
    std::fs::write(data_dir.join("run/token"), token).unwrap();
    ClientConfig::load(env, None).unwrap()
}

#[tokio::test]
async fn a_node_that_came_back_elsewhere_is_found() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join(".vlinder");
    std::fs::create_dir_all(data_dir.join("run")).unwrap();
    let env = Env::bare(home.path(), "here");
    let service = Scripted::default();
    // A runtime of its own, that takes its open connections along when it goes.
    let node = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let serving = service.clone();
    let (url, _) = node
        .spawn(async move { serving.serve().await })
        .await
        .unwrap();
    let config = started(&env, &data_dir, &url, TOKEN);
    let looks = env.clone();
    let client = Client::new(&config).unwrap().with_limits(limits());
    let client = client.looked_up_by(move || ClientConfig::load(&looks, None).ok());
    client.get_secret(get()).await.unwrap();

    // Gone: it is an error at once, as without looking it up.
    node.shutdown_background();
    let error = client.get_secret(get()).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");

    // Back on another port and with another credential, for all that share the connection.
    let (url, _task) = service.serve().await;
    started(&env, &data_dir, &url, "fedcba9876543210");
    let other = client.clone();
    client.get_secret(get()).await.unwrap();
    other.delete_secret(DeleteRequest::default()).await.unwrap();
    let seen = service.seen();
    let last: Vec<&str> = seen.iter().rev().take(2).map(String::as_str).collect();
    assert_eq!(
        last,
        [
            "delete Bearer fedcba9876543210",
            "get Bearer fedcba9876543210"
        ]
    );
}

#[tokio::test]
async fn a_credential_that_was_made_anew_is_read_again() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join(".vlinder");
    std::fs::create_dir_all(data_dir.join("run")).unwrap();
    let env = Env::bare(home.path(), "here");
    let service = Scripted::new([Answer::Refuse(Code::Unauthenticated)]);
    let (url, _task) = service.serve().await;
    let config = started(&env, &data_dir, &url, TOKEN);
    let looks = env.clone();
    let client = Client::new(&config).unwrap().with_limits(limits());
    let client = client.looked_up_by(move || ClientConfig::load(&looks, None).ok());
    started(&env, &data_dir, &url, "fedcba9876543210");
    client
        .delete_secret(DeleteRequest::default())
        .await
        .unwrap();
    let expected = [TOKEN, "fedcba9876543210"].map(|token| format!("delete Bearer {token}"));
    assert_eq!(service.seen(), expected);

    // Where it is the same, a refusal is a refusal.
    let service = Scripted::new([Answer::Refuse(Code::Unauthenticated)]);
    let (url, _task) = service.serve().await;
    let looks = env.clone();
    let client = Client::new(&started(&env, &data_dir, &url, TOKEN)).unwrap();
    let client = client.looked_up_by(move || ClientConfig::load(&looks, None).ok());
    let error = client.get_secret(get()).await.unwrap_err();
    assert_eq!(error.exit_code(), 8, "{error}");
    assert_eq!(service.seen().len(), 1);
}

//! Against a real server: what is stored comes back, and every failure says whose it is.

use futures::TryStreamExt;
use std::time::{Duration, Instant};
use vlinder_objects::{Access, Bucket, ErrorKind};
use vlinder_testkit::AwsServer;

fn access(server: &AwsServer) -> Access {
    Access::of([
        ("AWS_ENDPOINT_URL", server.url()),
        ("AWS_ACCESS_KEY_ID", "somebody".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "s3cret-s3cret".to_owned()),
    ])
}

#[tokio::test]
async fn objects_come_back_and_failures_are_told_apart() {
    let mut server = AwsServer::start().await;
    server.make_bucket("here").await;
    let bucket = Bucket::open(&access(&server), "here", "some/prefix").unwrap();
    assert_eq!(bucket.get("a/b", 100).await.unwrap(), None);
    assert!(!bucket.has("a/b").await.unwrap());
    bucket.put("a/b", "content".into()).await.unwrap();
    assert!(bucket.has("a/b").await.unwrap());
    assert_eq!(bucket.get("a/b", 7).await.unwrap().unwrap(), "content");
    let error = bucket.get("a/b", 6).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unusable, "{error}");
    let found: Vec<_> = bucket.list().try_collect().await.unwrap();
    assert_eq!(
        (found.len(), found[0].name.as_str(), found[0].len),
        (1, "a/b", 7)
    );
    let whole = Bucket::open(&access(&server), "here", "").unwrap();
    let found: Vec<_> = whole.list().try_collect().await.unwrap();
    assert_eq!(found[0].name, "some/prefix/a/b");

    let absent = Bucket::open(&access(&server), "absent", "x").unwrap();
    let put = absent.put("a", "b".into()).await.unwrap_err();
    let get = absent.get("a", 1).await.unwrap_err();
    let listed = absent.list().try_collect::<Vec<_>>().await.unwrap_err();
    for error in [put, get, listed] {
        assert_eq!(error.kind(), ErrorKind::NoBucket, "{error}");
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("s3://absent/x at {}", server.url())),
            "{text}"
        );
    }

    server.kill().await;
    let began = Instant::now();
    let error = bucket.put("a/b", "content".into()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Away, "{error}");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_wrong_credential_is_named_and_not_shown() {
    let server = AwsServer::start_strict(1).await;
    server.make_bucket("here").await;
    let bucket = Bucket::open(&access(&server), "here", "").unwrap();
    let error = bucket.put("a", "b".into()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    let text = format!("{error} {error:?}");
    assert!(text.contains("InvalidAccessKeyId"), "{text}");
    assert!(!text.contains("s3cret"), "{text}");
}

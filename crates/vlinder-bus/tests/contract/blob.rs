//! Blobs: bytes by their hash, equal or not at all.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use vlinder_bus::Error;
use vlinder_core::ContentHash;

const LEN_MAX: u64 = 64 * 1024 * 1024;

/// Bytes that do not repeat, so that mixed-up chunks show.
fn bytes(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect::<Vec<u8>>().into()
}

fn name(bytes: &Bytes) -> String {
    ContentHash::of(bytes).to_string()
}

pub async fn blobs_come_back_equal<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    let lengths = [0, 1, 65_537, 524_288, 524_289, 1_048_576, 20 * 1024 * 1024];
    for (seed, len) in lengths.into_iter().enumerate() {
        let bytes = bytes(len, seed as u64 + 1);
        let name = name(&bytes);
        assert!(
            matches!(
                other.blob_get(&name, LEN_MAX).await,
                Err(Error::Missing { .. })
            ),
            "{len}"
        );
        retried(async || backend.blob_put(&name, bytes.clone()).await).await;
        let back = retried(async || other.blob_get(&name, LEN_MAX).await).await;
        assert!(back == bytes, "{len} bytes came back changed");
    }
}

pub async fn putting_twice_at_once_is_fine<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    for seed in 10..15 {
        let bytes = bytes(3_000_000, seed);
        let name = name(&bytes);
        let (a, b, c) = tokio::join!(
            backend.blob_put(&name, bytes.clone()),
            other.blob_put(&name, bytes.clone()),
            other.blob_put(&name, bytes.clone()),
        );
        a.and(b).and(c).unwrap();
        backend.blob_put(&name, bytes.clone()).await.unwrap();
        assert!(other.blob_get(&name, LEN_MAX).await.unwrap() == bytes);
    }
}

pub async fn bad_blobs_are_refused<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let small = bytes(10, 1);
    for wrong in [
        "",
        "abc",
        "../../etc/passwd",
        "*",
        ">",
        &"G".repeat(64),
        &"a".repeat(64),
    ] {
        assert!(
            backend.blob_put(wrong, small.clone()).await.is_err(),
            "{wrong}"
        );
        assert!(backend.blob_get(wrong, LEN_MAX).await.is_err(), "{wrong}");
    }
    let large = Bytes::from(vec![1; LEN_MAX as usize + 1]);
    let error = backend
        .blob_put(&name(&large), large.clone())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    // A reader takes no more than it can hold.
    let bytes = bytes(2_000_000, 2);
    backend
        .blob_put(&name(&bytes), bytes.clone())
        .await
        .unwrap();
    let error = backend
        .blob_get(&name(&bytes), 1_999_999)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert!(backend.blob_get(&name(&bytes), 2_000_000).await.unwrap() == bytes);
}

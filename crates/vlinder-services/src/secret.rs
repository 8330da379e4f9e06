//! The secret service. Values are sealed with XChaCha20-Poly1305 (RFC 8439, extended nonce) under a key that
//! never leaves the node's key file; the log holds ciphertext only, bound to namespace and name.

use crate::status;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use rand::RngCore;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tonic::{Request, Response, Status};
use vlinder_core::Namespace;
use vlinder_core::manifest::{SECRET_NAME_RULE, is_secret_name};
use vlinder_proto::secret::secret_server::Secret;
use vlinder_proto::secret::{
    DeleteRequest, DeleteResponse, GetRequest, GetResponse, ListRequest, ListResponse, PutRequest,
    PutResponse, SecretInfo,
};
use vlinder_worker::infra::{InfraView, SECRET};

/// Largest value, in bytes.
pub const VALUE_BYTES_MAX: usize = 64 * 1024;
const NONCE_BYTES: usize = 24;
const KEY_BYTES: usize = 32;

/// The key that seals secrets.
pub struct MasterKey([u8; KEY_BYTES]);

impl MasterKey {
    /// Reads the key file (64 hexadecimal digits), or makes one, readable by its owner only.
    pub fn from_file(path: &Path) -> std::io::Result<Self> {
        let bad = |reason: &str| std::io::Error::other(format!("{}: {reason}", path.display()));
        match std::fs::read_to_string(path) {
            Ok(text) => {
                decode_key(text.trim()).ok_or_else(|| bad("expected 64 hexadecimal digits"))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let mut key = [0; KEY_BYTES];
                rand::rng().fill_bytes(&mut key);
                let text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
                // Two workers may start at once: whoever links first wins, the other reads.
                let dir = path.parent().ok_or_else(|| bad("has no directory"))?;
                let temp = dir.join(format!(
                    ".secret.key.{}.{}",
                    std::process::id(),
                    rand::rng().next_u64()
                ));
                let mut file = std::fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&temp)?;
                file.write_all(text.as_bytes())?;
                file.sync_all()?;
                let linked = std::fs::hard_link(&temp, path);
                std::fs::remove_file(&temp)?;
                match linked {
                    Ok(()) => Ok(Self(key)),
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                        Self::from_file(path)
                    }
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    fn seal(&self, context: &str, value: &[u8]) -> Option<String> {
        let mut nonce = [0; NONCE_BYTES];
        rand::rng().fill_bytes(&mut nonce);
        let cipher = XChaCha20Poly1305::new((&self.0).into());
        let payload = Payload {
            msg: value,
            aad: context.as_bytes(),
        };
        let sealed = cipher.encrypt(XNonce::from_slice(&nonce), payload).ok()?;
        Some(BASE64.encode([&nonce[..], &sealed].concat()))
    }

    fn open(&self, context: &str, sealed: &str) -> Option<Vec<u8>> {
        let bytes = BASE64.decode(sealed).ok()?;
        let (nonce, body) = bytes.split_at_checked(NONCE_BYTES)?;
        let cipher = XChaCha20Poly1305::new((&self.0).into());
        cipher
            .decrypt(
                XNonce::from_slice(nonce),
                Payload {
                    msg: body,
                    aad: context.as_bytes(),
                },
            )
            .ok()
    }
}

fn decode_key(text: &str) -> Option<MasterKey> {
    if text.len() != KEY_BYTES * 2 || !text.is_ascii() {
        return None;
    }
    let mut key = [0; KEY_BYTES];
    for (index, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).ok()?;
    }
    Some(MasterKey(key))
}

/// The service.
pub struct SecretService {
    infra: InfraView,
    key: MasterKey,
}

impl SecretService {
    /// A service over the log, with the key that opens it.
    pub fn new(infra: InfraView, key: MasterKey) -> Self {
        Self { infra, key }
    }
}

fn name_of(text: &str) -> Result<&str, Status> {
    if !is_secret_name(text) {
        return Err(Status::invalid_argument(format!(
            "name: expected {SECRET_NAME_RULE}"
        )));
    }
    Ok(text)
}

fn context_of(ns: &Namespace, name: &str) -> String {
    format!("vlinder.secret.v1/{ns}/{name}")
}

#[tonic::async_trait]
impl Secret for SecretService {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let request = request.into_inner();
        let ns = status::namespace(&request.namespace)?;
        let name = name_of(&request.name)?;
        if request.value.is_empty() || request.value.len() > VALUE_BYTES_MAX {
            return Err(Status::invalid_argument("value: expected 1 byte to 64 KiB"));
        }
        let sealed = self.key.seal(&context_of(&ns, name), &request.value);
        let sealed = sealed.ok_or_else(|| Status::internal("the value could not be sealed"))?;
        self.infra.fresh().await.map_err(status::of_worker)?;
        let value = serde_json::json!({ "sealed": sealed });
        let version = self
            .infra
            .append(SECRET, name, Some(&value))
            .await
            .map_err(status::of_bus)?;
        Ok(Response::new(PutResponse { version }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let request = request.into_inner();
        let ns = status::namespace(&request.namespace)?;
        let name = name_of(&request.name)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let missing = || Status::not_found(format!("secret {name} does not exist"));
        let entry = infra.entry(SECRET, name).ok_or_else(missing)?;
        let value = entry.value.as_ref().ok_or_else(missing)?;
        let sealed = value["sealed"].as_str().unwrap_or_default();
        let opened = self.key.open(&context_of(&ns, name), sealed);
        let value = opened.ok_or_else(|| {
            Status::failed_precondition(format!(
                "secret {name} was sealed under another key than this node's secret.key"
            ))
        })?;
        Ok(Response::new(GetResponse {
            value,
            version: entry.seq,
        }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        status::namespace(&request.into_inner().namespace)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let secrets = infra
            .all(SECRET)
            .map(|(name, entry)| SecretInfo {
                name: name.to_owned(),
                version: entry.seq,
                updated_at: entry.time_ms,
            })
            .collect();
        Ok(Response::new(ListResponse { secrets }))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let name = name_of(&request.name)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        if infra
            .entry(SECRET, name)
            .is_none_or(|entry| entry.value.is_none())
        {
            return Err(Status::not_found(format!("secret {name} does not exist")));
        }
        self.infra
            .append(SECRET, name, None)
            .await
            .map_err(status::of_bus)?;
        Ok(Response::new(DeleteResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_values_open_only_in_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret.key");
        let key = MasterKey::from_file(&path).unwrap();
        let again = MasterKey::from_file(&path).unwrap();
        let sealed = key.seal("a", b"hush").unwrap();
        assert!(!sealed.contains("hush"));
        assert_eq!(again.open("a", &sealed).as_deref(), Some(&b"hush"[..]));
        assert_eq!(again.open("b", &sealed), None);
        assert_eq!(again.open("a", "AAAA"), None);
        std::fs::write(&path, "short").unwrap();
        assert!(MasterKey::from_file(&path).is_err());
    }
}

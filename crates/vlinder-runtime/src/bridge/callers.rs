//! Who calls: instances by their secret, and which of their invocations are open.

use crate::launcher::Deployment;
use crate::turn::invocation::Invocation;
use rand::TryRngCore;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use vlinder_core::ContentHash;

/// Length of a secret in bytes: 128 random bits, written as 32 hexadecimal digits.
const SECRET_BYTES: usize = 16;

/// An instance that may call the bridge.
pub(crate) struct Caller {
    pub deployment: Arc<Deployment>,
    open: Mutex<HashMap<String, Arc<Invocation>>>,
}

/// Why a call belongs to no invocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoInvocation {
    /// None is open, or not the one that it names.
    NotOpen,
    /// Several may be open and it names none.
    Unnamed,
}

impl Caller {
    /// Opens an invocation until the guard is dropped.
    pub fn open(self: &Arc<Self>, invocation: Arc<Invocation>) -> OpenInvocation {
        let id = invocation.id.clone();
        self.lock().insert(id.clone(), invocation);
        OpenInvocation {
            caller: self.clone(),
            id,
        }
    }

    /// The invocation that a call belongs to. An agent with more than one at once must name it.
    pub fn find(&self, named: Option<&str>) -> Result<Arc<Invocation>, NoInvocation> {
        let open = self.lock();
        let found = match named {
            Some(id) => open.get(id),
            None if self.deployment.manifest().concurrency > 1 => {
                return Err(NoInvocation::Unnamed);
            }
            None => open.values().next(),
        };
        found.cloned().ok_or(NoInvocation::NotOpen)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Invocation>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An invocation that is open until this is dropped.
pub(crate) struct OpenInvocation {
    caller: Arc<Caller>,
    id: String,
}

impl Drop for OpenInvocation {
    fn drop(&mut self) {
        self.caller.lock().remove(&self.id);
    }
}

/// Every instance of this worker, by the hash of its secret: whoever guesses learns nothing from how
/// long the search for his guess takes.
#[derive(Clone, Default)]
pub(crate) struct Callers(Arc<Mutex<HashMap<ContentHash, Arc<Caller>>>>);

impl Callers {
    /// Makes an instance known under a fresh secret, until the guard is dropped.
    pub fn admit(&self, deployment: Arc<Deployment>) -> std::io::Result<Admitted> {
        let mut bytes = [0; SECRET_BYTES];
        rand::rngs::OsRng
            .try_fill_bytes(&mut bytes)
            .map_err(std::io::Error::other)?;
        let secret = hex::encode(bytes);
        let id = ContentHash::of(secret.as_bytes());
        let caller = Arc::new(Caller {
            deployment,
            open: Mutex::default(),
        });
        self.lock().insert(id, caller.clone());
        Ok(Admitted {
            callers: self.clone(),
            id,
            secret,
            caller,
        })
    }

    /// Whose secret this is.
    pub fn by_secret(&self, secret: &str) -> Option<Arc<Caller>> {
        self.lock()
            .get(&ContentHash::of(secret.as_bytes()))
            .cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ContentHash, Arc<Caller>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An instance that the bridge knows until this is dropped.
pub(crate) struct Admitted {
    callers: Callers,
    id: ContentHash,
    /// What the instance shows.
    pub secret: String,
    pub caller: Arc<Caller>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.callers.lock().remove(&self.id);
    }
}

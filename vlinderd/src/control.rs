//! The supervisor's control handle as the workers see it.

use std::collections::BTreeMap;
use std::sync::Arc;
use vlinder_supervisor::control::ControlHandle;
use vlinder_worker::Control;

/// A worker's line to its supervisor.
pub struct Line {
    handle: ControlHandle,
    addresses: BTreeMap<String, String>,
}

impl Line {
    /// A line; `addresses` are told with readiness.
    pub fn new(handle: ControlHandle, addresses: BTreeMap<String, String>) -> Arc<Self> {
        Arc::new(Self { handle, addresses })
    }
}

impl Control for Line {
    fn ready(&self) {
        self.handle.ready(self.addresses.clone());
    }

    fn waiting(&self, reason: &str) {
        self.handle.waiting(reason);
    }

    fn held(&self, held: &str) {
        self.handle.held([held]);
    }

    fn released(&self, held: &str) {
        self.handle.released(held);
    }

    fn note(&self, key: &str, value: &str) {
        self.handle.note(key, value);
    }
}

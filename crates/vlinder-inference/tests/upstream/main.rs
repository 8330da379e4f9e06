//! The workers against a real model behind both wire formats, over the embedded bus.

mod answers;
mod bed;
mod ends;
mod faults;
mod front;
mod model;
mod presence;

use bed::{Ask, Bed};
use std::time::Duration;
use vlinder_inference::{Backend, Options, Url};

/// The name under which the model is served.
pub const MODEL: &str = "smollm2:135m";

pub fn options(backend: Backend, url: &str) -> Options {
    let url: Url = url.parse().unwrap();
    Options {
        retry_floor: Duration::from_millis(20),
        ..Options::new(backend, url, None)
    }
}

/// A question to Ollama with time enough.
pub fn ollama(operation: &str, body: &serde_json::Value) -> Ask<'static> {
    ask("ollama", operation, body)
}

/// A question with time enough.
pub fn ask(backend: &'static str, operation: &str, body: &serde_json::Value) -> Ask<'static> {
    let operation: &'static str = String::leak(operation.to_owned());
    Ask {
        service: if operation.contains("embed") {
            "embed"
        } else {
            "infer"
        },
        backend,
        operation,
        model: MODEL,
        body: body.to_string(),
        timeout: Duration::from_secs(60),
    }
}

/// A bed with a worker that is ready.
pub async fn ready(options: Options) -> (Bed, bed::Worker) {
    let bed = Bed::start().await;
    let worker = bed.worker("node-1", options);
    worker.says("ready").await;
    (bed, worker)
}

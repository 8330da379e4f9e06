//! `POST /secret {name}`: gives what the manifest names. The record says that it was read and in which
//! version; the value is neither in the record nor in any log.
//!
//! A turn that is tried again gets the value as it is then: it is not on record, so it cannot be given
//! again as it was.

use super::call::{self, Answerer, Ask};
use super::of_error;
use super::reply::{Reply, error, reply};
use crate::agent::Shared;
use crate::secrets::SecretError;
use crate::turn::invocation::Invocation;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use vlinder_core::manifest::AgentManifest;
use vlinder_core::{Selector, record::CallStatus};
use vlinder_worker::Answer;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretBody {
    name: String,
}

pub(super) async fn perform(
    shared: &Arc<Shared>,
    invocation: &Arc<Invocation>,
    manifest: &AgentManifest,
    body: &[u8],
    label: Option<String>,
) -> Reply {
    let name = match serde_json::from_slice::<SecretBody>(body) {
        Ok(body) => body.name,
        Err(cause) => {
            let message = format!("expected {{\"name\": …}}: {cause}");
            return error(400, "bad_request", &message);
        }
    };
    if !manifest.may_read_secret(&name) {
        let shown: String = name.chars().take(128).collect();
        let message = format!(
            "the agent's manifest does not name the secret {shown:?}: see requirements.secrets"
        );
        return error(403, "not_declared", &message);
    }
    let Ok(selector) = Selector::new(&name) else {
        return error(400, "bad_request", "this cannot be the name of a secret");
    };
    let found = shared.secrets.get(&name).await;
    let answer = match &found {
        Ok(secret) => Answer::json(&json!({ "name": name, "version": secret.version })),
        Err(missing @ SecretError::Missing(_)) => {
            let message = format!("{missing}; `vlinder secret put {name}` stores one");
            Answer::error(404, "secret_not_found", &message)
        }
        Err(SecretError::Unavailable(why)) => {
            tracing::warn!(secret = name, why, "a secret cannot be read");
            return error(503, "secret_unavailable", why);
        }
    };
    let ask = Ask {
        service: "secret",
        backend: "vlinder".to_owned(),
        operation: "get",
        selector,
        body: json!({ "name": name }).to_string().into(),
        label,
        answerer: Answerer::Bridge(answer),
    };
    let answered = match call::perform(shared, invocation, Arc::new(ask)).await {
        Ok(answered) => answered,
        Err(error) => return of_error(&error),
    };
    match found {
        // What is on record counts: a turn that was told that there is none is told so again.
        Ok(secret) if answered.result.status == CallStatus::Ok => {
            reply(200, "application/octet-stream", Bytes::from(secret.value))
        }
        Err(missing) if answered.result.status == CallStatus::Ok => {
            let message = format!("{missing} any more");
            error(404, "secret_not_found", &message)
        }
        _ => super::of_answer(shared, &answered)
            .await
            .unwrap_or_else(|error| of_error(&error)),
    }
}

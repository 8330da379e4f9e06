//! `vlinderd health`: how the daemon of this data directory is, as an exit code. For health checks of
//! container engines and probes of orchestrators, in images that hold no HTTP client.

use super::doctor::get;
use crate::{EXIT_OK, EXIT_OTHER, EXIT_UNREACHABLE};
use serde_json::Value;
use vlinder_config::{Loaded, NodeAddresses};

/// Asks the daemon. `live`: whether it turns, else whether all of its workers are up and the bus
/// answers. 0: yes; 1: no, with what is missing on stderr; 3: it cannot be asked.
pub async fn ask(loaded: &Loaded, live: bool) -> u8 {
    let addresses = match NodeAddresses::read(&loaded.data_dir) {
        Ok(addresses) => addresses.and_then(|addresses| addresses.http),
        Err(error) => {
            eprintln!("where the daemon listens cannot be read: {error}");
            return EXIT_UNREACHABLE;
        }
    };
    let Some(url) = addresses else {
        let data_dir = loaded.data_dir.display();
        eprintln!("no daemon has come up in {data_dir}");
        return EXIT_UNREACHABLE;
    };
    let made = loaded.data_dir.join("run").join("token");
    let token = match &loaded.config.auth.token {
        Some(token) => token.expose().to_owned(),
        None => std::fs::read_to_string(made).unwrap_or_default(),
    };
    let path = if live { "/healthz" } else { "/readyz" };
    match get(&url, path, Some(token.trim())).await {
        Ok((200, _)) => {
            println!("{}", if live { "live" } else { "ready" });
            EXIT_OK
        }
        Ok((401, _)) => {
            eprintln!("the daemon at {url} has another token");
            EXIT_OTHER
        }
        Ok((status, body)) => {
            let said: Value = serde_json::from_str(&body).unwrap_or_default();
            let missing = said["missing"].as_array().cloned().unwrap_or_default();
            let missing: Vec<&str> = missing.iter().filter_map(Value::as_str).collect();
            match missing.is_empty() {
                true => eprintln!("the daemon at {url} answers {status}"),
                false => eprintln!("not ready: {}", missing.join("; ")),
            }
            EXIT_OTHER
        }
        Err(error) => {
            eprintln!("{url}: {error}");
            EXIT_UNREACHABLE
        }
    }
}

//! Configuration that cannot be wrong quietly.
//!
//! What for: one call, [`load`], turns defaults, `config.toml`, the environment, flags and live
//! changes into a [`Config`] whose every value is checked, and says for each value where it is
//! from. [`ClientConfig`] does the same for the command line's side.
//!
//! What it guarantees: an unknown key, an unknown `VLINDER_` variable, a bad number or URL and two
//! settings that do not fit are [`Mistake`]s, and all of them are reported at once. Secrets are
//! masked in `Debug`, in messages and in [`Loaded::effective_toml`] unless asked for.
//!
//! What it does not do: it opens no connection and looks at no device (`doctor` does), and apart
//! from [`Env::from_process`] nothing in it, or in any other crate, reads the environment.
//!
//! Where to add a key: one line in `keys.rs`, one field in `config.rs`; the sample file, the JSON
//! Schema, the variable's name and the tests follow (`VLINDER_TEST_BLESS=1` rewrites the sample).

mod addresses;
pub mod aws;
mod check;
mod client;
mod client_file;
mod config;
mod derive;
mod elements;
mod env;
mod expand;
mod files;
mod keys;
mod layers;
mod live;
mod mistake;
mod sample;
mod schema;
mod secret;
mod settings;
mod show;
mod token;
mod toml_file;

pub use addresses::{NodeAddresses, Service};
pub use check::{TOKEN_LEN_MIN, WORKERS_PER_ROLE_MAX};
pub use client::{AddressSource, ClientConfig};
pub use config::{
    Anthropic, Auth, Config, Distributed, ImagePolicy, Local, LogFormat, LogLevel, Logging, Node,
    Ollama, Openai, Openrouter, Ports, Queue, QueueBackend, QueueSync, Runtime, S3, State,
    StateBackend, Supervisor, Workers,
};
pub use env::Env;
pub use layers::{Flag, Loaded, Sources, data_dir, load};
pub use live::{LiveChange, change_live};
pub use mistake::{Mistake, Origin};
pub use sample::sample_toml;
pub use schema::json_schema;
pub use secret::{NatsUrl, Secret};
pub use token::{Error as TokenError, ensure_token, settle_token};

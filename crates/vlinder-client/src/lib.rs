//! A client of a Vlinder cluster: one [`Client`] for its five gRPC services.
//!
//! What it guarantees: every call ends by a deadline; each carries the credential; an address that
//! cannot be reached is passed over for the next one; what may be repeated without harm is
//! repeated, with backoff, while a service or its leader is being replaced; a turn whose stream
//! breaks is taken up again under its submission and never sent as a second turn ([`Turn`]).
//!
//! What it does not do: it reads no file and no environment (`vlinder-config` does), it prints
//! nothing, and it repeats nothing that would take effect twice.

mod calls;
mod error;
mod pool;
mod turn;

pub use calls::{BUNDLE_BYTES_MAX, SESSION_LIST_MAX};
pub use error::Error;
pub use pool::{Client, Limits};
pub use turn::{Turn, TurnEvent};

//! The state service on the embedded bus, fed the way the real emitters do.

mod bed;
mod hostile;
mod reads;
mod rebuild;
mod verify;
mod winners;

//! The supervisor with real child processes: this test binary in another role.

mod bed;
mod boxed;
mod daemon;
mod entry;
mod processes;
mod scaling;
mod tasks;

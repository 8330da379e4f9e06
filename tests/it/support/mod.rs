//! What the tests of whole nodes stand on: the built binaries, nodes with a directory and ports of
//! their own, processes as `/proc` shows them, and waiting for a condition with a deadline.
//!
//! Every node is ended with its test, and a process of a node that is left behind fails the test.

pub mod agents;
pub mod bins;
pub mod compose;
pub mod docker;
pub mod faces;
pub mod node;
pub mod proc;
pub mod wait;

pub use bins::Finished;
pub use node::{Node, NodeSpec, Worker};
pub use wait::wait_for;

//! What tests need around the thing they test: NATS servers to kill and restart, and a wire to cut.
//!
//! * [`NatsServer`] and [`NatsCluster`] run real servers, each a process of its own on loopback with
//!   a store of its own, ended with the test.
//! * [`AwsServer`] runs a server that answers as S3 and Lambda do.
//! * [`TcpProxy`] stands between a client and a server and can lose, hold back or cut.
//!
//! A missing server is a panic that says how to get one, never a skipped test. Everything that waits
//! has a deadline.

mod aws;
mod nats;
mod proxy;

pub use aws::AwsServer;
pub use nats::{CURRENT, NatsCluster, NatsServer, OLDEST, StoreCopy, free_port};
pub use proxy::TcpProxy;

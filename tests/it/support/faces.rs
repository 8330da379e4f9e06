//! The network faces of a node: HTTP, and gRPC with typed clients or by hand.

use std::sync::{Arc, Once};
use std::time::Duration;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

/// Longest answer of a node that works.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);

/// A client for HTTP, or for HTTP/2 without TLS as gRPC wants it.
pub fn client(http2: bool) -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let builder = reqwest::Client::builder()
        .no_proxy()
        .timeout(ANSWER_DEADLINE);
    let builder = if http2 {
        builder.http2_prior_knowledge()
    } else {
        builder
    };
    builder.build().expect("a client needs nothing")
}

/// Puts the credential on every call.
#[derive(Clone)]
pub struct Bearer(Arc<str>);

impl Interceptor for Bearer {
    fn call(&mut self, mut call: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let value = AsciiMetadataValue::try_from(format!("Bearer {}", self.0))
            .map_err(|_| tonic::Status::internal("the token is no header value"))?;
        call.metadata_mut().insert("authorization", value);
        Ok(call)
    }
}

/// A channel with a credential.
pub type Grpc = InterceptedService<Channel, Bearer>;

/// A channel to a service; connects with the first call.
pub fn grpc(address: &str, token: &str) -> Grpc {
    grpc_within(address, token, ANSWER_DEADLINE)
}

/// The same for calls that have much to do.
pub fn grpc_within(address: &str, token: &str, deadline: Duration) -> Grpc {
    let endpoint = Endpoint::from_shared(address.to_owned()).expect("the node wrote the address");
    let channel = endpoint.timeout(deadline).connect_lazy();
    InterceptedService::new(channel, Bearer(token.into()))
}

//! The catalog service: which models every upstream of every live node offers now.

use crate::status;
use tonic::{Request, Response, Status};
use vlinder_proto::catalog::catalog_server::Catalog;
use vlinder_proto::catalog::{AvailableRequest, AvailableResponse, OfferedModel, Upstream};
use vlinder_worker::WorkerCx;
use vlinder_worker::serving::Serving;

/// Longest filter, in bytes.
const FILTER_BYTES_MAX: usize = 256;

/// The service.
pub struct CatalogService {
    cx: WorkerCx,
}

impl CatalogService {
    /// A catalog over the bus of `cx`.
    pub fn new(cx: WorkerCx) -> Self {
        Self { cx }
    }
}

#[tonic::async_trait]
impl Catalog for CatalogService {
    async fn available(
        &self,
        request: Request<AvailableRequest>,
    ) -> Result<Response<AvailableResponse>, Status> {
        let AvailableRequest { filter, catalog } = request.into_inner();
        if filter.len() > FILTER_BYTES_MAX || catalog.len() > FILTER_BYTES_MAX {
            return Err(Status::invalid_argument(
                "filter: expected at most 256 bytes",
            ));
        }
        let filter = filter.to_lowercase();
        let serving = Serving::read(&self.cx.bus).await.map_err(status::of_bus)?;
        let mut response = AvailableResponse::default();
        for offer in serving.offers() {
            if !catalog.is_empty() && offer.backend != catalog {
                continue;
            }
            for model in &offer.models {
                if model.name.to_lowercase().contains(&filter) {
                    response.models.push(OfferedModel {
                        name: model.name.clone(),
                        backend: offer.backend.clone(),
                        node: offer.node.clone(),
                        endpoint: offer.endpoint.clone(),
                        size: model.size.unwrap_or(0),
                    });
                }
            }
            response.upstreams.push(Upstream {
                node: offer.node.clone(),
                backend: offer.backend.clone(),
                endpoint: offer.endpoint.clone(),
                problem: offer.problem.clone().unwrap_or_default(),
            });
        }
        // Several workers of one node offer the same models.
        response
            .models
            .sort_by(|a, b| (&a.name, &a.backend, &a.node).cmp(&(&b.name, &b.backend, &b.node)));
        response
            .models
            .dedup_by(|a, b| (&a.name, &a.backend, &a.node) == (&b.name, &b.backend, &b.node));
        response
            .upstreams
            .sort_by(|a, b| (&a.node, &a.backend).cmp(&(&b.node, &b.backend)));
        response
            .upstreams
            .dedup_by(|a, b| (&a.node, &a.backend) == (&b.node, &b.backend));
        Ok(Response::new(response))
    }
}

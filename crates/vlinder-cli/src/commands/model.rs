//! `vlinder model`.

use super::Cx;
use crate::args::Model;
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use vlinder_proto::catalog::AvailableRequest;
use vlinder_proto::registry::ListModelsRequest;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Model) -> Result<(), Error> {
    match command {
        Model::Available { filter, catalog } => available(cx, filter, catalog).await,
        // The hidden ones never come here.
        Model::List | Model::Add(_) | Model::Remove(_) => list(cx).await,
    }
}

async fn available(cx: &Cx<'_>, filter: String, catalog: String) -> Result<(), Error> {
    let offered = cx
        .client
        .available_models(AvailableRequest { filter, catalog })
        .await?;
    let mut table = Table::new(&[
        ("model", Column::Whole),
        ("backend", Column::Whole),
        ("node", Column::Whole),
        ("size", Column::Number),
        ("endpoint", Column::Cut),
    ]);
    for model in &offered.models {
        table.row([
            model.name.clone(),
            model.backend.clone(),
            model.node.clone(),
            text::size(model.size),
            model.endpoint.clone(),
        ]);
    }
    for upstream in &offered.upstreams {
        if !upstream.problem.is_empty() {
            cx.out.note(&format!(
                "{} on {} ({}): {}",
                upstream.backend, upstream.node, upstream.endpoint, upstream.problem
            ));
        }
    }
    cx.out.list(
        || json::of(&offered.models),
        table,
        "no model is offered now",
    )
}

async fn list(cx: &Cx<'_>) -> Result<(), Error> {
    let models = cx
        .client
        .list_models(ListModelsRequest::default())
        .await?
        .models;
    let mut table = Table::new(&[
        ("model", Column::Whole),
        ("backend", Column::Whole),
        ("size", Column::Number),
        ("nodes", Column::Cut),
    ]);
    for model in &models {
        table.row([
            model.name.clone(),
            model.backend.clone(),
            text::size(model.size),
            model.nodes.join(", "),
        ]);
    }
    cx.out.list(
        || json::of(&models),
        table,
        "no model is known; `vlinder model available` asks the upstreams",
    )
}

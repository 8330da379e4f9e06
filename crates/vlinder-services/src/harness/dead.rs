//! Dead letters, as clients see them.

use crate::status;
use tonic::Status;
use vlinder_bus::Bus;
use vlinder_bus::dead::DeadLetter;
use vlinder_proto::harness as proto;

fn summary(letter: &DeadLetter) -> proto::DeadLetter {
    proto::DeadLetter {
        id: letter.id,
        time_ms: letter.time_ms,
        stream: letter.stream.clone(),
        subject: letter.subject.clone(),
        seq: letter.seq,
        reason: letter.reason.clone(),
        deliveries: letter.deliveries,
        bytes: letter.body.len() as u64,
    }
}

pub async fn list(
    bus: &Bus,
    request: proto::ListDeadRequest,
) -> Result<proto::ListDeadResponse, Status> {
    let letters = bus
        .dead_letters(request.from.max(1))
        .await
        .map_err(status::of_bus)?;
    Ok(proto::ListDeadResponse {
        letters: letters.iter().map(summary).collect(),
    })
}

async fn find(bus: &Bus, id: u64) -> Result<DeadLetter, Status> {
    let found = bus.dead_letter(id.max(1)).await.map_err(status::of_bus)?;
    found.ok_or_else(|| {
        Status::not_found(format!(
            "there is no dead letter {id}; `vlinder queue dead list` shows all"
        ))
    })
}

pub async fn show(
    bus: &Bus,
    request: proto::ShowDeadRequest,
) -> Result<proto::ShowDeadResponse, Status> {
    let letter = find(bus, request.id).await?;
    Ok(proto::ShowDeadResponse {
        letter: Some(summary(&letter)),
        headers: letter.headers.into_iter().collect(),
        body: letter.body.to_vec(),
    })
}

pub async fn redrive(
    bus: &Bus,
    request: proto::RedriveDeadRequest,
) -> Result<proto::RedriveDeadResponse, Status> {
    let letters = if request.all {
        bus.dead_letters(1).await.map_err(status::of_bus)?
    } else {
        let mut letters = Vec::new();
        for id in &request.ids {
            letters.push(find(bus, *id).await?);
        }
        letters
    };
    if letters.is_empty() {
        return Err(Status::not_found(
            "no dead letter was named, or there is none",
        ));
    }
    let mut redriven = Vec::new();
    for letter in &letters {
        bus.redrive(letter).await.map_err(status::of_bus)?;
        redriven.push(letter.id);
    }
    Ok(proto::RedriveDeadResponse { redriven })
}

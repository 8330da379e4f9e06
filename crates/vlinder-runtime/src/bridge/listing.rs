//! What models there are, in the words of each wire format.

use serde_json::json;
use std::collections::BTreeMap;
use vlinder_bus::Bus;
use vlinder_worker::Answer;
use vlinder_worker::offers::OfferedModel;
use vlinder_worker::serving::Serving;

/// Longest name of a model that is repeated in an error, in characters.
const SHOWN_CHARS_MAX: usize = 200;
/// How alike a name must be to be proposed, from 0 to 1.
const ALIKE_MIN: f64 = 0.5;
/// Names that are proposed.
const PROPOSED_MAX: usize = 3;

/// The models that some live upstream of `backend` offers now, each once, by name.
pub(crate) async fn offered(
    bus: &Bus,
    backend: &str,
) -> Result<Vec<OfferedModel>, vlinder_bus::Error> {
    let serving = Serving::read(bus).await?;
    let offers = serving.offers().iter();
    let models = offers
        .filter(|offer| offer.backend == backend)
        .flat_map(|offer| offer.models.iter().cloned());
    let once: BTreeMap<String, OfferedModel> =
        models.map(|model| (model.name.clone(), model)).collect();
    Ok(once.into_values().collect())
}

/// Says that nobody has ever offered `model`, and which names are near. `known` are the names of all
/// models, each as `<backend>/<model>`.
pub(crate) fn unknown<'a>(
    backend: &str,
    model: &str,
    known: impl Iterator<Item = &'a str>,
) -> String {
    let shown: String = model.chars().take(SHOWN_CHARS_MAX).collect();
    let wanted = shown.to_lowercase();
    let mut alike: Vec<(f64, &str, &str)> = known
        .filter_map(|name| name.split_once('/'))
        .map(|(of, name)| {
            let (bare, lower) = (name.split(':').next().unwrap_or(name), name.to_lowercase());
            let alike = strsim::normalized_damerau_levenshtein(&lower, &wanted).max(
                strsim::normalized_damerau_levenshtein(&bare.to_lowercase(), &wanted),
            );
            (alike, of, name)
        })
        .filter(|(alike, ..)| *alike >= ALIKE_MIN)
        .collect();
    alike.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| (a.1, a.2).cmp(&(b.1, b.2)))
    });
    let near: Vec<String> = alike
        .into_iter()
        .take(PROPOSED_MAX)
        .map(|(_, of, name)| match of == backend {
            true => format!("{name:?}"),
            false => format!("{name:?} of {of}"),
        })
        .collect();
    let hint = match near.is_empty() {
        true => "`vlinder model available` lists what there is".to_owned(),
        false => format!("did you mean {}?", near.join(" or ")),
    };
    format!("no {backend} server of this cluster has ever offered the model {shown:?}; {hint}")
}

/// The answer to `operation` given what is offered.
pub(crate) fn answer(operation: &str, backend: &str, offered: &[OfferedModel]) -> Answer {
    match operation {
        "api/version" => Answer::json(&json!({ "version": env!("CARGO_PKG_VERSION") })),
        "api/tags" => {
            let models: Vec<_> = offered
                .iter()
                .map(|model| {
                    json!({ "name": model.name, "model": model.name, "size": model.size.unwrap_or(0), "details": {} })
                })
                .collect();
            Answer::json(&json!({ "models": models }))
        }
        _ => {
            let data: Vec<_> = offered
                .iter()
                .map(|model| json!({ "id": model.name, "object": "model", "created": 0, "owned_by": backend }))
                .collect();
            Answer::json(&json!({ "object": "list", "data": data }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_models_are_told_with_near_names() {
        let known = [
            "ollama/smollm2:135m",
            "ollama/llama3.2:3b",
            "openai/smollm2-135m",
        ];
        let said = |backend, model| unknown(backend, model, known.into_iter());
        let close = said("ollama", "SmolM2");
        assert!(
            close.contains("did you mean \"smollm2:135m\" or"),
            "{close}"
        );
        let elsewhere = said("openai", "smollm2:135m");
        assert!(
            elsewhere.contains("\"smollm2:135m\" of ollama"),
            "{elsewhere}"
        );
        let far = said("ollama", &"x".repeat(10_000));
        assert!(
            far.contains("vlinder model available") && far.len() < 500,
            "{far}"
        );
    }
}

//! The paths that an agent may reach through a worker. A closed list: an operation is part of the
//! address that is called, so nothing else may ever get into it.

use crate::Backend;

const OLLAMA: [&str; 6] = [
    "api/chat",
    "api/generate",
    "api/embed",
    "api/embeddings",
    "v1/chat/completions",
    "v1/embeddings",
];
const OPENAI: [&str; 4] = [
    "v1/chat/completions",
    "v1/embeddings",
    "v1/completions",
    "v1/responses",
];

const ANTHROPIC: [&str; 1] = ["v1/messages"];

/// What `backend` serves.
pub fn of(backend: Backend) -> &'static [&'static str] {
    match backend {
        Backend::Ollama => &OLLAMA,
        Backend::Openai | Backend::Openrouter => &OPENAI,
        Backend::Anthropic => &ANTHROPIC,
    }
}

/// Whether `backend` serves this operation.
pub fn known(backend: Backend, operation: &str) -> bool {
    of(backend).contains(&operation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_paths_are_reached() {
        assert!(known(Backend::Ollama, "api/chat"));
        assert!(known(Backend::Openrouter, "v1/responses"));
        for hostile in [
            "",
            "api/delete",
            "/api/chat",
            "api/chat/",
            "api/../api/pull",
            "v1/chat/completions?x=1",
            "V1/EMBEDDINGS",
            "http://elsewhere/api/chat",
        ] {
            assert!(!known(Backend::Ollama, hostile), "{hostile}");
            assert!(!known(Backend::Openai, hostile), "{hostile}");
        }
        assert!(!known(Backend::Openai, "api/chat"));
        assert!(!known(Backend::Openai, "v1/messages"));
        assert!(known(Backend::Anthropic, "v1/messages"));
        assert!(!known(Backend::Anthropic, "v1/chat/completions"));
    }
}

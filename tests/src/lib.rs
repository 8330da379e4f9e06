//! Home of the integration tests in `it/`.

//! Compiles `proto/*.proto` without a system `protoc`.

use std::path::PathBuf;

const FILES: [&str; 5] = [
    "harness.proto",
    "state.proto",
    "registry.proto",
    "secret.proto",
    "catalog.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(FILES.map(|file| root.join(file)), [&root])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let encoded = prost::Message::encode_to_vec(&descriptors);
    std::fs::write(out.join("descriptors.bin"), encoded)?;
    tonic_prost_build::configure()
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .compile_fds(descriptors)?;
    Ok(())
}

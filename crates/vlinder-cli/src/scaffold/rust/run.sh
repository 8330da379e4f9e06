#!/bin/sh
# Builds the agent where it is deployed, then becomes it. An agent's HOME is its own directory; the Rust
# toolchain is in that of the user.
set -e
home=$(getent passwd "$(id -u)" | cut -d: -f6)
HOME="$home" cargo build --release --quiet --offline
exec ./target/release/@NAME@

//! Agents for tests, and turns with them over the command line.

use super::Node;
use super::bins::Finished;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The agent that does what it is told.
pub const PUPPET: &str = "puppet";

/// An agent of the examples, by its directory.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples")
        .join(name)
}

/// Writes the puppet with these further lines in its manifest; gives its directory.
pub fn puppet(node: &Node, name: &str, lines: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/puppet/agent.py");
    let directory = node.spec().home().join(name);
    fs::create_dir_all(&directory).expect("the directory is ours");
    fs::copy(source, directory.join("agent.py")).expect("the fixture is there");
    let manifest = format!(
        "name = {name:?}\ndescription = \"does what it is told\"\nruntime = \"process\"\n\
         executable = \"python3 agent.py\"\nobject_storage = \"sqlite://{name}\"\n{lines}\n"
    );
    fs::write(directory.join("agent.toml"), manifest).expect("the directory is ours");
    directory
}

/// Deploys a directory and waits for a replica.
pub async fn deploy(node: &Node, directory: &Path) {
    let path = directory.display().to_string();
    node.cli(&["agent", "deploy", "-p", &path, "--wait"])
        .await
        .code(0);
}

/// Deploys the puppet.
pub async fn deploy_puppet(node: &Node, lines: &str) {
    deploy(node, &puppet(node, PUPPET, lines)).await;
}

/// One turn, with further arguments.
pub async fn run(node: &Node, agent: &str, said: &str, args: &[&str]) -> Finished {
    let all = [&["agent", "run", agent, "-p", said, "-o", "json"], args].concat();
    node.cli(&all).await
}

/// One turn of a session, which must be done; gives all that is told of it.
#[track_caller]
pub fn turn(node: &Node, agent: &str, session: &str, said: &str) -> impl Future<Output = Value> {
    let at = std::panic::Location::caller();
    async move {
        let finished = run(node, agent, said, &["--session", session]).await;
        assert_eq!(finished.code, Some(0), "{at}: {said:?}: {finished:#?}");
        finished.json()
    }
}

/// What an agent answered.
pub fn output(turn: &Value) -> &str {
    turn["output"]
        .as_str()
        .unwrap_or_else(|| panic!("no output in {turn:#}"))
}

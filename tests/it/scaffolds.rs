//! What `agent new` and `fleet new` write runs as it stands (features D10, D5).

use crate::support::agents::{deploy, output, run, turn};
use crate::support::{Node, NodeSpec};
use std::process::Command;

async fn node_with(lang: &str) -> Node {
    let spec = NodeSpec::embedded();
    let made = spec.cli(&["agent", "new", lang, "greeter"]).await;
    made.code(0);
    let node = spec.start().await;
    deploy(&node, &node.spec().home().join("greeter")).await;
    node
}

async fn answers_at_once(lang: &str) {
    let node = node_with(lang).await;
    let first = turn(&node, "greeter", "s", "hello there").await;
    assert_eq!(
        output(&first),
        "You said: hello there (number 1 in this session)."
    );
    let second = turn(&node, "greeter", "s", "again").await;
    assert_eq!(
        output(&second),
        "You said: again (number 2 in this session). Before that you said: hello there"
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_python_agent_answers_at_once() {
    answers_at_once("python").await;
}

#[tokio::test]
async fn a_javascript_agent_answers_at_once() {
    answers_at_once("js").await;
}

#[tokio::test]
async fn a_rust_agent_answers_at_once() {
    answers_at_once("rust").await;
}

/// Where the language's tool is not on this machine, only that the files are there is tested.
#[tokio::test]
async fn go_and_typescript_agents_answer_at_once_where_their_tools_are() {
    let has_go = Command::new("go").arg("version").output().is_ok();
    let strips = Command::new("node")
        .args(["--experimental-strip-types", "-e", "0"])
        .output();
    let strips = strips.is_ok_and(|ended| ended.status.success());
    for (lang, has_tool, file) in [("go", has_go, "main.go"), ("ts", strips, "agent.mts")] {
        if has_tool {
            answers_at_once(lang).await;
            continue;
        }
        eprintln!("{lang}: no tool for it on this machine, so it was not run");
        let spec = NodeSpec::embedded();
        spec.cli(&["agent", "new", lang, "greeter"]).await.code(0);
        assert!(spec.home().join("greeter").join(file).exists());
    }
}

#[tokio::test]
async fn a_fleet_answers_at_once() {
    let spec = NodeSpec::embedded();
    spec.cli(&["fleet", "new", "team"]).await.code(0);
    let node = spec.start().await;
    let none = node.cli(&["fleet", "run", "team", "-p", "x"]).await;
    assert_eq!(none.code, Some(5), "{none:#?}");
    let path = node.spec().home().join("team").display().to_string();
    node.cli(&["fleet", "deploy", "-p", &path, "--wait"])
        .await
        .code(0);
    let said = node
        .cli(&["fleet", "run", "team", "-p", "abc def", "-o", "json"])
        .await;
    assert_eq!(output(&said.code(0).json()), "cba fed");
    let listed = node.cli(&["fleet", "list", "-o", "json"]).await.code(0);
    let listed = listed.json();
    assert_eq!(listed[0]["name"], "team", "{listed:#}");
    assert_eq!(listed[0]["agents"]["front"], "team-front", "{listed:#}");
    let again = node.cli(&["fleet", "deploy", "-p", &path]).await.code(0);
    assert!(again.stdout.contains("2 agents"), "{again:#?}");
    // The alias means something within the fleet alone.
    let outside = run(&node, "team-helper", "x", &[]).await.code(0).json();
    assert_eq!(output(&outside), "x");
    node.cli(&["fleet", "delete", "team"]).await.code(0);
    node.cli(&["fleet", "get", "team"]).await.code(5);
    node.cli(&["agent", "get", "team-front"]).await.code(0);

    // Every mistake before anything is deployed.
    for (fleet, says) in [
        ("name='t2'\nentry='a'\n[agents.b]\npath='front'\n", "entry"),
        (
            "name='t2'\nentry='a'\n[agents.a]\npath='nowhere'\n",
            "nowhere",
        ),
        ("name='t2'\n", "entry"),
    ] {
        std::fs::write(format!("{path}/fleet.toml"), fleet).unwrap();
        let refused = node.cli(&["fleet", "deploy", "-p", &path]).await.code(2);
        assert!(refused.stderr.contains(says), "{refused:#?}");
    }
    node.stop_cleanly().await;
}

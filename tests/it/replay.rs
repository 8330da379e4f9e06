//! Time travel: forks inside a turn, replays, repairs, promotions (features F3, F4; issue 4, "What it must
//! show" 1 and 2). How often the model was asked is counted at the model's side.

use crate::cluster::model::Model;
use crate::support::agents::{deploy, output, run, turn};
use crate::support::{Node, NodeSpec, wait_for};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer};

const MODEL: &str = "smollm2:135m";
const AGENT: &str = "scribe";
const S: &str = "s";

fn agent_in(home: &Path, name: &str, tone: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/replay/agent.py");
    let directory = home.join(name);
    fs::create_dir_all(&directory).expect("the directory is ours");
    fs::copy(source, directory.join("agent.py")).expect("the fixture is there");
    fs::write(directory.join("tone.txt"), tone).expect("the directory is ours");
    let manifest = format!(
        "name = {name:?}\ndescription = \"does what it is told\"\nruntime = \"process\"\n\
         executable = \"python3 agent.py\"\nobject_storage = \"sqlite://notes\"\nvector_storage = \"sqlite://notes\"\n\
         timeout = \"2m\"\n[requirements]\nmodels = [{MODEL:?}]\n[requirements.services.infer]\n\
         provider = \"ollama\"\nprotocol = \"ollama\"\nmodels = [{MODEL:?}]\n"
    );
    fs::write(directory.join("agent.toml"), manifest).expect("the directory is ours");
    directory
}

async fn node_with(model: &Model, spec: NodeSpec) -> Node {
    let node = spec
        .var("VLINDER_OLLAMA_ENDPOINT", &model.url)
        .start()
        .await;
    deploy(&node, &agent_in(node.spec().home(), AGENT, "")).await;
    node
}

/// How often the model was asked for an answer.
async fn asked(model: &Model) -> usize {
    let calls = model.calls().await;
    calls
        .iter()
        .filter(|call| call["path"] == "/api/generate")
        .count()
}

async fn json(node: &Node, args: &[&str]) -> Value {
    node.cli(&[args, &["-o", "json"]].concat())
        .await
        .code(0)
        .json()
}

async fn say(node: &Node, said: &str) -> Value {
    turn(node, AGENT, S, said).await
}

async fn on_branch(node: &Node, branch: &str, said: &str) -> Value {
    run(node, AGENT, said, &["--session", S, "--branch", branch])
        .await
        .code(0)
        .json()
}

async fn session(node: &Node, branch: &str) -> Value {
    json(node, &["session", "get", S, "--branch", branch]).await
}

fn calls(turn: &Value) -> Vec<Value> {
    turn["calls"].as_array().expect("a turn has calls").clone()
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("no text: {value:#}"))
}

async fn verified(node: &Node, session: &str) {
    let verified = json(node, &["session", "verify", session]).await;
    assert_eq!(verified["ok"], true, "{verified:#}");
}

#[tokio::test]
async fn a_replay_asks_nothing_again_and_a_repair_only_what_depends_on_it_embedded() {
    asks_nothing_again(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn a_replay_asks_nothing_again_and_a_repair_only_what_depends_on_it_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    asks_nothing_again(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

async fn asks_nothing_again(spec: NodeSpec) {
    let model = Model::named(&[MODEL]).await;
    let node = node_with(&model, spec).await;
    say(&node, "put colour blue; vec a 1 0; get colour").await;
    let second = say(
        &node,
        "get colour; ask The sky is; keep told Once upon a; near 1 0",
    )
    .await;
    say(&node, "get told; list; ask Two and two; get told").await;
    let before = asked(&model).await;
    assert_eq!(before, 3);

    let replayed = json(&node, &["session", "replay", S, "--name", "again"]).await;
    assert_eq!(asked(&model).await, before, "{replayed:#}");
    let summary = &replayed["summary"];
    assert_eq!(
        (&summary["turns"], &summary["same"], &summary["live"]),
        (&3.into(), &3.into(), &0.into()),
        "{replayed:#}"
    );
    assert_eq!(summary["recorded"], 12, "{replayed:#}");
    let (old, new) = (session(&node, "main").await, session(&node, "again").await);
    for (old, new) in old["turns"]
        .as_array()
        .unwrap()
        .iter()
        .zip(new["turns"].as_array().unwrap())
    {
        assert_eq!(old["state"], new["state"]);
        assert_eq!(old["output"], new["output"]);
        assert_eq!(new["source"], old["submission"]);
        for (old, new) in calls(old).iter().zip(calls(new)) {
            assert_eq!(new["replayed"], old["hash"], "{new:#}");
            assert_eq!(new["key"], old["key"], "{new:#}");
        }
    }
    verified(&node, S).await;

    // What another one would have said to the first question: what was read and written after it stays,
    // but for what the model's answer went into.
    let line = calls(&session(&node, "main").await["turns"][1]);
    let wrong = text(&line[1]["hash"]).to_owned();
    assert_eq!(line[1]["service"], "infer");
    let answer = node.spec().home().join("answer.json");
    fs::write(
        &answer,
        r#"{"model": "smollm2:135m", "response": "green", "done": true}"#,
    )
    .unwrap();
    let answer = answer.display().to_string();
    let fixed = json(
        &node,
        &[
            "session",
            "repair",
            S,
            "--node",
            &wrong[..16],
            "--with",
            &answer,
            "--name",
            "fixed",
        ],
    )
    .await;
    assert_eq!(
        asked(&model).await,
        before,
        "nothing depends on it: {fixed:#}"
    );
    let turns = fixed["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 2, "{fixed:#}");
    assert_eq!(
        (&turns[0]["repaired"], &turns[0]["same"]),
        (&true.into(), &false.into())
    );
    assert!(text(&turns[0]["output"]).contains("green"), "{fixed:#}");
    assert_eq!(turns[0]["first"]["source"], wrong.as_str(), "{fixed:#}");
    assert_eq!(turns[1]["same"], true, "{fixed:#}");

    // Of the question whose answer is kept: the put, what reads it, and nothing else.
    let kept = line
        .iter()
        .rfind(|call| call["service"] == "infer")
        .map(|call| text(&call["hash"]).to_owned())
        .unwrap();
    let other = node.spec().home().join("other.json");
    fs::write(&other, r#"{"response": "dragon", "done": true}"#).unwrap();
    let other = other.display().to_string();
    let fixed = json(
        &node,
        &[
            "session", "repair", S, "--node", &kept, "--with", &other, "--name", "dragon",
        ],
    )
    .await;
    assert_eq!(asked(&model).await, before, "{fixed:#}");
    let turns = fixed["turns"].as_array().unwrap();
    // Live: the put with the new content, and what works on the new state.
    assert_eq!(
        (&turns[0]["recorded"], &turns[0]["live"]),
        (&3.into(), &2.into()),
        "{fixed:#}"
    );
    assert_eq!(
        (&turns[1]["recorded"], &turns[1]["live"]),
        (&1.into(), &3.into()),
        "{fixed:#}"
    );
    assert!(text(&turns[1]["output"]).starts_with("dragon"), "{fixed:#}");
    assert!(text(&turns[1]["output"]).ends_with("dragon"), "{fixed:#}");
    verified(&node, S).await;

    // The repaired line can be gone on with and becomes the default one.
    assert_eq!(
        output(&on_branch(&node, "dragon", "get told").await),
        "dragon"
    );
    let promoted = json(&node, &["session", "promote", "dragon", "--session", S]).await;
    let dated = text(&promoted["sealed_as"]).to_owned();
    assert!(dated.starts_with("main-20"), "{promoted:#}");
    assert_eq!(output(&say(&node, "get told").await), "dragon");
    for sealed in ["main", &dated] {
        let refused = run(&node, AGENT, "list", &["--session", S, "--branch", sealed]).await;
        refused.code(9).says("sealed").says("dragon");
        let line = session(&node, sealed).await;
        assert_eq!(line["sealed"], true, "{line:#}");
        assert_eq!(line["turns"].as_array().unwrap().len(), 3, "{line:#}");
    }
    let branches = json(&node, &["session", "branches", S]).await;
    let heads: Vec<(&str, &Value, bool)> = branches
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (text(&row["name"]), &row["head"], row["sealed"] == true))
        .collect();
    let main = heads.iter().find(|(name, ..)| *name == "main").unwrap();
    assert!(
        heads.contains(&(dated.as_str(), main.1, true)),
        "{branches:#}"
    );

    // Live, and with a model: asked anew.
    let live = json(
        &node,
        &[
            "session",
            "replay",
            S,
            "--branch",
            "main",
            "--live",
            "--turn",
            text(&second["submission"]),
        ],
    )
    .await;
    assert_eq!(live["summary"]["recorded"], 0, "{live:#}");
    assert_eq!(live["summary"]["live"], 5, "{live:#}");
    assert_eq!(asked(&model).await, before + 2, "{live:#}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn until_and_model_and_another_agent() {
    let model = Model::named(&[MODEL, "other:1b"]).await;
    let node = node_with(&model, NodeSpec::embedded()).await;
    say(&node, "put a 1; ask One").await;
    let last = say(&node, "ask Two; put b 2; ask Three").await;
    let before = asked(&model).await;
    let line = session(&node, "main").await;
    let first_ask = calls(&line["turns"][1])[0].clone();
    let until = text(&first_ask["hash"]);
    let ran = json(
        &node,
        &["session", "replay", S, "--until", until, "--name", "until"],
    )
    .await;
    assert_eq!(asked(&model).await, before + 1, "{ran:#}");
    assert_eq!(ran["turns"][1]["recorded"], 1, "{ran:#}");
    assert_eq!(ran["turns"][1]["live"], 2, "{ran:#}");
    let ran = json(
        &node,
        &[
            "session", "replay", S, "--model", "other:1b", "--name", "other",
        ],
    )
    .await;
    assert_eq!(asked(&model).await, before + 4, "{ran:#}");
    assert_eq!(ran["summary"]["live"], 3, "{ran:#}");
    assert_eq!(ran["summary"]["recorded"], 2, "{ran:#}");
    let named = calls(&session(&node, "other").await["turns"][1]);
    assert_eq!(named[0]["model"], "other:1b", "{named:#?}");

    // Another version of the agent, which says everything in another tone; and one that says the same.
    deploy(&node, &agent_in(node.spec().home(), "twin", "")).await;
    deploy(&node, &agent_in(node.spec().home(), "loud", "LISTEN!")).await;
    let other = turn(&node, AGENT, "second", "ask Four").await;
    let before = asked(&model).await;
    let all = ["session", "replay", "--all", "--since", "1h", "--agent"];
    let same = json(&node, &[&all[..], &["twin"]].concat()).await;
    assert_eq!(asked(&model).await, before, "{same:#}");
    assert_eq!(same["summary"]["same"], 2, "{same:#}");
    assert_eq!(same["summary"]["different"], 0, "{same:#}");
    assert_eq!(same["summary"]["turns"]["live"], 0, "{same:#}");
    // twin has only sessions that replays made; loud is asked about the ones of scribe.
    let named = [
        "session", "replay", AGENT, "--all", "--agent", "loud", "--name", "week",
    ];
    let loud = json(&node, &named).await;
    assert_eq!(loud["summary"]["different"], 2, "{loud:#}");
    assert_eq!(asked(&model).await, before, "{loud:#}");
    let again = json(&node, &named).await;
    assert_eq!(loud, again, "the same name is the same run");
    let table = node
        .cli(&[&named[..], &["-o", "table"]].concat())
        .await
        .code(0);
    assert!(table.stdout.contains("different"), "{table:#?}");
    assert!(
        table.stdout.contains("2 sessions: 0 the same, 2 different"),
        "{table:#?}"
    );
    for turn in [&last, &other] {
        assert_eq!(turn["agent"], AGENT);
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_replay_survives_the_death_of_agent_and_daemon() {
    let model = Model::named(&[MODEL]).await;
    let node = node_with(&model, NodeSpec::embedded().fixed_ports()).await;
    let flag = node.spec().home().join("died").display().to_string();
    say(&node, "put a 1; ask One").await;
    say(&node, &format!("put b 2; once {flag}; ask Two; wait 1")).await;
    say(&node, "list; ask Three; wait 1; put c 3").await;
    let before = asked(&model).await;
    // The agent dies again in the replay, in the middle of the second turn.
    fs::remove_file(&flag).unwrap();
    let args = ["session", "replay", S, "--name", "again", "-o", "json"];
    let spec = node.spec().clone();
    let (node, cut) = tokio::join!(
        async {
            wait_for(
                "the second turn runs again",
                Duration::from_secs(20),
                || json(&node, &["turn", "list", "--all"]),
                |turns: &Value| turns.as_array().unwrap().len() >= 5,
            )
            .await;
            node.kill9().await.start().await
        },
        spec.cli(&args),
    );
    // Whether the command was patient enough or not: it may be repeated.
    assert!([Some(0), Some(3)].contains(&cut.code), "{cut:#?}");
    let ran = node.cli(&args).await.code(0).json();
    assert_eq!(ran["summary"]["same"], 3, "{ran:#}");
    assert_eq!(ran["summary"]["live"], 0, "{ran:#}");
    assert_eq!(asked(&model).await, before, "{ran:#}");
    let line = session(&node, "again").await;
    assert_eq!(line["turns"].as_array().unwrap().len(), 3, "{line:#}");
    verified(&node, S).await;
    // Once more: nothing is run, everything is told again.
    let again = node.cli(&args).await.code(0).json();
    assert_eq!(ran, again);
    let turns = json(&node, &["turn", "list", "--all"]).await;
    assert_eq!(turns.as_array().unwrap().len(), 6, "{turns:#}");
    // The name is taken by that replay.
    let other = ["session", "replay", S, "--name", "again", "--live"];
    node.cli(&other).await.code(9).says("another");
    node.stop_cleanly().await;
}

/// One call of the long session: the command, and whether it changes the state.
fn command(rng: &mut StdRng, number: usize) -> String {
    match rng.random_range(0..6) {
        0 => format!("put p{} v{number}", rng.random_range(0..12)),
        1 => format!(
            "put q/{} {}",
            rng.random_range(0..5),
            "x".repeat(rng.random_range(1..40))
        ),
        2 => format!(
            "vec k{} {} {number}",
            rng.random_range(0..8),
            rng.random_range(0..9)
        ),
        3 => format!("get p{}", rng.random_range(0..12)),
        4 => format!("near {} 1", rng.random_range(0..9)),
        _ => "list".to_owned(),
    }
}

/// A session of 200 turns, forked at 20 random nodes: the state there is that of a straight run which stopped
/// there, and so is the conversation. The straight run does each call in a turn of its own, so that it
/// stops at every call.
#[tokio::test]
async fn a_fork_inside_a_turn_is_a_straight_run_that_stopped_there() {
    const TURNS: usize = 200;
    const FORKS: usize = 20;
    let seed = std::env::var("VLINDER_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    println!("VLINDER_TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let model = Model::named(&[MODEL]).await;
    let node = node_with(&model, NodeSpec::embedded()).await;
    let mut script: Vec<Vec<String>> = Vec::new();
    for number in 0..TURNS {
        let count = rng.random_range(1..=3);
        let mut commands: Vec<String> = (0..count).map(|_| command(&mut rng, number)).collect();
        // The model takes its time: every tenth turn asks it.
        if number % 10 == 0 {
            commands.insert(rng.random_range(0..=count), format!("ask {number}"));
        }
        script.push(commands);
    }
    for commands in &script {
        say(&node, &commands.join("; ")).await;
    }
    let line = session(&node, "main").await;
    let turns = line["turns"].as_array().unwrap().clone();
    assert_eq!(turns.len(), TURNS);
    let chosen: Vec<(usize, usize)> = (0..FORKS)
        .map(|_| {
            let turn = rng.random_range(0..TURNS);
            (turn, rng.random_range(0..calls(&turns[turn]).len()))
        })
        .collect();
    let last = chosen.iter().map(|(turn, _)| *turn).max().unwrap();
    let mut states = std::collections::HashMap::new();
    let mut state = Value::from("");
    for (index, commands) in script.iter().enumerate().take(last + 1) {
        for (at, command) in commands.iter().enumerate() {
            if !command.starts_with("ask") {
                state = turn(&node, AGENT, "straight", command).await["state"].clone();
            }
            states.insert((index, at), state.clone());
        }
    }
    let state_of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for (number, (index, at)) in chosen.into_iter().enumerate() {
        let call = calls(&turns[index])[at].clone();
        // Requests are nodes, too: the fork then holds the question without its answer.
        let at_request = number % 4 == 3;
        let hash = text(&call[if at_request { "request_hash" } else { "hash" }]);
        let name = format!("f{number}");
        json(
            &node,
            &["session", "fork", S, "--from", hash, "--name", &name],
        )
        .await;
        let forked = session(&node, &name).await;
        let shown = forked["turns"].as_array().unwrap();
        assert_eq!(shown.len(), index + 1, "{name}");
        let cut = &shown[index];
        assert_eq!(
            (&cut["status"], &cut["output"]),
            (&"cut".into(), &"".into()),
            "{cut:#}"
        );
        assert_eq!(calls(cut).len(), at + 1, "{cut:#}");
        let before = match (index, at) {
            (0, 0) => Value::from(""),
            (index, 0) => turns[index - 1]["state"].clone(),
            (index, at) => states[&(index, at - 1)].clone(),
        };
        let expected = if at_request {
            before
        } else {
            states[&(index, at)].clone()
        };
        assert_eq!(
            state_of(&cut["state"]),
            state_of(&expected),
            "{name} at {index}/{at}"
        );
        let went_on = on_branch(&node, &name, "list; heard").await;
        assert_eq!(state_of(&went_on["state"]), state_of(&expected), "{name}");
        // The turns before with their replies, the open input without one, and the new one.
        let heard = output(&went_on);
        let tail = format!("User: {}|User: list; heard", script[index].join("; "));
        assert!(
            heard.trim_end_matches('|').ends_with(&tail),
            "{name}: {heard}"
        );
        assert_eq!(heard.matches("User: ").count(), index + 2, "{name}");
    }
    // All of it again: nothing is asked, nothing is stored anew.
    let before = asked(&model).await;
    let replayed = node
        .cli(&["session", "replay", S, "--branch", "main", "-o", "json"])
        .await
        .code(0);
    println!("{TURNS} turns again in {:?}", replayed.took);
    let summary = &replayed.json()["summary"];
    assert_eq!(
        (&summary["same"], &summary["live"]),
        (&TURNS.into(), &0.into())
    );
    assert_eq!(asked(&model).await, before);
    verified(&node, S).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn of_two_that_promote_one_wins() {
    let model = Model::named(&[MODEL]).await;
    let node = node_with(&model, NodeSpec::embedded()).await;
    say(&node, "put a 1").await;
    let mut racers = Vec::new();
    for round in 0..6 {
        let line = json(&node, &["session", "get", S]).await;
        let end = text(&line["turns"].as_array().unwrap().last().unwrap()["hash"]).to_owned();
        let names = [format!("x{round}"), format!("y{round}")];
        for name in &names {
            json(
                &node,
                &["session", "fork", S, "--from", &end, "--name", name],
            )
            .await;
        }
        let both = names
            .iter()
            .map(|name| {
                let args = ["session", "promote", name.as_str(), "--session", S].map(str::to_owned);
                let node = &node;
                async move {
                    let args: Vec<&str> = args.iter().map(String::as_str).collect();
                    node.cli(&args).await
                }
            })
            .collect::<Vec<_>>();
        let ended = futures::future::join_all(both).await;
        let won = ended.iter().filter(|one| one.code == Some(0)).count();
        let lost = ended.iter().filter(|one| one.code == Some(9)).count();
        assert!(won >= 1 && won + lost == 2, "{ended:#?}");
        racers.push(won);
        let now = json(&node, &["session", "get", S]).await;
        let default = text(&now["default_branch"]).to_owned();
        assert!(names.contains(&default), "{now:#}");
        // The one that was told so first is sealed again where both went through, one after the other.
        let branches = json(&node, &["session", "branches", S]).await;
        let open: Vec<&str> = branches
            .as_array()
            .unwrap()
            .iter()
            .filter(|row| row["sealed"] == false)
            .map(|row| text(&row["name"]))
            .filter(|name| names.iter().any(|own| own == name))
            .collect();
        assert!(open.contains(&default.as_str()), "{branches:#}");
        assert_eq!(open.len(), if won == 2 { 1 } else { 2 }, "{branches:#}");
        say(&node, "get a").await;
    }
    println!("won: {racers:?}");
    verified(&node, S).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn hostile_arguments_are_refused_with_what_to_do() {
    let model = Model::named(&[MODEL]).await;
    let node = node_with(&model, NodeSpec::embedded()).await;
    let done = say(&node, "put a 1; get a").await;
    say(&node, "get a").await;
    let line = session(&node, "main").await;
    let end = text(&line["turns"][0]["hash"]).to_owned();
    let put = text(&calls(&line["turns"][0])[0]["hash"]).to_owned();
    let file = node.spec().home().join("answer");
    fs::write(&file, "x").unwrap();
    let file = file.display().to_string();
    let submission = text(&done["submission"]);
    let zeros = "0".repeat(64);
    let long = "a".repeat(65);
    for (args, code) in [
        (vec!["session", "replay", "nobody"], 5),
        (vec!["session", "replay", S, "--branch", "nowhere"], 5),
        (vec!["session", "replay", S, "--branch", "../x"], 2),
        (vec!["session", "replay", S, "--turn", "t-nobody"], 5),
        (vec!["session", "replay", S, "--from", "zz"], 2),
        (vec!["session", "replay", S, "--until", &zeros], 5),
        (vec!["session", "replay", S, "--until", &long], 2),
        (vec!["session", "replay", S, "--name", "main"], 9),
        (vec!["session", "replay", S, "--name", "a b"], 2),
        (vec!["session", "replay", S, "--agent", "nobody"], 5),
        (vec!["session", "replay", S, "--agent", "A!"], 2),
        (vec!["session", "replay"], 2),
        (
            vec!["session", "repair", S, "--node", &end, "--with", &file],
            2,
        ),
        (
            vec!["session", "repair", S, "--node", &zeros, "--with", &file],
            5,
        ),
        (
            vec!["session", "repair", S, "--node", &put, "--with", "/nowhere"],
            2,
        ),
        (
            vec![
                "session",
                "repair",
                S,
                "--node",
                &put,
                "--with",
                &file,
                "--content-type",
                "a\nb",
            ],
            2,
        ),
        (
            vec!["session", "fork", S, "--from", &put, "--name", "../x"],
            2,
        ),
        (vec!["session", "fork", S, "--from", "12", "--name", "b"], 2),
        (vec!["session", "promote", "nowhere", "--session", S], 5),
    ] {
        let ended = node.cli(&args).await;
        assert_eq!(ended.code, Some(code), "{args:?}: {ended:#?}");
        assert!(ended.stderr.contains("error"), "{args:?}: {ended:#?}");
    }
    let branches = json(&node, &["session", "branches", S]).await;
    assert_eq!(branches.as_array().unwrap().len(), 1, "{branches:#}");

    // A repaired write: the agent is told otherwise, the state stays what the store made.
    let fixed = json(
        &node,
        &[
            "session", "repair", S, "--node", &put, "--with", &file, "--name", "w", "--only",
        ],
    )
    .await;
    assert_eq!(fixed["turns"].as_array().unwrap().len(), 1, "{fixed:#}");
    let told = session(&node, "w").await;
    assert_eq!(told["turns"][0]["state"], line["turns"][0]["state"]);
    assert_eq!(calls(&told["turns"][0])[0]["repaired"], true, "{told:#}");
    // Going on with it needs the same answer.
    fs::write(&file, "y").unwrap();
    node.cli(&[
        "session", "repair", S, "--node", &put, "--with", &file, "--name", "w", "--only",
    ])
    .await
    .code(9);
    // A branch that was forked inside a turn is run again from behind that place on.
    json(
        &node,
        &["session", "fork", S, "--from", &put, "--name", "inside"],
    )
    .await;
    node.cli(&["session", "replay", S, "--branch", "inside"])
        .await
        .code(9);
    on_branch(&node, "inside", "get a").await;
    let ran = json(&node, &["session", "replay", S, "--branch", "inside"]).await;
    assert_eq!(ran["summary"]["same"], 1, "{ran:#}");
    let ran = json(
        &node,
        &[
            "session", "replay", S, "--branch", "inside", "--turn", submission,
        ],
    )
    .await;
    assert_eq!(ran["summary"]["same"], 1, "{ran:#}");
    node.signal(Signal::TERM);
}

//! Agents in containers (features D1, D4, D6, D9; issue 3, "What it must show").

mod engine;

use crate::support::agents::{deploy, output, run, turn};
use crate::support::docker::{Cleaned, Container, Image, containers, docker};
use crate::support::{Node, NodeSpec, Worker, proc, wait_for};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vlinder_testkit::{CURRENT, NatsServer};

const AGENT: &str = "boxed";
/// How long Docker may take to make or remove a container, on a busy machine.
const DOCKER_DEADLINE: Duration = Duration::from_secs(20);

/// Writes a manifest for an image, with further lines; gives its directory.
fn written(node: &Node, name: &str, image: &str, lines: &str) -> PathBuf {
    let directory = node.spec().home().join(name);
    fs::create_dir_all(&directory).unwrap();
    let manifest = format!(
        "name = {name:?}\ndescription = \"does what it is told\"\nruntime = \"container\"\n\
         executable = {image:?}\nobject_storage = \"sqlite://{name}\"\n{lines}\n"
    );
    fs::write(directory.join("agent.toml"), manifest).unwrap();
    directory
}

async fn deployed(node: &Node, image: &Image, lines: &str) {
    deploy(node, &written(node, AGENT, &image.name, lines)).await;
}

/// Waits until a node has so many containers.
async fn wait_containers(node: &str, count: usize) -> Vec<Container> {
    wait_for(
        format!("{count} containers"),
        DOCKER_DEADLINE,
        || std::future::ready(containers(node)),
        |found| found.len() == count,
    )
    .await
}

#[tokio::test]
async fn a_container_agent_is_deployed_works_and_goes() {
    let image = Image::agent();
    for spec in [NodeSpec::embedded()] {
        let (_cleaned, node) = Cleaned::start(&spec).await;
        deployed(&node, &image, "").await;
        assert_eq!(containers(spec.name()).len(), 1);
        assert_eq!(
            output(&turn(&node, AGENT, "s", "echo hello").await),
            "hello"
        );
        assert_eq!(output(&turn(&node, AGENT, "s", "count").await), "1");
        assert_eq!(output(&turn(&node, AGENT, "s", "count").await), "2");
        turn(&node, AGENT, "s", "print what it says").await;
        wait_for(
            "its log",
            Duration::from_secs(5),
            async || node.cli(&["agent", "logs", AGENT]).await.stdout,
            |log| log.contains("the agent has started") && log.contains("what it says"),
        )
        .await;
        node.cli(&["session", "verify", "s"]).await.code(0);
        node.cli(&["agent", "delete", AGENT]).await.code(0);
        wait_containers(spec.name(), 0).await;
        let refused = run(&node, AGENT, "echo", &[]).await;
        assert_eq!(refused.code, Some(5), "{refused:#?}");
        node.stop_cleanly().await;
    }
}

/// A turn with the agent, by which session is of no matter.
async fn said(node: &Node, text: &str) -> String {
    output(&turn(node, AGENT, "s", text).await).to_owned()
}

/// Waits until the call that `count` begins with is on record.
async fn wait_put(node: &Node, submission: &str) {
    wait_for(
        "its first call is on record",
        DOCKER_DEADLINE,
        async || {
            node.cli(&["turn", "get", submission, "-o", "json"])
                .await
                .stdout
        },
        |shown| shown.contains("\"put\""),
    )
    .await;
}

#[tokio::test]
async fn a_turn_outlives_the_death_of_its_container() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    deployed(&node, &image, "").await;
    let old = containers(node.spec().name()).remove(0);
    let args = ["--session", "s", "--submission", "x"];
    let (finished, ()) = tokio::join!(run(&node, AGENT, "count; sleep 1; host", &args), async {
        wait_put(&node, "x").await;
        proc::kill_if_alive(old.pid);
    });
    let finished = finished.code(0).json();
    let (count, host) = output(&finished).split_once(' ').unwrap();
    assert_eq!(
        count, "1",
        "the call made before the kill is not made twice"
    );
    assert!(!old.id.starts_with(host), "it is another container");
    assert_eq!(said(&node, "count").await, "2");
    let left = wait_containers(node.spec().name(), 1).await;
    assert!(left[0].id.starts_with(host));
    node.stop_cleanly().await;
}

/// The worker of containers of a node.
async fn worker(node: &Node) -> Worker {
    let workers = node.workers().await;
    workers
        .into_iter()
        .find(|worker| worker.role == "agent.container")
        .unwrap()
}

#[tokio::test]
async fn containers_outlive_their_worker() {
    let nats = NatsServer::start(CURRENT).await;
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::on(&nats)).await;
    deployed(&node, &image, "replicas = 2").await;
    let before = wait_containers(node.spec().name(), 2).await;
    // Killed between turns: the next worker goes on with them.
    let old = worker(&node).await;
    proc::kill_if_alive(old.pid);
    let old = node.wait_replaced(&old, DOCKER_DEADLINE).await;
    assert_eq!(said(&node, "count").await, "1");
    assert_eq!(said(&node, "count").await, "2");
    let mut adopted = containers(node.spec().name());
    adopted.sort_by_key(|container| !before.contains(container));
    assert_eq!(adopted.len(), 2, "{before:#?} {adopted:#?}");
    assert!(
        adopted.iter().all(|container| before.contains(container)),
        "{before:#?} {adopted:#?}"
    );
    // Killed in a turn: the turn ends once, and the container that had it is another one.
    let args = ["--session", "s", "--submission", "x"];
    let (finished, ()) = tokio::join!(run(&node, AGENT, "count; sleep 1; host", &args), async {
        wait_put(&node, "x").await;
        proc::kill_if_alive(old.pid);
    });
    let finished = finished.code(0).json();
    assert!(output(&finished).starts_with("3 "), "{finished:#}");
    assert_eq!(said(&node, "count").await, "4");
    let after = wait_for(
        "two containers, one of them new",
        DOCKER_DEADLINE,
        || std::future::ready(containers(node.spec().name())),
        |found| found.len() == 2 && found.iter().filter(|one| before.contains(one)).count() == 1,
    )
    .await;
    println!("{before:#?} {after:#?}");
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.stop_cleanly().await;
    wait_containers_of_none(&before).await;
}

async fn wait_containers_of_none(gone: &[Container]) {
    for container in gone {
        let id = container.id.clone();
        wait_for(
            "a stopped node leaves no container",
            DOCKER_DEADLINE,
            || std::future::ready(docker(&["ps", "-aq", "--filter", &format!("id={id}")])),
            |found| found.is_empty(),
        )
        .await;
    }
}

#[tokio::test]
async fn containers_outlive_the_daemon() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    deployed(&node, &image, "").await;
    assert_eq!(said(&node, "count").await, "1");
    let before = containers(node.spec().name());
    let spec = node.kill9().await;
    assert_eq!(containers(spec.name()), before, "they go on without it");
    let node = spec.start().await;
    assert_eq!(said(&node, "count").await, "2");
    assert_eq!(containers(spec.name()), before, "adopted, not doubled");
    // While it is away the agent is deleted in the log by nobody, but somebody makes the container old.
    node.cli(&["agent", "delete", AGENT]).await.code(0);
    wait_containers(spec.name(), 0).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn an_agent_out_of_memory_is_told_so() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    deployed(&node, &image, "[resources]\nmemory = \"64MiB\"").await;
    let failed = run(&node, AGENT, "count; eat 200", &["--session", "s"]).await;
    assert_eq!(failed.code, Some(6), "{failed:#?}");
    let told = format!("{} {}", failed.stdout, failed.stderr);
    assert!(
        told.contains("out of memory") && told.contains("64 MiB"),
        "{told}"
    );
    assert_eq!(said(&node, "count; eat 20").await, "1 20");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn what_is_wrong_with_an_image_is_told_at_deploy() {
    let image = Image::agent();
    let exits = Image::with(&["CMD [\"/agent\", \"exit\"]"]);
    let mute = Image::with(&["CMD [\"/agent\", \"mute\"]"]);
    let empty = Image::with(&[]);
    let absent = Image::with(&["CMD [\"/nothing\"]"]);
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    for (name, image, words) in [
        (
            "missing",
            "vlinder-no-such-image:7",
            "vlinder-no-such-image:7 does not exist",
        ),
        ("odd", "../../etc passwd", "not the name of an image"),
        ("empty", &empty.name, "neither ENTRYPOINT nor CMD"),
        ("absent", &absent.name, "/nothing"),
        ("exits", &exits.name, "the reason"),
        ("mute", &mute.name, "not ready"),
    ] {
        let path = written(&node, name, image, "").display().to_string();
        let args = [
            "agent",
            "deploy",
            "-p",
            &path,
            "--wait",
            "--wait-timeout",
            "8s",
        ];
        let failed = node.cli(&args).await;
        println!(
            "{name}: {:?} after {:?}: {}",
            failed.code, failed.took, failed.stderr
        );
        assert!(
            matches!(failed.code, Some(3 | 6 | 7)),
            "{name}: {failed:#?}"
        );
        assert!(
            failed.stderr.contains(words),
            "{name}: no {words:?}: {failed:#?}"
        );
        if name == "missing" {
            let shown = node.cli(&["agent", "get", name, "-o", "json"]).await.stdout;
            assert!(shown.contains("does not exist"), "{shown}");
        }
        node.cli(&["agent", "delete", name]).await.code(0);
    }
    wait_containers(node.spec().name(), 0).await;
    for (lines, words) in [
        ("[resources]\nmemory = \"much\"", "resources.memory"),
        ("[resources]\nmemory = \"1MiB\"", "resources.memory"),
        ("[resources]\ncpus = 0.0", "resources.cpus"),
        ("[resources]\npids = 0", "resources.pids"),
        (
            "[requirements]\negress = [\"http://example.com\"]",
            "requirements.egress",
        ),
        (
            "[requirements.mounts.data]\ns3 = \"b\"\npath = \"/data\"",
            "requirements.mounts",
        ),
        ("replicas = 1000", "replicas"),
    ] {
        let path = written(&node, AGENT, &image.name, lines)
            .display()
            .to_string();
        let refused = node.cli(&["agent", "deploy", "-p", &path]).await;
        assert!(matches!(refused.code, Some(2 | 9)), "{lines}: {refused:#?}");
        assert!(refused.stderr.contains(words), "{lines}: {refused:#?}");
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn an_agent_that_hangs_is_replaced() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    deployed(&node, &image, "timeout = \"3s\"").await;
    let before = containers(node.spec().name());
    let failed = run(&node, AGENT, "count; sleep 1000", &[]).await;
    assert_eq!(failed.code, Some(7), "{failed:#?}");
    assert_eq!(said(&node, "count").await, "1");
    let after = wait_containers(node.spec().name(), 1).await;
    assert_ne!(before[0].id, after[0].id);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn an_agent_reaches_nothing_but_the_bridge() {
    let nats = NatsServer::start(CURRENT).await;
    // Something of the operator's own that listens everywhere.
    let open = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let open = open.local_addr().unwrap().port();
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::on(&nats)).await;
    deployed(&node, &image, "").await;
    let other = written(&node, "other", &image.name, "");
    deploy(&node, &other).await;
    let port = |address: String| address.rsplit(':').next().unwrap().to_owned();
    let grpc = port(node.address("harness"));
    let http = port(node.address("http"));
    let broker = port(nats.url());
    let mut tried = vec!["1.1.1.1:443".to_owned(), "169.254.169.254:80".to_owned()];
    // This machine, by every address that it has.
    for address in ["127.0.0.1", "172.17.0.1", "192.168.1.1", "10.0.0.1"]
        .into_iter()
        .map(str::to_owned)
        .chain(own_addresses())
    {
        for port in [&open.to_string(), &grpc, &http, &broker] {
            tried.push(format!("{address}:{port}"));
        }
    }
    for target in tried {
        let outcome = said(&node, &format!("tcp {target}")).await;
        assert!(
            ["NetworkUnreachable", "ConnectionRefused", "HostUnreachable"]
                .contains(&outcome.as_str()),
            "{target}: {outcome}"
        );
        let outcome = said(&node, &format!("udp {target}")).await;
        assert!(
            outcome != "sent" || target.starts_with("127."),
            "{target}: {outcome}"
        );
    }
    assert_eq!(said(&node, "name example.com").await, "NoName");
    assert_eq!(said(&node, "list /sys/class/net").await, "lo");
    // The other agent serves on the same port of its own network, not of ours: what answers here is ourselves.
    turn(&node, "other", "o", "count").await;
    let own = said(&node, "host; get 127.0.0.1:8080/health").await;
    assert!(own.ends_with("200 ok"), "{own}");
    // What leads out is closed from inside.
    for path in [
        "/var/run/docker.sock",
        "/run/docker.sock",
        "/run/vlinder/nats.sock",
    ] {
        assert_eq!(said(&node, &format!("unix {path}")).await, "NotFound");
    }
    // The line to the worker is there, and takes nobody but the first process.
    assert_eq!(
        said(&node, "unix /run/vlinder/bridge.sock; count").await,
        "connected 1"
    );
    assert_eq!(said(&node, "count").await, "2");
    for (asked, answered) in [
        ("write /x", "ReadOnlyFilesystem"),
        ("write /run/vlinder/x", "ReadOnlyFilesystem"),
        ("write /tmp/x", "written"),
        ("write /proc/sys/kernel/hostname", "ReadOnlyFilesystem"),
        ("env PORT", "8080"),
        ("env VLINDER_AGENT", AGENT),
    ] {
        assert_eq!(said(&node, asked).await, answered, "{asked}");
    }
    let status = fs::read_to_string(format!(
        "/proc/{}/status",
        containers(node.spec().name())[0].pid
    ))
    .unwrap();
    for (line, value) in [
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        let found = status
            .lines()
            .find_map(|found| found.strip_prefix(&format!("{line}:")));
        assert_eq!(found.map(str::trim), Some(value), "{status}");
    }
    // A service that the manifest does not name.
    let refused = said(&node, "get ollama.vlinder.local:3544/api/tags").await;
    assert!(refused.starts_with("403 "), "{refused}");
    node.stop_cleanly().await;
}

/// The addresses of this machine's interfaces, loopback excepted.
fn own_addresses() -> Vec<String> {
    let shown = std::process::Command::new("hostname").arg("-I").output();
    let shown = shown.map(|done| String::from_utf8_lossy(&done.stdout).into_owned());
    let all = shown.unwrap_or_default();
    all.split_whitespace()
        .filter(|one| !one.contains(':'))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn an_agent_gets_what_its_manifest_says() {
    let image = Image::with(&[
        "CMD [\"/agent\"]",
        "USER 4321",
        "VOLUME /data",
        "ENV COLOUR=blue",
        "WORKDIR /tmp",
    ]);
    let volumes = docker(&["volume", "ls", "-q"]);
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    let lines = "[resources]\nmemory = \"96MiB\"\ncpus = 0.5\npids = 20\n[prompts]\nsystem = \"Be brief.\\nAlways.\"";
    deployed(&node, &image, lines).await;
    assert_eq!(
        said(&node, "env VLINDER_PROMPT_SYSTEM").await,
        "Be brief.\nAlways."
    );
    assert_eq!(
        said(&node, "env COLOUR; write here; write /data/x").await,
        "blue written written"
    );
    let threads: u32 = said(&node, "threads 100").await.parse().unwrap();
    assert!((5..=20).contains(&threads), "{threads}");
    assert_eq!(said(&node, "count").await, "1");
    let container = containers(node.spec().name()).remove(0);
    let status = fs::read_to_string(format!("/proc/{}/status", container.pid)).unwrap();
    assert!(status.contains("Uid:\t4321\t4321"), "{status}");
    let format = "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.NanoCpus}} {{.HostConfig.NetworkMode}} {{.HostConfig.RestartPolicy.Name}}";
    let limits = docker(&["inspect", "-f", format, &container.id]);
    assert_eq!(limits, "100663296 100663296 500000000 none no");
    assert_eq!(docker(&["volume", "ls", "-q"]), volumes);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn four_containers_serve_four_turns_at_once() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    deployed(&node, &image, "replicas = 4").await;
    wait_for(
        "four replicas",
        DOCKER_DEADLINE,
        async || {
            node.cli(&["agent", "get", AGENT, "-o", "json"])
                .await
                .stdout
        },
        |shown| shown.matches("\"ready\"").count() >= 4,
    )
    .await;
    let began = Instant::now();
    let four = (0..4).map(|_| run(&node, AGENT, "host; sleep 1", &[]));
    let mut hosts = vec![];
    for finished in futures::future::join_all(four).await {
        hosts.push(output(&finished.code(0).json()).to_owned());
    }
    println!("four turns took {:?}", began.elapsed());
    assert!(
        began.elapsed() < Duration::from_millis(3500),
        "{:?}",
        began.elapsed()
    );
    hosts.sort_unstable();
    hosts.dedup();
    assert_eq!(hosts.len(), 4, "{hosts:?}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_redeploy_under_load_fails_no_turn() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    deployed(&node, &image, "replicas = 2").await;
    let first = containers(node.spec().name());
    let done = AtomicBool::new(false);
    let load = async {
        let mut turns = 0;
        while !done.load(Ordering::Relaxed) {
            let three = (0..3).map(|_| run(&node, AGENT, "sleep 0.1; echo well", &[]));
            for finished in futures::future::join_all(three).await {
                assert_eq!(output(&finished.code(0).json()), "well");
                turns += 1;
            }
        }
        turns
    };
    let (turns, ()) = tokio::join!(load, async {
        for version in 1..=3 {
            deployed(
                &node,
                &image,
                &format!("replicas = 2\ntimeout = \"{}s\"", 30 + version),
            )
            .await;
        }
        let old: Vec<_> = first.iter().map(|container| container.id.clone()).collect();
        wait_for(
            "only new containers",
            DOCKER_DEADLINE,
            || std::future::ready(containers(node.spec().name())),
            |found| found.len() == 2 && !found.iter().any(|one| old.contains(&one.id)),
        )
        .await;
        done.store(true, Ordering::Relaxed);
    });
    println!("{turns} turns during three redeployments");
    assert!(turns >= 6);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn twenty_deployments_leave_nothing() {
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    let data = node.spec().data_dir().join("run/containers");
    let seen = || {
        let files = fs::read_dir(&data).map_or(0, |found| found.count());
        // A role's log is opened when it first says something.
        let is_log = |path: &Path| path.extension().is_some_and(|kind| kind == "jsonl");
        let descriptors = fs::read_dir(format!("/proc/{}/fd", node.pid()))
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|path| !is_log(path))
            .count();
        // The tests of compose make and remove theirs at any time.
        let own = |list: String| {
            let lines = list.lines().filter(|name| !name.starts_with("vlt"));
            lines.collect::<Vec<_>>().join("\n")
        };
        (
            own(docker(&["network", "ls", "--format", "{{.Name}}"])),
            own(docker(&["volume", "ls", "--format", "{{.Name}}"])),
            files,
            descriptors,
        )
    };
    let mut before = None;
    for round in 0..20 {
        deployed(&node, &image, "").await;
        assert_eq!(said(&node, "echo well").await, "well");
        node.cli(&["agent", "delete", AGENT]).await.code(0);
        wait_containers(node.spec().name(), 0).await;
        if round == 4 {
            before = Some(seen());
        }
    }
    let before = before.unwrap();
    wait_for(
        "what there was before",
        DOCKER_DEADLINE,
        || std::future::ready(seen()),
        |now| now.0 == before.0 && now.1 == before.1 && now.2 <= before.2 && now.3 <= before.3 + 2,
    )
    .await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_pinned_image_stays_what_it_was() {
    let image = Image::with(&["CMD [\"/agent\"]", "ENV COLOUR=blue"]);
    for (policy, colour) in [("pinned", "blue"), ("mutable", "red")] {
        image.import(&["CMD [\"/agent\"]", "ENV COLOUR=blue"]);
        let spec = NodeSpec::embedded().var("VLINDER_RUNTIME_IMAGE_POLICY", policy);
        let (_cleaned, node) = Cleaned::start(&spec).await;
        deployed(&node, &image, "").await;
        assert_eq!(said(&node, "env COLOUR").await, "blue");
        // The name gets another meaning; then the container dies, and the daemon.
        image.import(&["CMD [\"/agent\"]", "ENV COLOUR=red"]);
        proc::kill_if_alive(containers(node.spec().name())[0].pid);
        assert_eq!(
            said(&node, "count; env COLOUR").await,
            format!("1 {colour}"),
            "{policy}"
        );
        let node = node.stop_cleanly().await.start().await;
        assert_eq!(said(&node, "env COLOUR").await, colour, "{policy}");
        // A new version means what the name means now.
        deployed(&node, &image, "timeout = \"50s\"").await;
        wait_for(
            "the new version",
            DOCKER_DEADLINE,
            async || said(&node, "env COLOUR").await,
            |shown| shown == "red",
        )
        .await;
        node.stop_cleanly().await;
    }
}

/// A server outside, as far as agents are concerned: answers each request with what was asked for.
async fn outside() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let read = stream.read(&mut head).await.unwrap_or(0);
            let line = String::from_utf8_lossy(&head[..read])
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{line}",
                line.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    port
}

#[tokio::test]
async fn the_way_out_leads_where_the_manifest_says_and_is_on_record() {
    let (allowed, refused) = (outside().await, outside().await);
    let image = Image::agent();
    let (_cleaned, node) = Cleaned::start(&NodeSpec::embedded()).await;
    let lines =
        format!("[requirements]\negress = [\"127.0.0.1:{allowed}\", \"localhost:{refused}\"]");
    deployed(&node, &image, &lines).await;
    assert_eq!(
        said(&node, &format!("proxied 127.0.0.1:{allowed}/a")).await,
        "200 GET /a HTTP/1.1"
    );
    assert_eq!(
        said(&node, &format!("tunnel 127.0.0.1:{allowed}/b")).await,
        "200 GET /b HTTP/1.1"
    );
    // Another port, another host; and a name, though listed, must not lead to this machine.
    assert_eq!(
        said(&node, &format!("tunnel 127.0.0.1:{refused}/")).await,
        "403"
    );
    assert_eq!(said(&node, "tunnel 1.1.1.1:443/").await, "403");
    assert!(
        said(&node, "proxied example.com/")
            .await
            .starts_with("403 ")
    );
    assert_eq!(
        said(&node, &format!("tunnel localhost:{refused}/")).await,
        "502"
    );
    // Without the proxy there is no way at all.
    assert_eq!(
        said(&node, &format!("tcp 127.0.0.1:{allowed}")).await,
        "ConnectionRefused"
    );
    let session = node
        .cli(&["session", "get", "s", "--full", "-o", "json"])
        .await
        .code(0)
        .json();
    let turns = session["turns"].as_array().unwrap();
    let calls: Vec<_> = turns
        .iter()
        .flat_map(|turn| turn["calls"].as_array().unwrap())
        .collect();
    let egress: Vec<_> = calls
        .iter()
        .filter(|call| call["service"] == "egress")
        .collect();
    assert_eq!(egress.len(), 6, "{session:#}");
    let failed = egress.iter().filter(|call| call["status"] != "ok").count();
    assert_eq!(failed, 3, "{session:#}");
    assert!(session.to_string().contains("example.com"), "{session:#}");
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.stop_cleanly().await;
}

/// A socket that leads to Docker's, until it is dropped.
fn lead(path: &std::path::Path) -> tokio::task::JoinHandle<()> {
    let _ = fs::remove_file(path);
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        let mut open = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            open.spawn(async move {
                let mut docker = tokio::net::UnixStream::connect("/var/run/docker.sock").await?;
                tokio::io::copy_bidirectional(&mut stream, &mut docker).await
            });
        }
    })
}

#[tokio::test]
async fn the_role_waits_for_docker_and_comes_to_life() {
    let image = Image::agent();
    let spec = NodeSpec::embedded();
    let socket = spec.home().join("docker.sock");
    let spec = spec.var("VLINDER_RUNTIME_DOCKER_HOST", socket.display());
    let (_cleaned, node) = Cleaned::start(&spec).await;
    let state = |wanted: &'static str| {
        node.wait_workers(wanted, DOCKER_DEADLINE, move |workers| {
            let container = workers
                .iter()
                .find(|worker| worker.role == "agent.container");
            container.is_some_and(|worker| worker.state == wanted)
        })
    };
    state("waiting").await;
    let waiting = worker(&node).await;
    assert!(waiting.reason.starts_with("no Docker: "), "{waiting:?}");
    // Deployed all the same: it runs as soon as there is Docker.
    let path = written(&node, AGENT, &image.name, "").display().to_string();
    node.cli(&["agent", "deploy", "-p", &path]).await.code(0);
    let docker = lead(&socket);
    state("ready").await;
    assert_eq!(said(&node, "count").await, "1");
    let before = containers(spec.name());
    // It goes away, and agents that run go on.
    docker.abort();
    let _ = docker.await;
    state("waiting").await;
    assert_eq!(said(&node, "count").await, "2");
    let docker = lead(&socket);
    state("ready").await;
    assert_eq!(said(&node, "count").await, "3");
    assert_eq!(containers(spec.name()), before);
    node.stop_cleanly().await;
    wait_containers(spec.name(), 0).await;
    docker.abort();
}

//! What the child processes of these tests do. The tests here are ignored: they are entry points.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use vlinder_supervisor::control::{
    self, ControlEvent, ControlEvents, ControlHandle, Start, WorkerFailure,
};

#[test]
#[ignore = "entry point of the worker processes that other tests start"]
fn worker() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let code = runtime.block_on(async {
        let (start, handle, events) = match control::connect_from_fd().await {
            Ok(connected) => connected,
            Err(error) => {
                eprintln!("{error}");
                return 64;
            }
        };
        match work(start, handle, events).await {
            Ok(()) => 0,
            Err(failure) => {
                eprintln!("{failure}");
                failure.exit_code()
            }
        }
    });
    std::process::exit(code.into());
}

#[test]
#[ignore = "entry point of a worker process that never opens its control channel"]
fn deaf() {
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
#[ignore = "entry point of the box: its arguments follow the word `box`"]
fn boxed() {
    let args = std::env::args_os().skip_while(|arg| arg != "box").skip(1);
    // The test harness takes `--fd` for its own; it is handed over without the dashes.
    let args = args.map(|arg| if arg == "fd" { "--fd".into() } else { arg });
    std::process::exit(vlinder_supervisor::boxed::exit_code(args).into());
}

/// The same for processes and tasks.
pub async fn work(
    mut start: Start,
    handle: ControlHandle,
    mut events: ControlEvents,
) -> Result<(), WorkerFailure> {
    let config = start.config.clone();
    let text = |name: &str| config[name].as_str().unwrap_or_default().to_owned();
    let list = |name: &str| -> Vec<String> {
        let items = config[name].as_array().into_iter().flatten();
        items
            .map(|item| item.as_str().unwrap().to_owned())
            .collect()
    };
    handle.note("incarnation", start.incarnation.to_string());
    handle.held(list("hold").iter().map(String::as_str));
    for token in list("release") {
        handle.released(&token);
    }
    match text("does").as_str() {
        "wait" => handle.waiting("no Ollama"),
        "fail" => return Err(WorkerFailure::Failed("it did not work".into())),
        "misconfigured" => return Err(WorkerFailure::Configuration("no such key".into())),
        "panic" => panic!("boom"),
        "die after ready" => {
            handle.ready(BTreeMap::new());
            tokio::task::yield_now().await;
            return Err(WorkerFailure::Failed("short life".into()));
        }
        "block" => {
            handle.ready(BTreeMap::new());
            std::thread::sleep(Duration::from_secs(600));
        }
        "spin" => loop {
            std::hint::spin_loop();
        },
        "burn" => println!("burn the sink"),
        "grow" => {
            let hoard: Vec<u8> = vec![1; 200 * 1024 * 1024];
            println!("took {} bytes", hoard.len());
        }
        "rubbish" => {
            let fd = unsafe { BorrowedFd::borrow_raw(control::CONTROL_FD) };
            rustix::io::write(fd, b"\xff\xff\xff\xffhello").unwrap();
        }
        "flood" => {
            let mut out = std::io::stdout().lock();
            for n in 0..50_000 {
                writeln!(out, "line {n}").unwrap();
            }
            out.write_all(&vec![b'x'; 1024 * 1024]).unwrap();
            writeln!(out).unwrap();
            drop(out);
            handle.ready(BTreeMap::new());
        }
        "answer" => return answer(&mut start, &handle, events).await,
        "descend" => descend(&handle),
        _ => handle.ready(BTreeMap::from([(
            "http".to_owned(),
            "127.0.0.1:1".to_owned(),
        )])),
    }
    // A task's sleep must not keep a runtime with a paused clock busy: it has no deadline.
    loop {
        match events.next().await {
            ControlEvent::Reload(config) => handle.note("config", config.to_string()),
            ControlEvent::Drain if config["deaf"] == Value::Bool(true) => {}
            ControlEvent::Drain => break,
        }
    }
    let drain_ms = config["drain_ms"].as_u64().unwrap_or(0);
    tokio::time::sleep(Duration::from_millis(drain_ms)).await;
    for token in list("hold") {
        handle.released(&token);
    }
    println!("finished");
    Ok(())
}

/// Serves the inherited listener: each client is told the process id, after `answer_ms`.
async fn answer(
    start: &mut Start,
    handle: &ControlHandle,
    mut events: ControlEvents,
) -> Result<(), WorkerFailure> {
    let listener = start
        .take_listener("http")
        .expect("the plan has this listener");
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    handle.ready(BTreeMap::from([("http".to_owned(), address)]));
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut client, _) = accepted.unwrap();
                let reply = format!("{} {}\n", std::process::id(), start.incarnation);
                // A client that is gone is its own affair.
                let _ = client.write_all(reply.as_bytes()).await;
            }
            event = events.next() => if event == ControlEvent::Drain { return Ok(()) },
        }
    }
}

#[expect(
    clippy::zombie_processes,
    reason = "leaving them to others is the point"
)]
/// Leaves a child in its own group, one that left the group, and one in a box.
fn descend(handle: &ControlHandle) {
    let near = Command::new("sleep").arg("600").spawn().unwrap();
    let far = Command::new("sleep")
        .arg("600")
        .process_group(0)
        .spawn()
        .unwrap();
    let mut boxed = Command::new(std::env::current_exe().unwrap())
        .args([
            "entry::boxed",
            "--exact",
            "--ignored",
            "--nocapture",
            "box",
            "fd",
            "0",
            "--",
        ])
        .args([
            "sh",
            "-c",
            "sleep 600 & setsid sleep 600 & echo all there; wait",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(boxed.stdout.take().unwrap());
    assert!(output.lines().any(|line| line.unwrap() == "all there"));
    handle.note("near", near.id().to_string());
    handle.note("far", far.id().to_string());
    handle.note("box", boxed.id().to_string());
    // The write end of the box's pipe stays open as long as this process lives.
    std::mem::forget(boxed);
    handle.ready(BTreeMap::new());
}

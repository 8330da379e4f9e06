//! The daemon: build everything, run, drain.

use crate::listeners::{self, Listeners};
use crate::logs::{self, LogWriter};
use crate::node::{self, GiveBack, NodeFace, Reload};
use crate::{EXIT_OK, EXIT_OTHER, EXIT_START_DEADLINE, EXIT_UNREACHABLE, bus, http, plan};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use vlinder_config::{Config, Loaded, QueueBackend};
use vlinder_core::{Namespace, WorkerRole};
use vlinder_services::auth::Gate;
use vlinder_supervisor::{Deps, NodeStatus, Options, Supervisor, watchdog};
use vlinder_worker::cx::NoControl;
use vlinder_worker::{WorkerCx, WorkerId};

/// How long the daemon tries to reach its bus before it gives up with exit 3.
const BUS_DEADLINE: Duration = Duration::from_secs(5);
/// Log lines that wait for the bus.
const LIVE_LINES_MAX: usize = 1024;
/// The embedded runtime may stand still for so long before the process starts anew.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// Below `run`: holds the process id of a daemon that has come up.
const READY_FILE: &str = "ready";

/// Why the daemon did not start.
struct StartError {
    code: u8,
    text: String,
}

impl StartError {
    fn other(text: impl ToString) -> Self {
        Self {
            code: EXIT_OTHER,
            text: text.to_string(),
        }
    }
}

/// Runs this node until it is told to stop; returns the exit code.
pub fn run(loaded: Loaded, reload: Reload) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start a runtime: {error}");
            return EXIT_OTHER;
        }
    };
    let code = runtime.block_on(async {
        match start(loaded, reload).await {
            Ok(code) => code,
            Err(error) => {
                eprintln!("vlinderd: {}", error.text);
                error.code
            }
        }
    });
    runtime.shutdown_background();
    code
}

async fn start(mut loaded: Loaded, reload: Reload) -> Result<u8, StartError> {
    let began = Instant::now();
    let data_dir = loaded.data_dir.clone();
    make_private(&data_dir.join("run")).map_err(|error| {
        StartError::other(format!(
            "cannot make the data directory {}: {error}",
            data_dir.display()
        ))
    })?;
    let _lock = lock(&data_dir)?;
    // Of an earlier daemon, whose process id may be ours by now.
    let ready = data_dir.join("run").join(READY_FILE);
    let _ = std::fs::remove_file(&ready);
    let token = vlinder_config::settle_token(&data_dir, loaded.config.auth.token.as_ref())
        .map_err(StartError::other)?;
    loaded.config.auth.token = Some(token.clone());
    let token = token.expose().to_owned();
    let config = Arc::new(loaded.config);
    let (live, live_lines) = mpsc::channel(LIVE_LINES_MAX);
    let writer = LogWriter::start(&data_dir, &config, live).map_err(|error| {
        StartError::other(format!(
            "cannot write logs below {}: {error}",
            data_dir.display()
        ))
    })?;
    logs::init_daemon(&config, writer.clone());
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let listeners = Arc::new(listeners::bind(&config).map_err(StartError::other)?);
    let opened = open_bus(&config, &data_dir).await?;
    let bus = opened.bus.clone();

    let tasks = config.queue.backend == QueueBackend::Local;
    let _watchdog = tasks
        .then(|| watch_for_stalls(&data_dir))
        .transpose()
        .map_err(StartError::other)?;
    let first_plan = plan::plan(&config, None, &data_dir, &token, &listeners, &bus);
    let options = Options {
        node: config.node.name.to_string(),
        plan: first_plan,
        start_order: node::start_order(),
        drain_order: node::drain_order(),
        policy: plan::policy(&config),
        adopt_orphans: !tasks,
        seed: rand::random(),
    };
    let deps = Deps {
        held: Arc::new(GiveBack { bus: bus.clone() }),
        log: Arc::new(writer),
    };
    let (supervisor, handle) = Supervisor::new(options, deps).map_err(StartError::other)?;
    let replan = {
        let (data_dir, token, listeners, bus) = (
            data_dir.clone(),
            token.clone(),
            listeners.clone(),
            bus.clone(),
        );
        Box::new(move |config: &Arc<Config>, before: &Config| {
            if listeners.add_missing(config)? {
                write_addresses(&listeners, &data_dir).map_err(|error| error.text)?;
            }
            let before = Some(before);
            Ok(plan::plan(
                config, before, &data_dir, &token, &listeners, &bus,
            ))
        })
    };
    let face = Arc::new(NodeFace {
        bus: bus.clone(),
        supervisor: handle.clone(),
        config: watch::Sender::new(config.clone()),
        incarnation: format!("{:016x}", rand::random::<u64>()),
        started_at_ms: node::now_ms(),
        reload,
        plan: replan,
    });
    let stop = CancellationToken::new();
    let id = WorkerId {
        node: config.node.name.clone(),
        role: WorkerRole::Infra,
        index: 0,
    };
    let cx = WorkerCx::new(
        id,
        bus.clone(),
        Namespace::default_ns(),
        data_dir.clone().into(),
        Arc::new(NoControl),
        stop.clone(),
    );
    write_addresses(&listeners, &data_dir)?;
    say_where(&config, &data_dir, &listeners, began);

    let side = run_side(
        face.clone(),
        cx,
        listeners.clone(),
        Gate::new(&token),
        live_lines,
        say_when_ready(handle.status(), ready.clone(), began),
    );
    let running = supervisor.run();
    let report = tokio::select! {
        report = running => report,
        reason = opened.failed() => {
            return Err(StartError::other(format!("the embedded log failed and nothing more is accepted: {reason}; start again when that is mended")));
        }
        () = side => return Err(StartError::other("a part of the daemon ended that never should")),
    };
    face.report_leaving().await;
    stop.cancel();
    bus.close().await;
    let _ = vlinder_config::NodeAddresses::remove(&data_dir);
    let _ = std::fs::remove_file(&ready);
    if report.is_clean() {
        tracing::info!("stopped");
    } else {
        tracing::warn!(
            killed = report.killed,
            left = report.left,
            "stopped, but not everybody finished in time"
        );
    }
    Ok(EXIT_OK)
}

/// Everything beside the supervisor's loop; never returns.
async fn run_side(
    face: Arc<NodeFace>,
    cx: WorkerCx,
    listeners: Arc<Listeners>,
    gate: Gate,
    live_lines: mpsc::Receiver<(WorkerRole, vlinder_worker::logs::LogRecord)>,
    ready: impl Future<Output = ()>,
) {
    let node = face.config.borrow().node.name.clone();
    let http = http::serve(face.clone(), cx.clone(), &listeners, gate);
    // Each of these goes on for ever or logs why it gave up.
    let forever = async {
        tokio::join!(
            face.keep_reporting(),
            face.follow_orders(cx),
            face.follow_signals(node),
            node::send_logs(face.bus.clone(), live_lines),
            http,
            ready,
            obey_signals(&face),
        )
    };
    forever.await;
    std::future::pending::<()>().await;
}

async fn open_bus(config: &Config, data_dir: &Path) -> Result<bus::Opened, StartError> {
    use vlinder_bus::Error;
    bus::open(config, data_dir, BUS_DEADLINE).await.map_err(|error| {
        let code = match &error {
            Error::Unreachable { .. } | Error::Unfit { .. } | Error::Timeout { .. } => EXIT_UNREACHABLE,
            _ => EXIT_OTHER,
        };
        let hint = match &error {
            Error::Unreachable { .. } => "; is nats-server running there? `vlinderd doctor` looks, and without queue.nats_url no NATS is needed",
            _ => "",
        };
        StartError { code, text: format!("{error}{hint}") }
    })
}

fn write_addresses(listeners: &Listeners, data_dir: &Path) -> Result<(), StartError> {
    let written = listeners.addresses().write(data_dir);
    written.map_err(|error| StartError::other(format!("cannot write run/addresses.json: {error}")))
}

/// Makes a directory that only its user may enter: everything below it is what people said.
fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Holds the data directory for the life of the process.
fn lock(data_dir: &Path) -> Result<File, StartError> {
    let path = data_dir.join("run").join("vlinderd.pid");
    let io = |error: std::io::Error| {
        StartError::other(format!("cannot use {}: {error}", path.display()))
    };
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io)?;
    if file.try_lock().is_err() {
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        let holder = holder.trim();
        return Err(StartError::other(format!(
            "the data directory {} is in use by another vlinderd (pid {holder}); stop it, or choose another directory with --data-dir",
            data_dir.display()
        )));
    }
    file.set_len(0).map_err(io)?;
    file.rewind().map_err(io)?;
    write!(file, "{}", std::process::id()).map_err(io)?;
    Ok(file)
}

/// In embedded mode nothing can kill a worker that blocks the one thread: the process starts anew.
fn watch_for_stalls(data_dir: &Path) -> Result<watchdog::Watchdog, vlinder_supervisor::Error> {
    let note = data_dir.join("run").join("last-stall");
    watchdog::spawn(&tokio::runtime::Handle::current(), STALL_LIMIT, move || {
        let _ = std::fs::write(
            &note,
            format!(
                "{} the runtime stood still for 10 s; restarted\n",
                node::now_ms()
            ),
        );
        eprintln!("vlinderd: a task blocks the runtime for 10 s; starting anew");
        use std::os::unix::process::CommandExt;
        // Same process id, same arguments; sockets and locks are closed on exec.
        let error = Command::new(crate::roles::own_command())
            .args(std::env::args_os().skip(1))
            .exec();
        eprintln!("vlinderd: cannot start anew: {error}");
        std::process::abort();
    })
}

fn say_where(config: &Config, data_dir: &Path, listeners: &Listeners, began: Instant) {
    let bus = match config.queue.backend {
        QueueBackend::Local => format!("embedded ({})", data_dir.join("bus.db").display()),
        QueueBackend::Nats => {
            let urls: Vec<String> = config
                .queue
                .nats_url
                .iter()
                .map(ToString::to_string)
                .collect();
            urls.join(",")
        }
    };
    tracing::info!(
        "vlinderd {} on node {}, data in {}",
        env!("CARGO_PKG_VERSION"),
        config.node.name,
        data_dir.display()
    );
    tracing::info!("bus: {bus}");
    let service = |name: &str, url: Option<&url::Url>| {
        if let Some(url) = url {
            tracing::info!("{name}: {url}");
        }
    };
    let addresses = listeners.addresses();
    service("harness", addresses.harness.as_ref());
    service("registry", addresses.registry.as_ref());
    service("http", addresses.http.as_ref());
    let from = data_dir.join("run").join("token");
    let from = if from.exists() {
        format!("token in {}", from.display())
    } else {
        "configured token".to_owned()
    };
    tracing::info!("authentication: on ({from})");
    tracing::debug!("built in {} ms", began.elapsed().as_millis());
}

async fn say_when_ready(
    mut status: watch::Receiver<Arc<NodeStatus>>,
    ready: PathBuf,
    began: Instant,
) {
    if status.wait_for(|now| now.is_up()).await.is_ok() {
        if let Err(error) = std::fs::write(&ready, std::process::id().to_string()) {
            tracing::warn!(%error, "cannot write {}", ready.display());
        }
        tracing::info!("ready after {} ms", began.elapsed().as_millis());
        let workers = status.borrow().workers.clone();
        for worker in workers
            .iter()
            .filter(|worker| worker.state.as_str() == "waiting")
        {
            tracing::info!(
                "{} waits: {}",
                worker.key,
                worker.reason.as_deref().unwrap_or_default()
            );
        }
    }
}

/// TERM and INT drain, a second one ends now, HUP loads the configuration again.
async fn obey_signals(face: &NodeFace) {
    let signals = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::hangup()),
    );
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = signals else {
        return tracing::error!("signals cannot be caught");
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {
                face.reload().await;
                continue;
            }
        }
        tracing::info!("draining: no new work, running work finishes; a second signal ends it now");
        let within = face.config.borrow().supervisor.drain_deadline;
        if face.supervisor.drain(within).await.is_err() {
            return;
        }
    }
}

/// Starts the daemon in the background and waits until it is ready. Returns 0 then, else the exit code of
/// the failed start, or 4 when the start deadline passed.
pub fn detach(loaded: &Loaded) -> u8 {
    let log = loaded.data_dir.join("logs").join("vlinderd.out");
    let opened = make_private(&loaded.data_dir.join("logs"))
        .and_then(|()| File::options().create(true).append(true).open(&log));
    let output = match opened {
        Ok(file) => file,
        Err(error) => {
            eprintln!("vlinderd: cannot write {}: {error}", log.display());
            return EXIT_OTHER;
        }
    };
    let arguments = std::env::args_os()
        .skip(1)
        .filter(|argument| argument != "--detach");
    let mut command = Command::new(crate::roles::own_command());
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(output));
    use std::os::unix::process::CommandExt;
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into));
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("vlinderd: cannot start in the background: {error}");
            return EXIT_OTHER;
        }
    };
    let ready = loaded.data_dir.join("run").join(READY_FILE);
    let deadline = Instant::now() + loaded.config.supervisor.start_deadline;
    let pid = child.id().to_string();
    while Instant::now() < deadline {
        if std::fs::read_to_string(&ready).is_ok_and(|text| text.trim() == pid) {
            println!("vlinderd runs (pid {pid}), log in {}", log.display());
            return EXIT_OK;
        }
        match child.try_wait() {
            Ok(Some(status)) => {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                let last: Vec<&str> = text.lines().rev().take(5).collect();
                for line in last.iter().rev() {
                    eprintln!("{line}");
                }
                return status
                    .code()
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(EXIT_OTHER);
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                eprintln!("vlinderd: cannot wait for the background process: {error}");
                return EXIT_OTHER;
            }
        }
    }
    eprintln!(
        "vlinderd: not ready within the start deadline; it goes on (pid {pid}), log in {}",
        log.display()
    );
    EXIT_START_DEADLINE
}

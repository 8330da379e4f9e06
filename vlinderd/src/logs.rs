//! Logs: for people on stderr, for programs as JSON lines in `logs/`, and live on the bus.
//!
//! Everything is written by one thread behind a bounded queue, so that no loop ever waits for a
//! disk or a terminal; what does not fit is dropped and counted, and the count is logged.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};
use vlinder_config::{Config, LogFormat};
use vlinder_core::WorkerRole;
use vlinder_supervisor::{LogLine, LogSink};
use vlinder_worker::logs::{LogRecord, role_file};

/// Lines that wait for the writer.
const QUEUE_MAX: usize = 8192;
/// A log file is moved aside at this size, in bytes; one older file is kept.
const FILE_BYTES_MAX: u64 = 32 * 1024 * 1024;

type Reload = reload::Handle<EnvFilter, tracing_subscriber::Registry>;
static LEVEL: OnceLock<Reload> = OnceLock::new();

/// What the writer thread writes.
enum Line {
    /// Of a role's worker; goes to its file and to the bus.
    Worker(WorkerRole, LogRecord),
    /// Of the daemon itself.
    Daemon(LogRecord),
}

/// Hands lines to the writer thread. Cheap to clone.
#[derive(Clone)]
pub struct LogWriter {
    lines: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
    node: Arc<str>,
    json: bool,
}

/// Where live lines go: a bounded queue that a task of the daemon empties onto the bus.
pub type Live = tokio::sync::mpsc::Sender<(WorkerRole, LogRecord)>;

impl LogWriter {
    /// Starts the writer thread. `live` takes what is to be seen from other machines.
    pub fn start(data_dir: &Path, config: &Config, live: Live) -> std::io::Result<Self> {
        let dir = data_dir.join("logs");
        std::fs::create_dir_all(&dir)?;
        let (lines, queue) = sync_channel(QUEUE_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let (data_dir, count) = (data_dir.to_owned(), dropped.clone());
        std::thread::Builder::new()
            .name("logs".to_owned())
            .spawn(move || write_lines(&queue, &data_dir, &live, &count))?;
        let json = config.logging.format == LogFormat::Json;
        Ok(Self {
            lines,
            dropped,
            node: config.node.name.as_str().into(),
            json,
        })
    }

    fn hand(&self, line: Line) {
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn record(&self, source: String, line: String) -> LogRecord {
        LogRecord {
            time_ms: now_ms(),
            node: self.node.to_string(),
            source,
            line,
        }
    }
}

impl LogSink for LogWriter {
    fn line(&self, line: LogLine<'_>) {
        let source = format!("{}/{}", line.worker.role, line.worker.index);
        let record = self.record(source, line.text.to_owned());
        to_stderr(&record, self.json);
        self.hand(Line::Worker(line.worker.role, record));
    }
}

fn to_stderr(record: &LogRecord, json: bool) {
    let text = if json {
        serde_json::to_string(record).unwrap_or_default()
    } else {
        format!("[{}] {}", record.source, record.line)
    };
    // A closed stderr is no reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

fn write_lines(queue: &Receiver<Line>, data_dir: &Path, live: &Live, dropped: &AtomicU64) {
    let mut files: std::collections::HashMap<PathBuf, (File, u64)> =
        std::collections::HashMap::new();
    while let Ok(line) = queue.recv() {
        let (path, record) = match line {
            Line::Worker(role, record) => {
                let _ = live.try_send((role, record.clone()));
                (role_file(data_dir, role), record)
            }
            Line::Daemon(record) => (data_dir.join("logs").join("vlinderd.jsonl"), record),
        };
        let mut text = serde_json::to_string(&record).unwrap_or_default();
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = write!(
                text,
                "\n{{\"time_ms\":{},\"line\":\"{lost} log lines were dropped: the disk is too slow\"}}",
                now_ms()
            );
        }
        text.push('\n');
        if append(&mut files, &path, text.as_bytes()).is_err() {
            // The disk is full or gone; stderr still has the line.
            files.remove(&path);
        }
    }
}

fn append(
    files: &mut std::collections::HashMap<PathBuf, (File, u64)>,
    path: &Path,
    text: &[u8],
) -> std::io::Result<()> {
    let too_long = files
        .get(path)
        .is_some_and(|(_, len)| *len >= FILE_BYTES_MAX);
    if too_long {
        files.remove(path);
        std::fs::rename(path, path.with_extension("1.jsonl"))?;
    }
    if !files.contains_key(path) {
        let file = File::options().create(true).append(true).open(path)?;
        let len = file.metadata()?.len();
        files.insert(path.to_owned(), (file, len));
    }
    if let Some((file, len)) = files.get_mut(path) {
        file.write_all(text)?;
        *len += text.len() as u64;
    }
    Ok(())
}

/// Sets up the daemon's own logging: stderr, `logs/vlinderd.jsonl`, and in embedded mode the files
/// of the roles.
pub fn init_daemon(config: &Config, writer: LogWriter) {
    let (filter, handle) = reload::Layer::new(filter_of(config));
    let _ = LEVEL.set(handle);
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(stderr_layer(config))
        .with(ToFiles(writer))
        .try_init();
}

/// Sets up a worker process's logging: plain lines on stderr, which the daemon takes.
pub fn init_worker(config: &Config) {
    let (filter, handle) = reload::Layer::new(filter_of(config));
    let _ = LEVEL.set(handle);
    let plain = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time();
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(plain)
        .try_init();
}

/// Takes over a changed level.
pub fn set_level(config: &Config) {
    if let Some(handle) = LEVEL.get() {
        let _ = handle.reload(filter_of(config));
    }
}

fn filter_of(config: &Config) -> EnvFilter {
    let level = config.logging.level.as_str();
    let wanted = config.logging.rust_log.clone();
    let text = wanted.unwrap_or_else(|| {
        format!("{level},async_nats=warn,hyper=warn,h2=warn,tower=warn,reqwest=warn")
    });
    EnvFilter::try_new(&text).unwrap_or_else(|_| EnvFilter::new("info"))
}

fn stderr_layer<S>(config: &Config) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match config.logging.format {
        LogFormat::Json => layer.json().boxed(),
        LogFormat::Text => layer
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_target(false)
            .boxed(),
    }
}

/// Writes events to the file of the worker whose span they are in, or to the daemon's.
struct ToFiles(LogWriter);

/// The worker that a span belongs to.
struct Owner(WorkerRole, u64);

#[derive(Default)]
struct Text {
    message: String,
    role: Option<String>,
    index: u64,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let blank = if self.message.is_empty() { "" } else { " " };
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.message, "{blank}{name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "role" {
            self.role = Some(value.to_owned());
        }
        self.record_debug(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "index" {
            self.index = value;
        }
        self.record_debug(field, &value);
    }
}

impl<S> Layer<S> for ToFiles
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(
        &self,
        attributes: &tracing::span::Attributes<'_>,
        id: &tracing::Id,
        cx: Context<'_, S>,
    ) {
        if attributes.metadata().name() != "worker" {
            return;
        }
        let mut text = Text::default();
        attributes.record(&mut text);
        let role = text.role.and_then(|role| role.parse().ok());
        if let (Some(role), Some(span)) = (role, cx.span(id)) {
            span.extensions_mut().insert(Owner(role, text.index));
        }
    }

    fn on_event(&self, event: &tracing::Event<'_>, cx: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = format!("{} {}", event.metadata().level(), text.message);
        let owner = cx.event_scope(event).and_then(|scope| {
            scope.from_root().find_map(|span| {
                span.extensions()
                    .get::<Owner>()
                    .map(|owner| (owner.0, owner.1))
            })
        });
        let line = match owner {
            Some((role, index)) => {
                Line::Worker(role, self.0.record(format!("{role}/{index}"), line))
            }
            None => Line::Daemon(self.0.record("vlinderd".to_owned(), line)),
        };
        self.0.hand(line);
    }
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64
}

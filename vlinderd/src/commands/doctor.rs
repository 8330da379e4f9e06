//! `vlinderd doctor`: what this machine has and lacks. One line for each thing, with cause and remedy.
//!
//! A *problem* keeps this node from doing what its configuration asks for; a *note* is something that
//! is missing but not needed, or worth knowing. Every look has a deadline; all run at once.

use crate::args::DoctorFormat;
use crate::bus;
use serde::Serialize;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use vlinder_config::{Config, Loaded, QueueBackend, Service};
use vlinder_core::WorkerRole;

/// Longest look at one thing.
const LOOK_DEADLINE: Duration = Duration::from_secs(4);
/// Below so much free disk the embedded log refuses new work soon, in bytes.
const DISK_LOW: u64 = 1024 * 1024 * 1024;
/// Largest answer that is read of an HTTP server.
const ANSWER_MAX: u64 = 64 * 1024;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// There and fit.
    Ok,
    /// Missing and not needed, or worth knowing.
    Note,
    /// Missing and needed.
    Problem,
}

/// One line.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do, where there is something to do.
    pub remedy: String,
}

fn finding(what: &str, level: Level, found: impl Into<String>, remedy: &str) -> Finding {
    Finding {
        what: what.to_owned(),
        level,
        found: found.into(),
        remedy: remedy.to_owned(),
    }
}

/// Looks at everything.
pub async fn examine(loaded: &Loaded) -> Vec<Finding> {
    let config = &loaded.config;
    let running = running_daemon(&loaded.data_dir);
    let (queue, docker, ollama, openai, services) = tokio::join!(
        queue(config),
        docker(config),
        ollama(config),
        openai(config),
        services(config, &loaded.data_dir, running.is_some()),
    );
    let mut all = vec![
        daemon(running.as_deref()),
        queue,
        token(config, &loaded.data_dir),
        disk(&loaded.data_dir),
    ];
    all.extend(ports(config, running.is_some()));
    all.extend(services);
    all.extend([docker, ollama, openai, gpu()]);
    all.extend(
        loaded
            .warnings
            .iter()
            .map(|warning| finding("config", Level::Note, warning.clone(), "")),
    );
    all
}

/// Prints the findings.
pub fn print(findings: &[Finding], format: DoctorFormat) {
    if format == DoctorFormat::Json {
        println!(
            "{}",
            serde_json::to_string_pretty(findings).unwrap_or_default()
        );
        return;
    }
    for finding in findings {
        let mark = match finding.level {
            Level::Ok => "ok     ",
            Level::Note => "note   ",
            Level::Problem => "PROBLEM",
        };
        println!("{mark} {:<12} {}", finding.what, finding.found);
        if !finding.remedy.is_empty() {
            println!("        {:<12} → {}", "", finding.remedy);
        }
    }
    let problems = findings
        .iter()
        .filter(|finding| finding.level == Level::Problem)
        .count();
    match problems {
        0 => println!("\nnothing that this node needs is missing"),
        1 => println!("\n1 problem"),
        n => println!("\n{n} problems"),
    }
}

/// The daemon of this data directory, if one runs.
fn running_daemon(data_dir: &Path) -> Option<String> {
    let path = data_dir.join("run").join("vlinderd.pid");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .ok()?;
    match file.try_lock() {
        Ok(()) => None,
        Err(_) => std::fs::read_to_string(&path).ok(),
    }
}

fn daemon(running: Option<&str>) -> Finding {
    match running {
        Some(pid) => finding(
            "vlinderd",
            Level::Ok,
            format!("runs (pid {})", pid.trim()),
            "",
        ),
        None => finding(
            "vlinderd",
            Level::Note,
            "does not run on this data directory",
            "start it: vlinderd",
        ),
    }
}

async fn queue(config: &Config) -> Finding {
    if config.queue.backend == QueueBackend::Local {
        return finding("bus", Level::Ok, "embedded; no NATS is needed", "");
    }
    let options = bus::nats_options(config, "vlinderd doctor");
    let urls: Vec<String> = config
        .queue
        .nats_url
        .iter()
        .map(ToString::to_string)
        .collect();
    let began = Instant::now();
    match tokio::time::timeout(LOOK_DEADLINE, vlinder_bus::nats::probe(&options)).await {
        Ok(Ok(probe)) => finding(
            "bus",
            Level::Ok,
            format!(
                "NATS {} at {}, JetStream on, {} ms",
                probe.version,
                probe.address,
                began.elapsed().as_millis()
            ),
            "",
        ),
        Ok(Err(error)) => {
            let remedy = match &error {
                vlinder_bus::Error::Unfit { .. } => {
                    "correct that there; nats-server 2.11 or newer with -js is needed"
                }
                _ => "start nats-server 2.11 or newer with -js there, or correct queue.nats_url",
            };
            finding("bus", Level::Problem, error.to_string(), remedy)
        }
        Err(_) => finding(
            "bus",
            Level::Problem,
            format!("no answer from {} within 4 s", urls.join(", ")),
            "check the address and the network between",
        ),
    }
}

fn token(config: &Config, data_dir: &Path) -> Finding {
    let file = data_dir.join("run").join("token");
    match (&config.auth.token, file.exists()) {
        (Some(_), _) => finding("credential", Level::Ok, "auth.token is configured", ""),
        (None, true) => finding(
            "credential",
            Level::Ok,
            format!("in {}", file.display()),
            "",
        ),
        (None, false) => finding(
            "credential",
            Level::Note,
            "none yet; the first start makes one in run/token",
            "",
        ),
    }
}

fn disk(data_dir: &Path) -> Finding {
    let existing = data_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let stat = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat,
        Err(error) => {
            return finding(
                "disk",
                Level::Problem,
                format!("{}: {error}", existing.display()),
                "check the data directory",
            );
        }
    };
    let free = stat.f_bavail * stat.f_frsize;
    let text = format!(
        "{:.1} GiB free at {}",
        free as f64 / 1024f64.powi(3),
        existing.display()
    );
    if stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return finding(
            "disk",
            Level::Problem,
            format!("{} is read-only", existing.display()),
            "choose another directory with --data-dir",
        );
    }
    if free < DISK_LOW {
        return finding(
            "disk",
            Level::Problem,
            text,
            "free some space: below 32 MiB the log refuses new work",
        );
    }
    finding("disk", Level::Ok, text, "")
}

/// Whether the ports that the next start needs are free.
fn ports(config: &Config, running: bool) -> Vec<Finding> {
    if running {
        return vec![];
    }
    let ports = &config.distributed.ports;
    let services = WorkerRole::ALL.into_iter().filter_map(|role| {
        let service = Service::of_role(role).filter(|_| config.workers.count(role) > 0)?;
        let port = match service {
            Service::Registry => ports.registry,
            Service::Harness => ports.harness,
            Service::State => ports.state,
            Service::Secret => ports.secret,
            Service::Catalog => ports.catalog,
        };
        Some((role.as_str(), port))
    });
    let wanted: Vec<(&str, u16)> = services.chain([("http", ports.http)]).collect();
    let taken: Vec<String> = wanted
        .iter()
        .filter(|(_, port)| {
            TcpListener::bind(SocketAddr::new(config.distributed.bind, *port)).is_err()
        })
        .map(|(name, port)| format!("{port} ({name})"))
        .collect();
    if taken.is_empty() {
        let all: Vec<String> = wanted.iter().map(|(_, port)| port.to_string()).collect();
        return vec![finding(
            "ports",
            Level::Ok,
            format!("free: {}", all.join(", ")),
            "",
        )];
    }
    vec![finding(
        "ports",
        Level::Problem,
        format!("taken: {}", taken.join(", ")),
        "stop who holds them, or set distributed.ports.NAME (0 = any free port)",
    )]
}

/// Whether the services that a running node uses answer at all.
async fn services(config: &Config, data_dir: &Path, running: bool) -> Vec<Finding> {
    let known = vlinder_config::NodeAddresses::read(data_dir)
        .ok()
        .flatten()
        .unwrap_or_default();
    let mut findings = Vec::new();
    for role in WorkerRole::ALL {
        let Some(service) = Service::of_role(role) else {
            continue;
        };
        let remote = config.workers.count(role) == 0;
        if !running && !remote {
            continue;
        }
        let elsewhere = match service {
            Service::Registry => &config.distributed.registry_addr,
            Service::Harness => &config.distributed.harness_addr,
            Service::State => &config.distributed.state_addr,
            Service::Secret => &config.distributed.secret_addr,
            Service::Catalog => &config.distributed.catalog_addr,
        };
        let urls = if remote {
            elsewhere.clone()
        } else {
            known.get(service).cloned().into_iter().collect()
        };
        for url in urls {
            let address = format!(
                "{}:{}",
                url.host_str().unwrap_or_default(),
                url.port_or_known_default().unwrap_or(80)
            );
            let reached = tokio::time::timeout(LOOK_DEADLINE, TcpStream::connect(&address)).await;
            findings.push(match reached {
                Ok(Ok(_)) => finding(role.as_str(), Level::Ok, format!("listens at {url}"), ""),
                Ok(Err(error)) => finding(
                    role.as_str(),
                    Level::Problem,
                    format!("{url}: {error}"),
                    "start the node that serves it, or correct its address",
                ),
                Err(_) => finding(
                    role.as_str(),
                    Level::Problem,
                    format!("{url}: no answer within 4 s"),
                    "check the address and the network between",
                ),
            });
        }
    }
    findings
}

async fn docker(config: &Config) -> Finding {
    let needed = config.workers.count(WorkerRole::AgentContainer) > 0;
    let socket = match config.runtime.docker_host.as_str() {
        "auto" => "/var/run/docker.sock",
        other => other.strip_prefix("unix://").unwrap_or(other),
    };
    if !socket.starts_with('/') {
        return finding(
            "docker",
            Level::Note,
            format!("{socket}: only local sockets are looked at"),
            "",
        );
    }
    let asked = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream
            .write_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            .await?;
        let mut answer = String::new();
        stream.take(ANSWER_MAX).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    match tokio::time::timeout(LOOK_DEADLINE, asked).await {
        Ok(Ok(answer)) if answer.contains(" 200 ") => {
            finding("docker", Level::Ok, format!("answers at {socket}"), "")
        }
        Ok(Ok(_)) => finding(
            "docker",
            Level::Note,
            format!("{socket} answers, but not like Docker"),
            "",
        ),
        Ok(Err(error)) => {
            let remedy = if needed {
                "process agents need no Docker; install docker.io for container agents"
            } else {
                ""
            };
            finding("docker", Level::Note, format!("{socket}: {error}"), remedy)
        }
        Err(_) => finding(
            "docker",
            Level::Note,
            format!("{socket}: no answer within 4 s"),
            "restart the Docker engine",
        ),
    }
}

/// One plain HTTP GET, with a token where there is one; the status and what came after the head.
pub(super) async fn get(
    url: &url::Url,
    path: &str,
    token: Option<&str>,
) -> Result<(u16, String), String> {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default().unwrap_or(80);
    let credential = token.map(|token| format!("Authorization: Bearer {token}\r\n"));
    let credential = credential.unwrap_or_default();
    let asked = async {
        let mut stream = TcpStream::connect((host, port)).await?;
        let request = format!(
            "GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n{credential}\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = tokio::time::timeout(LOOK_DEADLINE, asked)
        .await
        .map_err(|_| "no answer within 4 s".to_owned())?
        .map_err(|error| error.to_string())?;
    let status = answer
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    let body = answer
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_owned())
        .unwrap_or_default();
    Ok((status, body))
}

async fn ollama(config: &Config) -> Finding {
    let workers = config.workers.count(WorkerRole::InferenceOllama);
    let url = &config.ollama.endpoint;
    if workers == 0 {
        return finding(
            "ollama",
            Level::Note,
            "no worker of role inference.ollama is configured",
            "",
        );
    }
    match get(url, "/api/tags", None).await {
        Ok((200, body)) => {
            let value: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
            let models = value["models"].as_array().map_or(0, Vec::len);
            finding(
                "ollama",
                Level::Ok,
                format!("{url} offers {models} models"),
                "",
            )
        }
        Ok((status, _)) => finding(
            "ollama",
            Level::Note,
            format!("{url} answers {status}"),
            "is it an Ollama server?",
        ),
        Err(error) => finding(
            "ollama",
            Level::Note,
            format!("{url}: {error}"),
            "start it (ollama serve), or set ollama.endpoint; agents without a model need none",
        ),
    }
}

async fn openai(config: &Config) -> Finding {
    let Some(url) = config
        .openai
        .endpoint
        .as_ref()
        .filter(|_| config.workers.count(WorkerRole::InferenceOpenai) > 0)
    else {
        return finding(
            "openai",
            Level::Note,
            "no OpenAI-compatible server is configured",
            "",
        );
    };
    if url.scheme() != "http" {
        return finding(
            "openai",
            Level::Note,
            format!("{url} is asked by its worker; see `vlinder model available`"),
            "",
        );
    }
    let path = format!("{}/models", url.path().trim_end_matches('/'));
    match get(url, &path, None).await {
        Ok((200, _)) => finding("openai", Level::Ok, format!("{url} answers"), ""),
        Ok((401 | 403, _)) => finding(
            "openai",
            Level::Note,
            format!("{url} asks for a key"),
            "set openai.api_key",
        ),
        Ok((status, _)) => finding(
            "openai",
            Level::Note,
            format!("{url} answers {status}"),
            "openai.endpoint is the address before /chat/completions",
        ),
        Err(error) => finding(
            "openai",
            Level::Problem,
            format!("{url}: {error}"),
            "start the server, or correct openai.endpoint",
        ),
    }
}

fn gpu() -> Finding {
    let nvidia = Path::new("/proc/driver/nvidia/gpus");
    let count = std::fs::read_dir(nvidia).map_or(0, Iterator::count);
    if count > 0 {
        return finding(
            "gpu",
            Level::Ok,
            format!("{count} NVIDIA GPU{}", if count == 1 { "" } else { "s" }),
            "",
        );
    }
    if Path::new("/dev/kfd").exists() {
        return finding("gpu", Level::Ok, "an AMD GPU", "");
    }
    finding(
        "gpu",
        Level::Note,
        "none found; inference runs where Ollama runs",
        "",
    )
}

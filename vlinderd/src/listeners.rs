//! The sockets that this node listens on. The daemon binds them before anything starts, and workers
//! inherit them: a second daemon is refused here, and a restarted worker keeps its port.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Mutex, MutexGuard, PoisonError};
use url::Url;
use vlinder_config::{Config, NodeAddresses, Service};
use vlinder_core::WorkerRole;
use vlinder_supervisor::SharedListener;

/// The name under which a service finds its listener.
pub const GRPC: &str = "grpc";

/// How often a free port is chosen; each is taken by someone else in between only by chance.
const BIND_TRIES: usize = 16;

/// All listeners of a node.
pub struct Listeners {
    /// One for each service role that this node runs, or has run since its start.
    services: Mutex<BTreeMap<WorkerRole, SharedListener>>,
    /// Health, metrics, events.
    pub http: TcpListener,
    /// Where clients connect.
    addresses: Mutex<NodeAddresses>,
}

impl Listeners {
    /// The listener of a service role.
    pub fn of(&self, role: WorkerRole) -> Option<SharedListener> {
        hold(&self.services).get(&role).cloned()
    }

    /// Where clients connect.
    pub fn addresses(&self) -> NodeAddresses {
        hold(&self.addresses).clone()
    }

    /// Binds what a changed configuration asks for and the one before did not: a service whose
    /// count was 0. Returns whether there was something. The error says who holds a port.
    pub fn add_missing(&self, config: &Config) -> Result<bool, String> {
        let missing = bind_services(config, |role| self.of(role).is_some())?;
        let some = !missing.is_empty();
        for (role, service, url, listener) in missing {
            hold(&self.addresses).set(service, url);
            hold(&self.services).insert(role, listener);
        }
        Ok(some)
    }
}

/// What these locks guard is whole at every point where a holder could panic.
fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Binds everything that the configuration asks for. The error says who holds a port.
pub fn bind(config: &Config) -> Result<Listeners, String> {
    let mut services = BTreeMap::new();
    let mut addresses = NodeAddresses::default();
    for service in Service::ALL {
        // Clients of this node go where the configuration points, unless it serves them itself.
        let elsewhere = match service {
            Service::Registry => &config.distributed.registry_addr,
            Service::Harness => &config.distributed.harness_addr,
            Service::State => &config.distributed.state_addr,
            Service::Secret => &config.distributed.secret_addr,
            Service::Catalog => &config.distributed.catalog_addr,
        };
        if let Some(url) = elsewhere.first() {
            addresses.set(service, url.clone());
        }
    }
    for (role, service, url, listener) in bind_services(config, |_| false)? {
        addresses.set(service, url);
        services.insert(role, listener);
    }
    let http = bind_one(
        "http",
        config.distributed.bind,
        config.distributed.ports.http,
    )?;
    addresses.http = Some(url_of(&http)?);
    Ok(Listeners {
        services: Mutex::new(services),
        http,
        addresses: Mutex::new(addresses),
    })
}

/// Binds a listener for each service role that has workers and is not `bound` already.
fn bind_services(
    config: &Config,
    bound: impl Fn(WorkerRole) -> bool,
) -> Result<Vec<(WorkerRole, Service, Url, SharedListener)>, String> {
    let ports = &config.distributed.ports;
    let mut listeners = Vec::new();
    for service in Service::ALL {
        let role = service.role();
        if config.workers.count(role) == 0 || bound(role) {
            continue;
        }
        let port = match service {
            Service::Registry => ports.registry,
            Service::Harness => ports.harness,
            Service::State => ports.state,
            Service::Secret => ports.secret,
            Service::Catalog => ports.catalog,
        };
        let socket = bind_one(role.as_str(), config.distributed.bind, port)?;
        let url = url_of(&socket)?;
        let shared = SharedListener::new(GRPC, socket).map_err(|error| error.to_string())?;
        listeners.push((role, service, url, shared));
    }
    Ok(listeners)
}

fn url_of(socket: &TcpListener) -> Result<Url, String> {
    let address = socket.local_addr().map_err(|error| error.to_string())?;
    // A client on this machine cannot connect to "every address".
    let host = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) if ip.is_unspecified() => "[::1]".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    format!("http://{host}:{}", address.port())
        .parse()
        .map_err(|error: url::ParseError| error.to_string())
}

fn bind_one(what: &str, ip: IpAddr, port: u16) -> Result<TcpListener, String> {
    let address = SocketAddr::new(ip, port);
    let bound = if port == 0 {
        bind_any(ip)
    } else {
        TcpListener::bind(address)
    };
    bound.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            let holder = holder_of(port).map(|who| format!(" by {who}")).unwrap_or_default();
            format!(
                "port {port} ({what}) is in use{holder}; stop that, or set VLINDER_DISTRIBUTED_PORTS_{}=0 for any free port",
                what.to_uppercase()
            )
        }
        _ => format!("cannot listen on {address} ({what}): {error}"),
    })
}

/// Binds a free port by its number. One that the system chose would be lost when the socket
/// stops listening, as it does while its role has no workers, and clients know the number.
fn bind_any(ip: IpAddr) -> std::io::Result<TcpListener> {
    let mut last = None;
    for _ in 0..BIND_TRIES {
        let port = TcpListener::bind(SocketAddr::new(ip, 0))?
            .local_addr()?
            .port();
        match TcpListener::bind(SocketAddr::new(ip, port)) {
            Ok(socket) => return Ok(socket),
            // Somebody else was faster.
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| ErrorKind::AddrInUse.into()))
}

/// The process that listens on a port, as `name (pid N)`, where `/proc` tells.
fn holder_of(port: u16) -> Option<String> {
    let wanted = format!(":{port:04X}");
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .find_map(|table| {
            let text = std::fs::read_to_string(table).ok()?;
            text.lines().skip(1).find_map(|line| {
                let mut fields = line.split_whitespace();
                let local = fields.nth(1)?;
                let state = fields.nth(1)?;
                let inode = fields.nth(5)?;
                // 0A: listening.
                (local.ends_with(&wanted) && state == "0A").then(|| inode.to_owned())
            })
        })?;
    let socket = format!("socket:[{inode}]");
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let holds = |entry: std::fs::DirEntry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|target| target.as_os_str() == socket.as_str())
        };
        if descriptors.flatten().any(holds) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (pid {pid})", name.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_port_is_named() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let error = bind_one("http", IpAddr::from([127, 0, 0, 1]), port).unwrap_err();
        assert!(
            error.contains(&format!("(pid {})", std::process::id())),
            "{error}"
        );
        assert!(
            error.contains("VLINDER_DISTRIBUTED_PORTS_HTTP=0"),
            "{error}"
        );
    }
}

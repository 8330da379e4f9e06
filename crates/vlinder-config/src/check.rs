//! The rules that span several keys. Each names the key to change.

use std::net::IpAddr;

use vlinder_core::WorkerRole;

use crate::addresses::Service;
use crate::derive::is_embedded;
use crate::elements::Value;
use crate::keys::{WORKERS, find};
use crate::layers::Sources;
use crate::mistake::Origin;
use crate::settings::Settings;

/// Most workers of one role on one node: beyond that a node spends its time on switching.
pub const WORKERS_PER_ROLE_MAX: u64 = 64;

/// Shortest `auth.token` with which a node listens beyond loopback, in characters.
pub const TOKEN_LEN_MIN: usize = 16;

const NATS_KEYS: [&str; 7] = [
    "queue.nats_url",
    "queue.nats_creds",
    "queue.nats_nkey",
    "queue.nats_token",
    "queue.nats_ca",
    "queue.nats_cert",
    "queue.nats_key",
];

/// Adds a mistake for every broken rule, a warning for what has no effect.
pub(crate) fn check(settings: &mut Settings, sources: &Sources<'_>) {
    roles(settings, sources.supported);
    needs_of_roles(settings, sources.supported);
    token_and_bind(settings);
    backends(settings);
    nats_credentials(settings);
    s3_credential(settings);
    ports(settings);
    restarts(settings);
}

fn count(settings: &Settings, role: WorkerRole) -> u64 {
    settings.number(&format!("{WORKERS}{role}")).unwrap_or(0)
}

/// A role that this build lacks is a mistake where somebody asked for it, else it counts as 0.
fn roles(settings: &mut Settings, supported: &[WorkerRole]) {
    for role in WorkerRole::ALL {
        let Some(key) = find(&format!("{WORKERS}{role}")) else {
            continue;
        };
        let wanted = count(settings, role);
        if wanted == 0 || supported.contains(&role) {
            continue;
        }
        if settings.explicit(key.path).is_some() {
            settings.mistake_at(
                key.path,
                format!("this build has no {role} worker; expected 0"),
            );
            continue;
        }
        let path = key.path;
        settings.warnings.push(format!(
            "{path}: this build has no {role} worker, so the default of {wanted} counts as 0"
        ));
        let origin = Origin::Derived("what this build has".into());
        settings.set(path, Value::Number(0), origin);
    }
}

fn needs_of_roles(settings: &mut Settings, supported: &[WorkerRole]) {
    let needs: [(WorkerRole, &[&str]); 2] = [
        (WorkerRole::InferenceOpenai, &["openai.endpoint"]),
        (
            WorkerRole::InferenceLocal,
            &["local.model", "local.embedding_model"],
        ),
    ];
    for (role, any_of) in needs {
        let Some(key) = find(&format!("{WORKERS}{role}")) else {
            continue;
        };
        let met = any_of
            .iter()
            .any(|key| settings.get(key).is_some() || settings.is_broken(key));
        if supported.contains(&role) && count(settings, role) > 0 && !met {
            settings.mistake_at(
                key.path,
                format!("needs {}, which is not set", any_of.join(" or ")),
            );
        }
    }
}

fn token_and_bind(settings: &mut Settings) {
    if settings.is_broken("auth.token") || settings.is_broken("distributed.bind") {
        return;
    }
    let bind = settings.text("distributed.bind").unwrap_or_default();
    let loopback = bind
        .parse::<IpAddr>()
        .is_ok_and(|address| address.is_loopback());
    match (settings.text("auth.token").map(str::len), loopback) {
        (None, false) => settings.mistake_at(
            "distributed.bind",
            format!(
                "to listen beyond loopback needs auth.token (VLINDER_AUTH_TOKEN), at least \
                 {TOKEN_LEN_MIN} characters"
            ),
        ),
        (Some(len), false) if len < TOKEN_LEN_MIN => settings.mistake_at(
            "auth.token",
            format!("is too short to listen on {bind}; expected at least {TOKEN_LEN_MIN} characters"),
        ),
        (Some(len), true) if len < TOKEN_LEN_MIN => settings.warnings.push(format!(
            "auth.token: is shorter than {TOKEN_LEN_MIN} characters, which is enough on loopback only"
        )),
        _ => {}
    }
}

fn s3_credential(settings: &mut Settings) {
    let (id, key) = ("s3.access_key_id", "s3.secret_access_key");
    for (path, other) in [(id, key), (key, id)] {
        let is_there = settings.get(other).is_some() || settings.is_broken(other);
        if settings.get(path).is_some() && !is_there {
            settings.mistake_at(path, format!("needs {other}, which is not set"));
        }
    }
}

fn backends(settings: &mut Settings) {
    if settings.is_broken("queue.backend") || settings.is_broken("state.backend") {
        return;
    }
    let embedded = is_embedded(settings);
    let (queue, fits) = if embedded {
        ("local", "local")
    } else {
        ("nats", "grpc")
    };
    if settings.text("state.backend") != Some(fits) {
        let asker = match settings.explicit("state.backend") {
            Some(_) => "state.backend",
            None => "queue.backend",
        };
        settings.mistake_at(
            asker,
            format!("does not fit: with queue.backend {queue:?} state.backend is {fits:?}"),
        );
    }
    if !embedded {
        return;
    }
    for key in NATS_KEYS {
        if settings.explicit(key).is_some() {
            settings
                .warnings
                .push(format!("{key}: has no effect with queue.backend \"local\""));
        }
    }
    if settings.get("supervisor.memory_limit").is_some() {
        // Tasks of one process share their memory.
        let warning = "supervisor.memory_limit: has no effect with queue.backend \"local\"";
        settings.warnings.push(warning.into());
    }
    if settings.number("queue.replicas").unwrap_or(1) > 1 {
        let warning = "queue.replicas: has no effect with queue.backend \"local\"";
        settings.warnings.push(warning.into());
    }
    for service in Service::ALL {
        let key = service.addr_key();
        let port = Origin::Derived(key.into());
        let own = settings
            .get(service.port_key())
            .is_some_and(|s| s.origin == port);
        if settings.explicit(key).is_some()
            && !own
            && settings.explicit(service.port_key()).is_none()
        {
            let warning = format!("{key}: has no effect on a daemon with queue.backend \"local\"");
            settings.warnings.push(warning);
        }
    }
}

fn nats_credentials(settings: &mut Settings) {
    let credentials = ["queue.nats_creds", "queue.nats_nkey", "queue.nats_token"];
    let set: Vec<_> = credentials
        .into_iter()
        .filter(|key| settings.get(key).is_some())
        .collect();
    if let [first, rest @ ..] = &set[..] {
        for key in rest {
            settings.mistake_at(key, format!("{first} is set too; expected one of them"));
        }
    }
    let pair = ["queue.nats_cert", "queue.nats_key"];
    for (one, other) in [(pair[0], pair[1]), (pair[1], pair[0])] {
        let alone = settings.get(one).is_some() && settings.get(other).is_none();
        if alone && !settings.is_broken(other) {
            settings.mistake_at(one, format!("needs {other}, which is not set"));
        }
    }
    let seed_ok = |seed: &str| seed.starts_with("SU") && seed.len() == 58;
    if settings
        .text("queue.nats_nkey")
        .is_some_and(|seed| !seed_ok(seed))
    {
        settings.mistake_at(
            "queue.nats_nkey",
            "expected the seed of a user key: 58 characters that begin with SU",
        );
    }
}

/// Two listeners of this node on one port.
fn ports(settings: &mut Settings) {
    let mut taken: Vec<(u64, &'static str)> = Vec::new();
    let services = Service::ALL
        .into_iter()
        .filter(|s| count(settings, s.role()) > 0);
    let mut listening: Vec<&'static str> = services.map(Service::port_key).collect();
    listening.push("distributed.ports.http");
    let agents = [
        WorkerRole::AgentContainer,
        WorkerRole::AgentProcess,
        WorkerRole::AgentLambda,
    ];
    if agents.iter().any(|role| count(settings, *role) > 0) {
        listening.push("distributed.ports.bridge");
    }
    for key in listening {
        let port = settings.number(key).unwrap_or(0);
        if port == 0 || settings.is_broken(key) {
            continue;
        }
        match taken.iter().find(|(other, _)| *other == port) {
            None => taken.push((port, key)),
            Some((_, other)) => {
                // The one that somebody wrote, or that follows from it, is the one to change.
                let rank = |key| match settings.get(key).map(|setting| &setting.origin) {
                    Some(Origin::Default) | None => 0,
                    Some(Origin::Derived(_)) => 1,
                    Some(_) => 2,
                };
                let (wrong, right) = match rank(key) < rank(*other) {
                    true => (*other, key),
                    false => (key, *other),
                };
                settings.mistake_at(wrong, format!("{right} is the same port; expected another"));
            }
        }
    }
}

fn restarts(settings: &mut Settings) {
    let span = |key| {
        settings
            .text(key)
            .and_then(|text| humantime::parse_duration(text).ok())
    };
    let (initial, max) = (
        span("supervisor.restart_initial"),
        span("supervisor.restart_max"),
    );
    if initial > max {
        let (wrong, expected) = match settings.explicit("supervisor.restart_max") {
            Some(_) => (
                "supervisor.restart_max",
                "is shorter than supervisor.restart_initial",
            ),
            None => (
                "supervisor.restart_initial",
                "is longer than supervisor.restart_max",
            ),
        };
        settings.mistake_at(wrong, expected);
    }
}

//! What the engine is told to run: the box around an agent.

use super::files::Files;
use super::image::Image;
use crate::launcher::{LaunchError, LaunchSpec, prompts};
use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigLogConfig, Mount, MountType,
    RestartPolicy, RestartPolicyNameEnum,
};
use std::collections::HashMap;
use std::path::Path;

/// The names that agents find the bridge by.
const BRIDGE_NAMES: [&str; 8] = [
    "sqlite-kv",
    "sqlite-vec",
    "ollama",
    "openrouter",
    "openai",
    "local",
    "anthropic",
    "runtime",
];
/// Where they find it.
const BRIDGE: &str = "http://127.0.0.1:3544";
/// Where the first process is in the container, and what it finds there.
const INIT_AT: &str = "/run/vlinder-init";
const DIRECTORY_AT: &str = "/run/vlinder";
/// Memory of an agent that does not say, in bytes.
pub(super) const MEMORY_DEFAULT: u64 = 512 * 1024 * 1024;
/// Processors of an agent that does not say.
const CPUS_DEFAULT: f64 = 1.0;
/// Processes of an agent that does not say.
const PIDS_DEFAULT: u32 = 256;
/// Those of the first process: itself and a thread.
const PIDS_OF_INIT: u32 = 2;
/// What may be written to `/tmp` and to each volume of the image: it counts as the agent's memory.
const TMPFS: &str = "rw,noexec,nosuid,nodev,size=64m,mode=1777";

/// The body of the request that makes a container.
pub(super) fn of(
    spec: &LaunchSpec,
    image: &Image,
    files: &Files,
    name: &str,
    cpus: f64,
    labels: HashMap<String, String>,
) -> Result<ContainerCreateBody, LaunchError> {
    let manifest = spec.deployment.manifest();
    let resources = &manifest.resources;
    let memory = memory(spec);
    let cpus = resources.cpus.unwrap_or(CPUS_DEFAULT).min(cpus);
    let pids = resources
        .pids
        .unwrap_or(PIDS_DEFAULT)
        .saturating_add(PIDS_OF_INIT);
    let config = &image.config;
    let words = |words: &Option<Vec<String>>| words.clone().unwrap_or_default();
    let mut command = words(&config.entrypoint);
    command.extend(words(&config.cmd));
    let volumes = words(&config.volumes).into_iter();
    let written = volumes.chain(["/tmp".to_owned()]);
    // A directory that is in the image keeps its mode; then it should belong to who the agent runs as.
    let user = config.user.as_deref().unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let tmpfs = match user.parse::<u32>() {
        Ok(user) => format!("{TMPFS},uid={user}"),
        Err(_) => TMPFS.to_owned(),
    };
    let host = HostConfig {
        network_mode: Some("none".to_owned()),
        extra_hosts: Some(
            BRIDGE_NAMES
                .map(|name| format!("{name}.vlinder.local:127.0.0.1"))
                .to_vec(),
        ),
        mounts: Some(vec![
            read_only(&files.directory(name), DIRECTORY_AT)?,
            read_only(files.init(), INIT_AT)?,
        ]),
        tmpfs: Some(written.map(|path| (path, tmpfs.clone())).collect()),
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        memory: Some(memory as i64),
        // No swap beside it.
        memory_swap: Some(memory as i64),
        nano_cpus: Some((cpus * 1e9) as i64),
        pids_limit: Some(pids.into()),
        // We start it again ourselves, and know why.
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::NO),
            ..RestartPolicy::default()
        }),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(HashMap::from([
                ("max-size".to_owned(), "4m".to_owned()),
                ("max-file".to_owned(), "2".to_owned()),
            ])),
        }),
        ..HostConfig::default()
    };
    Ok(ContainerCreateBody {
        image: Some(image.id.clone()),
        entrypoint: Some(vec![INIT_AT.to_owned()]),
        cmd: Some(command),
        env: Some(environment(spec)),
        labels: Some(labels),
        // Its health is asked for by ourselves.
        healthcheck: Some(HealthConfig {
            test: Some(vec!["NONE".to_owned()]),
            ..HealthConfig::default()
        }),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    })
}

/// How much memory the agent may take, in bytes.
pub(super) fn memory(spec: &LaunchSpec) -> u64 {
    let resources = &spec.deployment.manifest().resources;
    resources.memory_bytes().unwrap_or(MEMORY_DEFAULT)
}

fn environment(spec: &LaunchSpec) -> Vec<String> {
    let manifest = spec.deployment.manifest();
    let mut variables = vec![
        "PORT=8080".to_owned(),
        format!("VLINDER_BRIDGE_URL={BRIDGE}"),
        format!("VLINDER_AGENT={}", manifest.name),
    ];
    // What leaves through the proxy is on record; what is tried without it gets nowhere.
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        variables.push(format!("{name}={BRIDGE}"));
    }
    for name in ["NO_PROXY", "no_proxy"] {
        variables.push(format!("{name}=.vlinder.local,localhost,127.0.0.1"));
    }
    variables.extend(prompts(manifest).map(|(name, text)| format!("{name}={text}")));
    variables
}

fn read_only(source: &Path, target: &str) -> Result<Mount, LaunchError> {
    let source = source.to_str().ok_or_else(|| {
        LaunchError::Engine(
            "the data directory's path is not UTF-8, and the container engine takes no other"
                .to_owned(),
        )
    })?;
    Ok(Mount {
        typ: Some(MountType::BIND),
        source: Some(source.to_owned()),
        target: Some(target.to_owned()),
        read_only: Some(true),
        ..Mount::default()
    })
}

//! Defaults < file < environment < flags < live changes, decided here and nowhere else.

use std::path::{Path, PathBuf};

use vlinder_core::WorkerRole;

use crate::elements::{Raw, Value};
use crate::keys::{self, KEYS, OTHER_VARIABLES, TEST_PREFIX};
use crate::live;
use crate::mistake::{Mistake, Origin, nearest};
use crate::settings::Settings;
use crate::toml_file::{self, FileKind, Written, unknown_key};
use crate::{Config, Env, check, derive, expand, files};

/// Largest configuration file, in bytes.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// Where to load from.
#[derive(Debug, Clone)]
pub struct Sources<'a> {
    /// Variables, home, host name.
    pub env: &'a Env,
    /// `--config`; else `VLINDER_CONFIG`, else `config.toml` in the data directory, if there is
    /// one. A file that was named must exist.
    pub config_file: Option<PathBuf>,
    /// `--data-dir`; else `VLINDER_DIR`, else `~/.vlinder`.
    pub data_dir: Option<PathBuf>,
    /// Single keys set on the command line; later ones win.
    pub flags: Vec<Flag>,
    /// The roles that this build can run.
    pub supported: &'a [WorkerRole],
}

impl<'a> Sources<'a> {
    /// From the environment and its default places, for a build that can run every role.
    pub fn new(env: &'a Env) -> Self {
        let flags = Vec::new();
        Self {
            env,
            config_file: None,
            data_dir: None,
            flags,
            supported: &WorkerRole::ALL,
        }
    }
}

/// A key set on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flag {
    /// The flag, for messages and origins, e.g. `--set`.
    pub name: String,
    /// The key, e.g. `queue.backend`.
    pub key: String,
    /// The value, written as in a variable.
    pub value: String,
}

/// A configuration without mistakes.
#[derive(Debug)]
pub struct Loaded {
    /// The checked form.
    pub config: Config,
    /// The data directory, absolute. It may not exist yet.
    pub data_dir: PathBuf,
    /// The file that was read, if there was one.
    pub config_file: Option<PathBuf>,
    /// What is not wrong, but has no effect or should be known; one sentence each.
    pub warnings: Vec<String>,
    pub(crate) settings: Settings,
}

impl Loaded {
    /// Where the value of a key is from; `None` when the key does not exist or has no value.
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.settings.get(key).map(|setting| &setting.origin)
    }
}

/// Loads everything and reports all mistakes at once, file by file and line by line.
pub fn load(sources: &Sources<'_>) -> Result<Loaded, Vec<Mistake>> {
    load_with(sources, None)
}

/// The data directory: the flag, else `VLINDER_DIR`, else `~/.vlinder`; absolute.
pub fn data_dir(env: &Env, flag: Option<&Path>) -> Result<PathBuf, Box<Mistake>> {
    if let Some(flag) = flag {
        return Ok(env.working_dir().join(flag));
    }
    if let Some(dir) = env.get("VLINDER_DIR") {
        let origin = || Origin::Env("VLINDER_DIR".into());
        let refuse =
            |expected: String| Box::new(Mistake::new(origin(), "VLINDER_DIR", expected).value(dir));
        if dir.is_empty() {
            return Err(refuse(
                "is empty; expected a directory, or leave it out".into(),
            ));
        }
        return Ok(env
            .working_dir()
            .join(expand::path(dir, env).map_err(refuse)?));
    }
    let home = env.home().ok_or_else(|| {
        let expected = "HOME is not set; name the data directory by --data-dir or VLINDER_DIR";
        Box::new(Mistake::new(Origin::Default, "data directory", expected))
    })?;
    Ok(home.join(".vlinder"))
}

/// `live`: the text of `run/live.toml` to use in place of the file.
pub(crate) fn load_with(sources: &Sources<'_>, live: Option<&str>) -> Result<Loaded, Vec<Mistake>> {
    let env = sources.env;
    let mut settings = Settings::default();
    let data_dir = data_dir(env, sources.data_dir.as_deref())
        .map_err(|mistake| settings.mistakes.push(*mistake))
        .ok();

    let config_file = file_layer(sources, data_dir.as_deref(), &mut settings);
    env_layer(env, &mut settings);
    flag_layer(sources, &mut settings);
    if let Some(data_dir) = &data_dir {
        live_layer(env, &live::path(data_dir), live, &mut settings);
    }
    derive::derive(&mut settings, env);
    check::check(&mut settings, sources);

    if let (Some(data_dir), true) = (data_dir, settings.mistakes.is_empty()) {
        let config = settings.config(env);
        let warnings = std::mem::take(&mut settings.warnings);
        return Ok(Loaded {
            config,
            data_dir,
            config_file,
            warnings,
            settings,
        });
    }
    let mut mistakes = settings.mistakes;
    Mistake::sort(&mut mistakes);
    Err(mistakes)
}

/// Checks what was written and puts it over what was there.
fn apply(written: Vec<Written>, env: &Env, settings: &mut Settings) {
    for written in written {
        match expand::check(&written, env) {
            Ok(value) => settings.set(written.key.path, value, written.origin),
            Err(mistake) => settings.refuse(written.key.path, *mistake),
        }
    }
}

fn file_layer(
    sources: &Sources<'_>,
    data_dir: Option<&Path>,
    settings: &mut Settings,
) -> Option<PathBuf> {
    let env = sources.env;
    let (path, origin) = match (&sources.config_file, env.get("VLINDER_CONFIG")) {
        (Some(flag), _) => (
            env.working_dir().join(flag),
            Some(Origin::Flag("--config".into())),
        ),
        (None, Some(text)) => {
            let origin = Origin::Env("VLINDER_CONFIG".into());
            match expand::path(text, env) {
                Ok(path) => (env.working_dir().join(path), Some(origin)),
                Err(expected) => {
                    let mistake = Mistake::new(origin, "VLINDER_CONFIG", expected).value(text);
                    settings.mistakes.push(mistake);
                    return None;
                }
            }
        }
        (None, None) => (data_dir?.join("config.toml"), None),
    };
    let at_file = || Origin::File {
        path: path.clone(),
        line: 0,
    };
    match files::read(&path, CONFIG_BYTES_MAX) {
        Ok(Some(text)) => {
            let written =
                toml_file::settings(&path, &text, FileKind::Config, &mut settings.mistakes);
            apply(written, env, settings);
            Some(path)
        }
        Ok(None) => {
            if let Some(origin) = origin {
                let expected = format!("there is no file {}", path.display());
                settings.mistakes.push(Mistake::new(origin, "", expected));
            }
            None
        }
        Err(error) => {
            let expected = format!("cannot be read: {error}");
            settings
                .mistakes
                .push(Mistake::new(at_file(), "", expected));
            None
        }
    }
}

fn env_layer(env: &Env, settings: &mut Settings) {
    let known: Vec<(String, &'static keys::Key)> = KEYS
        .iter()
        .flat_map(|key| key.variables().into_iter().map(move |name| (name, key)))
        .collect();
    for mistake in unknown_variables(env, &known) {
        settings.mistakes.push(mistake);
    }
    for key in KEYS {
        // Both spellings of one key: the same value twice is fine.
        let mut first: Option<(String, Value)> = None;
        for name in key.variables() {
            let Some(text) = env.get(&name) else { continue };
            let raw = Raw::Argument(text.to_owned());
            let written = Written {
                key,
                raw,
                origin: Origin::Env(name.clone()),
            };
            let value = match expand::check(&written, env) {
                Ok(value) => value,
                Err(mistake) => {
                    settings.refuse(key.path, *mistake);
                    continue;
                }
            };
            if let Some((other, other_value)) = &first {
                if *other_value != value {
                    let expected =
                        format!("{other} sets the same key to another value; keep one of them");
                    let mistake = Mistake::new(written.origin, key.path, expected);
                    settings.refuse(key.path, mistake.value(text));
                }
                continue;
            }
            settings.set(key.path, value.clone(), written.origin);
            first = Some((name, value));
        }
    }
}

/// Variables that begin with `VLINDER_` and mean nothing, or are not UTF-8.
fn unknown_variables(env: &Env, known: &[(String, &'static keys::Key)]) -> Vec<Mistake> {
    let ours = |name: &&str| name.starts_with("VLINDER_") && !name.starts_with(TEST_PREFIX);
    let names = || {
        known
            .iter()
            .map(|(name, _)| name.as_str())
            .chain(OTHER_VARIABLES)
    };
    let mut mistakes = Vec::new();
    for name in env.vars().map(|(name, _)| name).filter(ours) {
        if !names().any(|known| known == name) {
            let near = nearest(name, names());
            let origin = Origin::Env(name.into());
            mistakes.push(Mistake::new(origin, name, "is not a variable of Vlinder").near(near));
        }
    }
    for name in env.not_unicode().filter(ours) {
        mistakes.push(Mistake::new(Origin::Env(name.into()), name, "is not UTF-8"));
    }
    mistakes
}

/// The same check for the command line, which warns only.
pub(crate) fn unknown_variable_warnings(env: &Env) -> Vec<String> {
    let known: Vec<(String, &'static keys::Key)> = KEYS
        .iter()
        .flat_map(|key| key.variables().into_iter().map(move |name| (name, key)))
        .collect();
    unknown_variables(env, &known)
        .iter()
        .map(Mistake::to_string)
        .collect()
}

fn flag_layer(sources: &Sources<'_>, settings: &mut Settings) {
    for flag in &sources.flags {
        let origin = Origin::Flag(flag.name.clone());
        match keys::find(&flag.key) {
            Some(key) => {
                let raw = Raw::Argument(flag.value.clone());
                apply(vec![Written { key, raw, origin }], sources.env, settings);
            }
            None => settings.mistakes.push(unknown_key(&flag.key, origin)),
        }
    }
}

fn live_layer(env: &Env, path: &Path, text: Option<&str>, settings: &mut Settings) {
    let text = match text {
        Some(text) => text.to_owned(),
        None => match files::read(path, CONFIG_BYTES_MAX) {
            Ok(text) => text.unwrap_or_default(),
            Err(error) => {
                let origin = Origin::Live {
                    path: path.to_owned(),
                    line: 0,
                };
                let expected = format!("cannot be read: {error}");
                settings.mistakes.push(Mistake::new(origin, "", expected));
                return;
            }
        },
    };
    let written = toml_file::settings(path, &text, FileKind::Live, &mut settings.mistakes);
    for one in &written {
        // A live change that hides what an operator wrote must not do so in silence.
        if let Some(hidden) = settings.explicit(one.key.path) {
            let warning = format!(
                "{}: a live change ({}) overrides what {} sets",
                one.key.path,
                path.display(),
                hidden.origin
            );
            settings.warnings.push(warning);
        }
    }
    apply(written, env, settings);
}

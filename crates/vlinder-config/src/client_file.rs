//! `client.toml`: contexts (cluster addresses, credential, namespace) and which one is current.
//!
//! ```toml
//! current = "prod"
//! [contexts.prod]
//! addr = "http://hub-a:9091,http://hub-b:9091"   # of the harness; the rest is found beside it
//! token_file = "~/.vlinder/prod-token"           # or token = "…"
//! namespace = "team-a"
//! ```
//! A context may also name `registry_addr`, `state_addr`, `secret_addr` and `catalog_addr`.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};
use url::Url;
use vlinder_core::Namespace;

use crate::addresses::Service;
use crate::client::{checked_urls, token_of};
use crate::elements::Raw;
use crate::layers::CONFIG_BYTES_MAX;
use crate::mistake::{Mistake, Origin, nearest};
use crate::secret::Secret;
use crate::{Env, files, toml_file};

/// Keys of a context.
const CONTEXT_KEYS: [&str; 8] = [
    "addr",
    "registry_addr",
    "state_addr",
    "secret_addr",
    "catalog_addr",
    "token",
    "token_file",
    "namespace",
];

/// One cluster. No `Debug`: it may hold a secret.
#[derive(Default)]
pub(crate) struct Context {
    /// The addresses that it names.
    pub services: BTreeMap<Service, Vec<Url>>,
    /// The tenant.
    pub namespace: Option<Namespace>,
    token: Option<(Raw, Origin)>,
}

impl Context {
    /// The credential, read when it is needed.
    pub fn token(&self, env: &Env, mistakes: &mut Vec<Mistake>) -> Option<Secret> {
        let (raw, origin) = self.token.clone()?;
        token_of(raw, origin, env, mistakes)
    }
}

/// The whole file.
#[derive(Default)]
pub(crate) struct ClientFile {
    current: Option<String>,
    contexts: BTreeMap<String, Context>,
}

impl ClientFile {
    /// The file, empty where there is none.
    pub fn load(path: &Path, mistakes: &mut Vec<Mistake>) -> Self {
        match files::read(path, CONFIG_BYTES_MAX) {
            Ok(Some(text)) => Reader {
                path,
                text: &text,
                mistakes,
            }
            .file(),
            Ok(None) => Self::default(),
            Err(error) => {
                let origin = Origin::File {
                    path: path.to_owned(),
                    line: 0,
                };
                mistakes.push(Mistake::new(origin, "", format!("cannot be read: {error}")));
                Self::default()
            }
        }
    }

    /// The current context and its name.
    pub fn current(&self) -> Option<(&str, &Context)> {
        let name = self.current.as_deref()?;
        Some((name, self.contexts.get(name)?))
    }
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    mistakes: &'a mut Vec<Mistake>,
}

impl Reader<'_> {
    fn origin(&self, offset: usize) -> Origin {
        Origin::File {
            path: self.path.to_owned(),
            line: toml_file::line(self.text, offset),
        }
    }

    fn refuse(&mut self, offset: usize, key: &str, expected: impl Into<String>) {
        let mistake = Mistake::new(self.origin(offset), key, expected);
        self.mistakes.push(mistake);
    }

    fn refuse_value(&mut self, offset: usize, key: &str, expected: &str, raw: &Raw) {
        let mistake = Mistake::new(self.origin(offset), key, expected);
        self.mistakes.push(mistake.written(raw, false));
    }

    fn unknown(&mut self, offset: usize, key: &str, candidates: &[&str]) {
        let name = key.rsplit('.').next().unwrap_or(key).to_owned();
        let near = nearest(&name, candidates.iter().copied());
        let mistake = Mistake::new(self.origin(offset), key, "is not a key");
        self.mistakes.push(mistake.near(near));
    }

    fn file(&mut self) -> ClientFile {
        let mut file = ClientFile::default();
        let mut current_at = 0;
        let text = self.text;
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let at = error.span().map_or(0, |span| span.start);
            self.refuse(
                at,
                "",
                format!("is not TOML: {}", error.message().replace('\n', ", ")),
            );
        }
        for (name, value) in table.get_ref() {
            let at = name.span().start;
            match (&**name.get_ref(), value.get_ref()) {
                ("current", DeValue::String(current)) => {
                    file.current = Some(current.to_string());
                    current_at = at;
                }
                ("contexts", DeValue::Table(contexts)) => {
                    for (name, value) in contexts {
                        let at = name.span().start;
                        let path = format!("contexts.{}", name.get_ref());
                        match value.get_ref().as_table() {
                            Some(table) => {
                                let context = self.context(&path, table);
                                file.contexts.insert(name.get_ref().to_string(), context);
                            }
                            None => {
                                self.refuse(at, &path, "expected a table with addr");
                            }
                        }
                    }
                }
                ("current", _) => {
                    self.refuse(at, "current", "expected the name of a context");
                }
                ("contexts", _) => {
                    self.refuse(at, "contexts", "expected a table of contexts");
                }
                (other, _) => self.unknown(at, other, &["current", "contexts"]),
            }
        }
        if let Some(current) = file
            .current
            .clone()
            .filter(|name| !file.contexts.contains_key(name))
        {
            let near = nearest(&current, file.contexts.keys().map(String::as_str));
            let origin = self.origin(current_at);
            let mistake = Mistake::new(origin, "current", "there is no such context");
            self.mistakes.push(mistake.value(&current).near(near));
        }
        file
    }

    fn context(&mut self, path: &str, table: &DeTable<'_>) -> Context {
        let mut context = Context::default();
        for (name, value) in table {
            let at = name.span().start;
            let key = format!("{path}.{}", name.get_ref());
            let raw = toml_file::raw(value.get_ref());
            let service = match &**name.get_ref() {
                "addr" => Service::Harness,
                "registry_addr" => Service::Registry,
                "state_addr" => Service::State,
                "secret_addr" => Service::Secret,
                "catalog_addr" => Service::Catalog,
                "token" => {
                    self.token(&mut context, at, &key, raw);
                    continue;
                }
                "token_file" => {
                    let file = Raw::Table([("file".to_owned(), raw)].into());
                    self.token(&mut context, at, &key, file);
                    continue;
                }
                "namespace" => {
                    let text = raw.to_string();
                    match Namespace::new(&text) {
                        Ok(namespace) if matches!(raw, Raw::Text(_)) => {
                            context.namespace = Some(namespace);
                        }
                        _ => {
                            let expected = "expected 1 to 63 of a-z, 0-9 and -";
                            self.refuse_value(at, &key, expected, &raw);
                        }
                    }
                    continue;
                }
                _ => {
                    self.unknown(at, &key, &CONTEXT_KEYS);
                    continue;
                }
            };
            match checked_urls(service, &joined(&raw)) {
                Ok(urls) => drop(context.services.insert(service, urls)),
                Err(expected) => self.refuse_value(at, &key, &expected, &raw),
            }
        }
        context
    }

    fn token(&mut self, context: &mut Context, at: usize, key: &str, raw: Raw) {
        if context.token.is_some() {
            self.refuse(at, key, "token and token_file are both set; expected one");
        }
        context.token = Some((raw, self.origin(at)));
    }
}

/// An array of addresses is a comma list.
fn joined(raw: &Raw) -> Raw {
    match raw {
        Raw::List(items) if items.iter().all(|item| matches!(item, Raw::Text(_))) => Raw::Text(
            items
                .iter()
                .map(Raw::to_string)
                .collect::<Vec<_>>()
                .join(","),
        ),
        other => other.clone(),
    }
}

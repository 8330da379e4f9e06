//! What a process inherits: variables, home, host name, working directory. The only place in the
//! workspace that reads them; everyone else takes an [`Env`], so that tests are pure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The surroundings of a process, as plain data.
#[derive(Clone, PartialEq, Eq)]
pub struct Env {
    vars: BTreeMap<String, String>,
    /// Variables whose value is not UTF-8, by name.
    not_unicode: BTreeSet<String>,
    home: Option<PathBuf>,
    host_name: String,
    working_dir: PathBuf,
}

impl Env {
    /// The surroundings of this process. Variables with a name that is not UTF-8 are left out.
    pub fn from_process() -> Self {
        let mut vars = BTreeMap::new();
        let mut not_unicode = BTreeSet::new();
        for (name, value) in std::env::vars_os() {
            let Ok(name) = name.into_string() else {
                continue;
            };
            match value.into_string() {
                Ok(value) => drop(vars.insert(name, value)),
                Err(_) => drop(not_unicode.insert(name)),
            }
        }
        let home = vars
            .get("HOME")
            .filter(|home| !home.is_empty())
            .map(PathBuf::from);
        let host_name = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        let working_dir = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Self {
            vars,
            not_unicode,
            home,
            host_name,
            working_dir,
        }
    }

    /// Surroundings without any variable; `home` is also the working directory.
    pub fn bare(home: impl Into<PathBuf>, host_name: &str) -> Self {
        let home = home.into();
        Self {
            vars: BTreeMap::new(),
            not_unicode: BTreeSet::new(),
            working_dir: home.clone(),
            home: Some(home),
            host_name: host_name.to_owned(),
        }
    }

    /// The same with one more variable.
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.vars.insert(name.to_owned(), value.into());
        self
    }

    /// A variable, if it is set and UTF-8.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str)
    }

    /// All variables that are UTF-8, by name.
    pub fn vars(&self) -> impl Iterator<Item = (&str, &str)> {
        self.vars
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The home directory of the user, if the environment names one.
    pub fn home(&self) -> Option<&Path> {
        self.home.as_deref()
    }

    /// The name of this machine.
    pub fn host_name(&self) -> &str {
        &self.host_name
    }

    /// Where relative paths of variables and flags begin.
    pub fn working_dir(&self) -> &Path {
        &self.working_dir
    }

    /// Names of the variables whose value is not UTF-8.
    pub(crate) fn not_unicode(&self) -> impl Iterator<Item = &str> {
        self.not_unicode.iter().map(String::as_str)
    }

    /// Whether a host name or address in a URL means this machine.
    pub(crate) fn is_this_host(&self, host: &str) -> bool {
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_ascii_lowercase();
        if let Ok(address) = host.parse::<std::net::IpAddr>() {
            return address.is_loopback() || address.is_unspecified();
        }
        let own = self.host_name.to_ascii_lowercase();
        let own_short = own.split('.').next().unwrap_or_default();
        host == "localhost"
            || host.ends_with(".localhost")
            || (!host.is_empty() && (host == own || host == own_short))
    }
}

/// Names only: a variable may hold a secret.
impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env")
            .field("vars", &self.vars.keys())
            .field("home", &self.home)
            .field("host_name", &self.host_name)
            .field("working_dir", &self.working_dir)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host() {
        let env = Env::bare("/home/a", "Hub.example.org");
        for host in [
            "localhost",
            "127.0.0.1",
            "127.8.0.1",
            "[::1]",
            "hub",
            "HUB.example.org",
            "0.0.0.0",
        ] {
            assert!(env.is_this_host(host), "{host}");
        }
        for host in [
            "gpu",
            "10.0.0.1",
            "hub.example.com",
            "",
            "localhost.example.org",
        ] {
            assert!(!env.is_this_host(host), "{host}");
        }
    }

    #[test]
    fn the_process_has_surroundings() {
        let env = Env::from_process();
        assert!(!env.host_name().is_empty());
        assert!(env.get("PATH").is_some());
        assert!(env.working_dir().is_absolute());
    }

    #[test]
    fn debug_shows_no_value() {
        let env = Env::bare("/", "h").with("VLINDER_AUTH_TOKEN", "s3cret");
        assert!(!format!("{env:?}").contains("s3cret"));
    }
}

//! `agent new` and `fleet new`: small agents that deploy and answer as they stand.

use crate::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use vlinder_core::AgentName;

/// What is replaced by the agent's or fleet's name.
const NAME: &str = "@NAME@";

/// A file of a scaffold: its name, what is in it, its mode.
type File = (&'static str, &'static str, u32);

const PYTHON: &[File] = &[
    ("agent.toml", include_str!("python/agent.toml"), 0o644),
    ("agent.py", include_str!("python/agent.py"), 0o755),
    ("Dockerfile", include_str!("python/Dockerfile"), 0o644),
    ("README.md", include_str!("python/README.md"), 0o644),
];
const JS: &[File] = &[
    ("agent.toml", include_str!("js/agent.toml"), 0o644),
    ("agent.mjs", include_str!("js/agent.mjs"), 0o644),
    ("Dockerfile", include_str!("js/Dockerfile"), 0o644),
    ("README.md", include_str!("js/README.md"), 0o644),
];
const TS: &[File] = &[
    ("agent.toml", include_str!("ts/agent.toml"), 0o644),
    ("agent.mts", include_str!("ts/agent.mts"), 0o644),
    ("Dockerfile", include_str!("ts/Dockerfile"), 0o644),
    ("README.md", include_str!("ts/README.md"), 0o644),
];
const GO: &[File] = &[
    ("agent.toml", include_str!("go/agent.toml"), 0o644),
    ("main.go", include_str!("go/main.go"), 0o644),
    ("go.mod", include_str!("go/go.mod"), 0o644),
    ("Dockerfile", include_str!("go/Dockerfile"), 0o644),
    ("README.md", include_str!("go/README.md"), 0o644),
];
const RUST: &[File] = &[
    ("agent.toml", include_str!("rust/agent.toml"), 0o644),
    ("src/main.rs", include_str!("rust/main.rs"), 0o644),
    ("Cargo.toml", include_str!("rust/Cargo.toml.in"), 0o644),
    ("run.sh", include_str!("rust/run.sh"), 0o755),
    (".vlinderignore", include_str!("rust/vlinderignore"), 0o644),
    ("Dockerfile", include_str!("rust/Dockerfile"), 0o644),
    ("README.md", include_str!("rust/README.md"), 0o644),
];
/// Languages as they may be spelled, and what is written for them.
const LANGUAGES: [(&[&str], &[File]); 5] = [
    (&["python", "py"], PYTHON),
    (&["go", "golang"], GO),
    (&["js", "javascript"], JS),
    (&["ts", "typescript"], TS),
    (&["rust", "rs"], RUST),
];

/// Writes the agent into a new directory of its name below `parent`.
pub fn write(lang: &str, name: &str, parent: &Path) -> Result<(PathBuf, Vec<&'static str>), Error> {
    let known = LANGUAGES.iter().find(|(names, _)| names.contains(&lang));
    let Some((_, files)) = known else {
        let names: Vec<&str> = LANGUAGES.iter().map(|(names, _)| names[0]).collect();
        return Err(Error::Usage(format!(
            "{lang:?}: there are scaffolds for {}; an agent may be written in any language that serves \
             HTTP, see the agent contract in the documentation",
            names.join(", ")
        )));
    };
    let (name, dir) = make(name, parent)?;
    for (file, text, mode) in *files {
        put(&dir.join(file), &text.replace(NAME, name.as_str()), *mode)?;
    }
    Ok((dir, files.iter().map(|(file, ..)| *file).collect()))
}

/// Writes a fleet of two agents into a new directory of its name below `parent`.
pub fn write_fleet(name: &str, parent: &Path) -> Result<(PathBuf, Vec<&'static str>), Error> {
    const TOO_LONG: &str =
        "a fleet's name must leave room for the names of its agents: at most 56 characters";
    if name.len() > 56 {
        return Err(Error::Usage(TOO_LONG.to_owned()));
    }
    let (name, dir) = make(name, parent)?;
    let fleet = include_str!("fleet/fleet.toml").replace(NAME, name.as_str());
    put(&dir.join("fleet.toml"), &fleet, 0o644)?;
    let readme = include_str!("fleet/README.md").replace(NAME, name.as_str());
    put(&dir.join("README.md"), &readme, 0o644)?;
    for (alias, what, answer) in [
        (
            "front",
            "Gives each word to the helper.",
            include_str!("fleet/front.py"),
        ),
        (
            "helper",
            "Turns a word around.",
            include_str!("fleet/helper.py"),
        ),
    ] {
        let agent = format!("{name}-{alias}");
        let manifest = include_str!("fleet/agent.toml").replace("@AGENT@", &agent);
        let manifest = manifest.replace("@WHAT@", what);
        put(&dir.join(alias).join("agent.toml"), &manifest, 0o644)?;
        let source = with_answer(include_str!("python/agent.py"), answer);
        put(
            &dir.join(alias).join("agent.py"),
            &source.replace(NAME, &agent),
            0o755,
        )?;
    }
    let files = vec!["fleet.toml", "front", "helper", "README.md"];
    Ok((dir, files))
}

/// The scaffold of an agent with another function `answer`.
fn with_answer(source: &str, answer: &str) -> String {
    let begin = source.find("def answer(").unwrap_or(source.len());
    let end = source.find("class Handler").unwrap_or(source.len());
    [&source[..begin], answer, &source[end..]].concat()
}

/// Makes the directory `name` below `parent`; nothing is ever written into one that exists.
fn make(name: &str, parent: &Path) -> Result<(AgentName, PathBuf), Error> {
    let name = AgentName::new(name).map_err(|error| Error::Usage(error.to_string()))?;
    let dir = parent.join(name.as_str());
    match fs::create_dir(&dir) {
        Ok(()) => Ok((name, dir)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(Error::Conflict(format!(
            "{} exists already; choose another name or directory",
            dir.display()
        ))),
        Err(error) => Err(Error::io(format!("cannot make {}", dir.display()))(error)),
    }
}

fn put(path: &Path, text: &str, mode: u32) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(path, text))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(Error::io(format!("cannot write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlinder_core::manifest::{AgentManifest, FleetManifest};

    #[test]
    fn it_is_complete_and_its_manifest_is_taken() {
        for (names, _) in LANGUAGES {
            let parent = tempfile::tempdir().unwrap();
            let (dir, files) = write(names[0], "greeter-2", parent.path()).unwrap();
            assert_eq!(dir, parent.path().join("greeter-2"));
            assert!(files.contains(&"Dockerfile") && files.contains(&"README.md"));
            for file in files {
                let text = fs::read_to_string(dir.join(file)).unwrap();
                assert!(!text.contains(NAME), "{names:?} {file}");
            }
            let text = fs::read_to_string(dir.join("agent.toml")).unwrap();
            let manifest = AgentManifest::parse(&text).unwrap();
            assert_eq!(manifest.name.as_str(), "greeter-2");
            assert!(manifest.object_store().is_some());
        }
    }

    #[test]
    fn a_fleet_is_complete_and_its_manifests_are_taken() {
        let parent = tempfile::tempdir().unwrap();
        let (dir, _) = write_fleet("team", parent.path()).unwrap();
        let text = fs::read_to_string(dir.join("fleet.toml")).unwrap();
        let fleet = FleetManifest::parse(&text).unwrap();
        for (alias, agent) in &fleet.agents {
            let dir = dir.join(&agent.path);
            let text = fs::read_to_string(dir.join("agent.toml")).unwrap();
            let manifest = AgentManifest::parse(&text).unwrap();
            assert_eq!(manifest.name.as_str(), format!("team-{alias}"));
            let source = fs::read_to_string(dir.join("agent.py")).unwrap();
            assert!(
                !source.contains('@') && source.contains("class Handler"),
                "{source}"
            );
            assert_eq!(source.matches("def answer(").count(), 1);
        }
        assert_eq!(
            write_fleet("team", parent.path()).unwrap_err().exit_code(),
            9
        );
        let long = "x".repeat(60);
        assert_eq!(
            write_fleet(&long, parent.path()).unwrap_err().exit_code(),
            2
        );
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_else_is_made() {
        let parent = tempfile::tempdir().unwrap();
        write("python", "a", parent.path()).unwrap();
        let again = write("python", "a", parent.path()).unwrap_err();
        assert_eq!(again.exit_code(), 9);
        for (lang, name) in [("cobol", "b"), ("python", "../b"), ("go", "B"), ("", "b")] {
            let error = write(lang, name, parent.path()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{lang} {name}");
        }
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
        let other = write("cobol", "b", parent.path()).unwrap_err().to_string();
        assert!(other.contains("python, go, js, ts, rust"), "{other}");
    }
}

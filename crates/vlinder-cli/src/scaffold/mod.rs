//! `agent new`: a small agent that deploys and answers as it stands.

use crate::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use vlinder_core::AgentName;

/// What is replaced by the agent's name.
const NAME: &str = "@NAME@";
const PYTHON: [(&str, &str, u32); 3] = [
    ("agent.toml", include_str!("agent.toml"), 0o644),
    ("agent.py", include_str!("agent.py"), 0o755),
    ("README.md", include_str!("README.md"), 0o644),
];

/// Writes the agent into a new directory of its name below `parent`.
pub fn write(lang: &str, name: &str, parent: &Path) -> Result<(PathBuf, Vec<&'static str>), Error> {
    if !matches!(lang, "python" | "py") {
        return Err(Error::Usage(format!(
            "{lang:?}: this release has a scaffold for python only; an agent may be written in any \
             language that serves HTTP, see the agent contract in the documentation"
        )));
    }
    let name = AgentName::new(name).map_err(|error| Error::Usage(error.to_string()))?;
    let dir = parent.join(name.as_str());
    match fs::create_dir(&dir) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(Error::Conflict(format!(
                "{} exists already; choose another name or directory",
                dir.display()
            )));
        }
        Err(error) => return Err(Error::io(format!("cannot make {}", dir.display()))(error)),
    }
    for (file, text, mode) in PYTHON {
        let path = dir.join(file);
        let text = text.replace(NAME, name.as_str());
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .map_err(Error::io(format!("cannot write {}", path.display())))?;
    }
    Ok((dir, PYTHON.iter().map(|(file, ..)| *file).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlinder_core::manifest::AgentManifest;

    #[test]
    fn it_is_complete_and_its_manifest_is_taken() {
        let parent = tempfile::tempdir().unwrap();
        let (dir, files) = write("python", "greeter-2", parent.path()).unwrap();
        assert_eq!(dir, parent.path().join("greeter-2"));
        for file in files {
            let text = fs::read_to_string(dir.join(file)).unwrap();
            assert!(!text.contains(NAME), "{file}");
        }
        let text = fs::read_to_string(dir.join("agent.toml")).unwrap();
        let manifest = AgentManifest::parse(&text).unwrap();
        assert_eq!(manifest.name.as_str(), "greeter-2");
        assert!(manifest.object_store().is_some());
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_else_is_made() {
        let parent = tempfile::tempdir().unwrap();
        write("python", "a", parent.path()).unwrap();
        let again = write("python", "a", parent.path()).unwrap_err();
        assert_eq!(again.exit_code(), 9);
        for (lang, name) in [("go", "b"), ("python", "../b"), ("python", "B"), ("", "b")] {
            let error = write(lang, name, parent.path()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{lang} {name}");
        }
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
        let go = write("go", "b", parent.path()).unwrap_err().to_string();
        assert!(go.contains("python"), "{go}");
    }
}

//! Images for container agents, made here from one static program, and a look at what Docker has.
//!
//! Where there is no Docker these tests fail and say so; `scripts/test` leaves them out there, loudly.

use super::{Node, NodeSpec};
use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Runs `docker` and gives what it says.
#[track_caller]
pub fn docker(args: &[&str]) -> String {
    let done = Command::new("docker")
        .args(args)
        .stdin(Stdio::null())
        .output();
    let done = done.unwrap_or_else(|error| {
        panic!("these tests need Docker, and `docker` cannot be run: {error}; scripts/test leaves them out where there is none")
    });
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "docker {args:?}: {said}");
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

/// Whether there is an image of that name here.
pub fn has_image(name: &str) -> bool {
    let shown = Command::new("docker")
        .args(["image", "inspect", name])
        .output();
    shown.is_ok_and(|done| done.status.success())
}

/// The agent of `fixtures/boxed`, compiled.
pub fn program() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/boxed/agent.rs");
    let text = fs::read(&source).expect("the fixture is there");
    let hash = vlinder_core::ContentHash::of(&text).to_string();
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = directory.join(format!("boxed-{}", &hash[..16]));
    if program.exists() {
        return program;
    }
    // Tests that start at the same time each make one; the last name stands.
    let fresh = directory.join(format!("boxed-{:016x}", rand::random::<u64>()));
    let made = Command::new("rustc")
        .args([
            "--edition=2024",
            "-Copt-level=1",
            "-Cpanic=abort",
            "-Cstrip=symbols",
        ])
        .args(["-Ctarget-feature=+crt-static", "-o"])
        .args([&fresh, &source])
        .output()
        .expect("rustc can be run");
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    fs::rename(&fresh, &program).expect("it is in the same directory");
    program
}

/// An image; removed when dropped.
pub struct Image {
    /// By which agents name it.
    pub name: String,
    /// All that the name has meant.
    ids: RefCell<Vec<String>>,
}

impl Image {
    /// An image of the fixture's agent.
    pub fn agent() -> Self {
        Self::with(&["CMD [\"/agent\"]"])
    }

    /// One with other settings, in the form of a Dockerfile's lines.
    pub fn with(changes: &[&str]) -> Self {
        let image = Self {
            name: format!("vlinder-test-{:016x}:1", rand::random::<u64>()),
            ids: RefCell::default(),
        };
        image.import(changes);
        image
    }

    /// Gives the name another image.
    pub fn import(&self, changes: &[&str]) {
        let program = program();
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::copy(program, directory.path().join("agent")).expect("the program is there");
        let tar = directory.path().join("image.tar");
        let packed = Command::new("tar")
            .arg("-C")
            .arg(directory.path())
            .arg("-cf")
            .arg(&tar)
            .arg("agent")
            .status();
        assert!(packed.expect("tar can be run").success());
        let mut import = Command::new("docker");
        import.arg("import");
        for change in changes {
            import.args(["-c", change]);
        }
        import
            .args(["-", &self.name])
            .stdin(File::open(&tar).expect("it was just made"));
        let imported = import.output().expect("docker can be run");
        let said = String::from_utf8_lossy(&imported.stderr);
        assert!(imported.status.success(), "these tests need Docker: {said}");
        self.ids.borrow_mut().push(self.id());
    }

    /// Its id.
    pub fn id(&self) -> String {
        docker(&["image", "inspect", "-f", "{{.Id}}", &self.name])
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // It is gone already where two of them were equal.
        for image in std::iter::once(&self.name).chain(self.ids.get_mut().iter()) {
            let _ = Command::new("docker")
                .args(["image", "rm", "-f", image])
                .output();
        }
    }
}

/// A container of a node's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    pub id: String,
    pub name: String,
    /// Of its first process, on this machine.
    pub pid: u32,
    pub started: String,
}

/// The containers of a node, whatever their state.
pub fn containers(node: &str) -> Vec<Container> {
    let filter = format!("label=io.vlinder.node={node}");
    let ids = docker(&["ps", "-aq", "--no-trunc", "--filter", &filter]);
    let mut found = vec![];
    for id in ids.lines() {
        let format = "{{.Id}} {{.Name}} {{.State.Pid}} {{.State.StartedAt}}";
        // It may go between the two questions.
        let shown = Command::new("docker")
            .args(["inspect", "-f", format, id])
            .output();
        let shown = shown.expect("docker can be run").stdout;
        let shown = String::from_utf8_lossy(&shown);
        let mut words = shown.split_whitespace().map(str::to_owned);
        if let (Some(id), Some(name), Some(pid), Some(started)) =
            (words.next(), words.next(), words.next(), words.next())
        {
            let pid = pid.parse().expect("a number");
            found.push(Container {
                id,
                name,
                pid,
                started,
            });
        }
    }
    found
}

/// Removes whatever containers a node has left when its test fails.
pub struct Cleaned(String);

impl Cleaned {
    /// Starts a node that is cleaned up after; the node must be dropped first, so it comes last.
    pub async fn start(spec: &NodeSpec) -> (Self, Node) {
        let cleaned = Self(spec.name().to_owned());
        (cleaned, spec.start().await)
    }
}

impl Drop for Cleaned {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for container in containers(&self.0) {
                let _ = Command::new("docker")
                    .args(["rm", "-fv", &container.id])
                    .output();
            }
        }
    }
}

//! The public behaviour of the configuration, on files in temporary directories.

mod client;
mod derivations;
mod layers;
mod mistakes;
mod samples;
mod show;

use std::path::Path;

use vlinder_config::{Env, Loaded, Mistake, Sources, load};

/// A user on the machine `this` with an empty home.
struct Home {
    dir: tempfile::TempDir,
    env: Env,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let env = Env::bare(dir.path(), "this.example.org");
        Self { dir, env }
    }

    fn data_dir(&self) -> std::path::PathBuf {
        self.dir.path().join(".vlinder")
    }

    fn var(mut self, name: &str, value: &str) -> Self {
        self.env = self.env.with(name, value);
        self
    }

    /// Writes a file below the data directory.
    fn file(self, name: &str, text: &str) -> Self {
        let path = self.data_dir().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    fn config(self, text: &str) -> Self {
        self.file("config.toml", text)
    }

    fn load(&self) -> Result<Loaded, Vec<Mistake>> {
        load(&Sources::new(&self.env))
    }

    fn loaded(&self) -> Loaded {
        self.load()
            .unwrap_or_else(|mistakes| panic!("{:#?}", lines(&mistakes, self.dir.path())))
    }

    /// The mistakes as text, with the home directory as `~`.
    fn mistakes(&self) -> Vec<String> {
        lines(
            &self.load().map(|_| ()).expect_err("there are mistakes"),
            self.dir.path(),
        )
    }
}

fn lines(mistakes: &[Mistake], home: &Path) -> Vec<String> {
    let home = home.display().to_string();
    mistakes
        .iter()
        .map(|mistake| mistake.to_string().replace(&home, "~"))
        .collect()
}

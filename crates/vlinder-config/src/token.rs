//! The credential of a node that was given none: made once, readable by its user only.

use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rand::TryRngCore;
use rand::rngs::OsRng;

use crate::files;
use crate::secret::Secret;

/// Length of a token that we make, in random bytes (written as twice as many hex digits).
const TOKEN_BYTES: usize = 32;

/// Largest token file, in bytes.
const TOKEN_FILE_BYTES_MAX: u64 = 8 * 1024;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be made, read or removed.
    #[error("cannot use the token file {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{path} holds no token; delete it and start the daemon again")]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The system gives no random bytes.
    #[error("the system gives no random bytes")]
    Random(#[source] rand::rand_core::OsError),
}

/// Where the token of a node lies.
pub(crate) fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("run").join("token")
}

/// The token in `<data_dir>/run/token`, if there is one.
pub(crate) fn read(data_dir: &Path) -> Result<Option<Secret>, Error> {
    let path = path(data_dir);
    let text = files::read(&path, TOKEN_FILE_BYTES_MAX).map_err(|source| Error::Io {
        path: path.clone(),
        source,
    })?;
    let Some(text) = text else { return Ok(None) };
    let token = text.trim_end();
    match !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(Some(Secret::new(token))),
        false => Err(Error::Malformed { path }),
    }
}

/// The token in `<data_dir>/run/token`; makes it (0600, 32 random bytes in hex) where it is
/// missing. Of several callers at once all get the same one.
pub fn ensure_token(data_dir: &Path) -> Result<Secret, Error> {
    let path = path(data_dir);
    let io = |source| Error::Io {
        path: path.clone(),
        source,
    };
    if let Some(token) = read(data_dir)? {
        // A copy or a restore may have opened it to others.
        let mode = std::fs::metadata(&path).map_err(io)?.permissions().mode();
        if mode & 0o077 != 0 {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).map_err(io)?;
        }
        return Ok(token);
    }
    let mut bytes = [0u8; TOKEN_BYTES];
    OsRng.try_fill_bytes(&mut bytes).map_err(Error::Random)?;
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let new = files::write_beside(&path, token.as_bytes(), 0o600).map_err(io)?;
    // A link, unlike a rename, leaves the token of whoever was first.
    let linked = std::fs::hard_link(&new, &path);
    files::remove(&new).map_err(io)?;
    match linked {
        Ok(()) => Ok(Secret::new(token)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            read(data_dir)?.ok_or_else(|| io(error))
        }
        Err(error) => Err(io(error)),
    }
}

/// The token that a starting daemon asks for: the configured one, else that of [`ensure_token`].
/// With a configured one a token file of earlier times goes, lest a client use it.
pub fn settle_token(data_dir: &Path, configured: Option<&Secret>) -> Result<Secret, Error> {
    let Some(token) = configured else {
        return ensure_token(data_dir);
    };
    let path = path(data_dir);
    files::remove(&path).map_err(|source| Error::Io { path, source })?;
    Ok(token.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let token = ensure_token(dir.path()).unwrap();
        assert_eq!(token.expose().len(), 2 * TOKEN_BYTES);
        assert_eq!(ensure_token(dir.path()).unwrap(), token);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path(dir.path())), 0o600);
        assert_eq!(mode(&dir.path().join("run")), 0o700);
        assert_eq!(
            std::fs::read_dir(dir.path().join("run")).unwrap().count(),
            1
        );

        std::fs::set_permissions(path(dir.path()), PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(ensure_token(dir.path()).unwrap(), token);
        assert_eq!(mode(&path(dir.path())), 0o600);
    }

    #[test]
    fn racers_agree() {
        let dir = tempfile::tempdir().unwrap();
        let tokens: Vec<Secret> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| ensure_token(dir.path()).unwrap()))
                .collect();
            racers
                .into_iter()
                .map(|racer| racer.join().unwrap())
                .collect()
        });
        assert!(tokens.iter().all(|token| *token == tokens[0]));
    }

    #[test]
    fn a_configured_token_replaces_the_file() {
        let dir = tempfile::tempdir().unwrap();
        ensure_token(dir.path()).unwrap();
        let configured = Secret::new("0123456789abcdef");
        assert_eq!(
            settle_token(dir.path(), Some(&configured)).unwrap(),
            configured
        );
        assert!(!path(dir.path()).exists());
    }

    #[test]
    fn rubbish_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        for rubbish in ["", "a b", "\n", "tökén"] {
            std::fs::write(path(dir.path()), rubbish).unwrap();
            assert!(
                matches!(ensure_token(dir.path()), Err(Error::Malformed { .. })),
                "{rubbish:?}"
            );
        }
    }
}

//! The two files of the registry: a secret that is made once, and a text that is replaced as a whole.

use std::{fs, io, path::Path};

use crate::{clock::Clock, data_dir::write_whole};

const SECRET_BYTES: usize = 32;

pub(super) fn read_or_make_secret(path: &Path, clock: &dyn Clock) -> io::Result<Vec<u8>> {
    match fs::read(path) {
        Ok(secret) => check_secret(secret, path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let words = (0..SECRET_BYTES / 8).flat_map(|_| clock.random_u64().to_le_bytes());
            let secret: Vec<u8> = words.collect();
            write_whole(path, &secret, 0o600)?;
            Ok(secret)
        }
        Err(e) => Err(e),
    }
}

/// The secret of the file that `secret_file` names.
pub(crate) fn read_secret(path: &Path) -> io::Result<Vec<u8>> {
    let read = fs::read(path).and_then(|secret| check_secret(secret, path));
    read.map_err(|e| io::Error::new(e.kind(), format!("secret_file = {path:?}: {e}")))
}

fn check_secret(secret: Vec<u8>, path: &Path) -> io::Result<Vec<u8>> {
    if secret.len() >= SECRET_BYTES {
        return Ok(secret);
    }
    let problem = format!(
        "{} has {} bytes, a secret has at least {SECRET_BYTES}",
        path.display(),
        secret.len()
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, problem))
}

//! The socket file, who may come in, and a thread for each who does.
//!
//! The file is made under a name of its own, given its mode, and only then put where clients look: nobody can
//! connect before the mode holds, and what a killed node left behind is replaced in one step.

use std::{
    fs,
    io::{self, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use kvproto::Reason;

use super::{Refused, Shared, reply::Reply, session::Session};
use crate::config::SocketMode;

/// A connection's thread runs a few frames deep and keeps its buffers on the heap.
const STACK_BYTES: usize = 512 << 10;

/// Pause after an accept that failed, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Binds `path`, replacing a socket file that nobody listens on any more. The lock on the data folder has already made
/// sure that no other node runs there.
pub(super) fn bind(path: &Path, mode: SocketMode) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process listens there",
        ));
    }
    let mut new = path.as_os_str().to_owned();
    new.push("+");
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode.0))
        .and_then(|()| fs::rename(&new, path))
        .inspect_err(|_| drop(fs::remove_file(&new)))?;
    Ok(listener)
}

/// Takes connections in until the node drains.
pub(super) fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    while !shared.draining.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => welcome(stream, shared),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if shared.draining.load(Ordering::Relaxed) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a same-host connection");
                thread::park_timeout(ACCEPT_PAUSE);
            }
        }
    }
}

/// Gives a connection its thread, or says why not.
fn welcome(stream: UnixStream, shared: &Arc<Shared>) {
    let stream = Arc::new(stream);
    let admitted = judge_peer(&stream, shared.limits.mode);
    let Some(number) = shared.enter(&stream) else {
        let most = shared.limits.max_connections;
        let problem = format!("{most} connections are open already (local_max_connections)");
        return turn_away(&stream, Refused::new(Reason::Overloaded, problem));
    };
    let theirs = Arc::clone(shared);
    let serve = {
        let stream = Arc::clone(&stream);
        move || {
            let place = Place {
                shared: theirs,
                number,
            };
            if let Err(error) = Session::new(Arc::clone(&place.shared), stream, admitted).run() {
                tracing::debug!(%error, "a same-host connection ended early");
            }
        }
    };
    let thread = thread::Builder::new()
        .name(format!("terrace-local-{number}"))
        .stack_size(STACK_BYTES)
        .spawn(serve);
    if let Err(error) = thread {
        shared.leave(number);
        tracing::warn!(%error, "no thread for a same-host connection");
        turn_away(
            &stream,
            Refused::new(Reason::Overloaded, "no thread can be had"),
        );
    }
}

/// A connection's entry among the open ones; gone when its thread is, however it ends.
struct Place {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.leave(self.number);
    }
}

/// Whose process it is at the other end. While the file's mode opens the socket to nobody else, only the node's own
/// user and root are served, even if the file was made reachable for others since.
fn judge_peer(stream: &UnixStream, mode: SocketMode) -> Result<(), Refused> {
    if mode.opens_to_others() {
        return Ok(());
    }
    let refused = |problem| Err(Refused::new(Reason::Unauthenticated, problem));
    match rustix::net::sockopt::socket_peercred(stream) {
        Ok(peer) if is_welcome(peer.uid.as_raw(), rustix::process::geteuid().as_raw()) => Ok(()),
        Ok(peer) => refused(format!(
            "user {} may not use this socket (local_socket_mode)",
            peer.uid.as_raw()
        )),
        Err(error) => refused(format!("cannot tell whose process this is: {error}")),
    }
}

fn is_welcome(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid || peer_uid == 0
}

/// Says why and closes, without waiting for anybody.
fn turn_away(stream: &UnixStream, refused: Refused) {
    let mut frame = Vec::new();
    if Reply::refusal(0, refused).encode(&mut frame).is_ok() && stream.set_nonblocking(true).is_ok()
    {
        let mut stream = stream;
        let _ = stream.write(&frame); // a new socket's buffer takes it whole, or the peer is gone
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_stale_socket_file_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("local.sock");
        drop(bind(&path, SocketMode(0o600)).unwrap());
        assert!(path.exists(), "a killed node leaves its file behind");
        let living = bind(&path, SocketMode(0o600)).unwrap();
        let refused = bind(&path, SocketMode(0o600)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop(living);
    }

    #[test]
    fn the_file_has_its_mode_before_anybody_finds_it() {
        let dir = tempfile::TempDir::new().unwrap();
        for mode in [0o600, 0o660, 0o666] {
            let path = dir.path().join(format!("{mode:o}.sock"));
            let _listener = bind(&path, SocketMode(mode)).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, mode);
        }
    }

    #[test]
    fn only_the_nodes_own_user_and_root_are_welcome() {
        assert!(is_welcome(1000, 1000));
        assert!(is_welcome(0, 1000));
        assert!(!is_welcome(1001, 1000));
        assert!(!is_welcome(1001, 0));
    }
}

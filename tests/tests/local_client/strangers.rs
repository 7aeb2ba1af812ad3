//! Processes of another user.

use std::{fs, os::unix::fs::PermissionsExt};

use kvserver::config::SocketMode;
use kvtests::node::TestNode;

use crate::process::Process;

/// A user who owns nothing here: nobody.
const STRANGER: u32 = 65_534;

/// A client of the node in `mode`, run by the stranger. `None`, with the reason printed, where that cannot be.
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
fn stranger(mode: &str, endpoint: &str) -> Option<Process> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can start a process of another user");
        return None;
    }
    match Process::client_of_user(STRANGER, mode, endpoint) {
        Ok(process) => Some(process),
        Err(error) => {
            println!("skipped: user {STRANGER} cannot run the test's program: {error}");
            None
        }
    }
}

/// Where the socket is, reachable for everybody whatever its mode was.
fn reachable(node: &TestNode) -> String {
    let path = node.node.local_path().expect("on").to_owned();
    for (path, mode) in [(node.dir.path(), 0o755), (&path, 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
    }
    path.to_str().expect("text").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_user_is_refused_at_the_socket_and_served_over_grpc() {
    let node = TestNode::start(|_| {}).await;
    let socket = reachable(&node);
    let Some(mut knocking) = stranger("knock", &socket) else {
        return;
    };
    assert_eq!(
        knocking.line(),
        format!("Unauthenticated: user {STRANGER} may not use this socket (local_socket_mode)")
    );
    let mut client = stranger("paths", &node.node.endpoint()).expect("it ran before");
    assert_eq!(client.line(), "local 0 grpc 12");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_user_comes_in_where_the_socket_is_open_to_others() {
    let node = TestNode::start(|config| config.local_socket_mode = SocketMode(0o666)).await;
    let socket = reachable(&node);
    let Some(mut knocking) = stranger("knock", &socket) else {
        return;
    };
    assert_eq!(knocking.line(), "attached");
    let mut client = stranger("paths", &node.node.endpoint()).expect("it ran before");
    assert_eq!(client.line(), "local 12 grpc 0");
}

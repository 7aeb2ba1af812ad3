//! Child processes that are killed and stopped: clients and nodes.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A process that speaks in lines; it ends with its handle.
pub(crate) struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    /// `local_client_process MODE ENDPOINT`.
    pub(crate) fn client(mode: &str, endpoint: &str) -> Self {
        Self::start(Command::new(env!("CARGO_BIN_EXE_local_client_process")).args([mode, endpoint]))
    }

    /// The same, run by another user.
    pub(crate) fn client_of_user(user: u32, mode: &str, endpoint: &str) -> io::Result<Self> {
        let program = env!("CARGO_BIN_EXE_local_client_process");
        let mut command = Command::new(program);
        // Somewhere that anybody may be.
        let command = command.args([mode, endpoint]).current_dir("/");
        Self::try_start(command.uid(user).gid(user))
    }

    /// A node over this folder, and its endpoint.
    pub(crate) fn node(dir: &Path, listen: &str) -> (Self, String) {
        let mut node = Self::start(
            Command::new(env!("CARGO_BIN_EXE_node_process"))
                .arg(dir)
                .arg(listen),
        );
        let endpoint = node.line();
        (node, endpoint)
    }

    fn start(command: &mut Command) -> Self {
        Self::try_start(command).expect("a process")
    }

    fn try_start(command: &mut Command) -> io::Result<Self> {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let out = BufReader::new(child.stdout.take().expect("piped"));
        Ok(Self { child, out })
    }

    /// The next line it says; empty when it has ended.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("text");
        line.trim().to_owned()
    }

    pub(crate) fn go(&mut self) {
        let input = self.child.stdin.as_mut().expect("piped");
        writeln!(input, "go").expect("it listens");
    }

    /// Stops its clock; it has stopped when this returns.
    pub(crate) fn freeze(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP).expect("it lives");
        waitpid(Some(pid), WaitOptions::UNTRACED).expect("it stops");
    }

    pub(crate) fn thaw(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).expect("it lives");
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it lives");
        self.child.wait().expect("it ends");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A frozen process dies of SIGKILL too; a dead one does not mind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

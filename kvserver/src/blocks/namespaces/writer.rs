//! The one thread that writes the registry's file.
//!
//! What waits is judged in order of asking, made durable by one write, and answered. Errors: those of the table, and
//! of the disk; then nobody of the batch is told yes, and the registry is as it was. A disk that is full is no such
//! error: RAM goes on taking blocks, and a client opens its namespaces again after a restart anyway.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, mpsc},
};

use kvproto::NamespaceId;
use tokio::sync::oneshot;

use super::{
    Bounds, Known, Shared,
    names::{Manner, Names, Record},
};
use crate::{
    blocks::BlocksError,
    data_dir::{is_no_room, write_whole},
    engine::TenantId,
};

/// Asks that may wait for the registry's file; each is a caller that waits, and one write serves them all.
pub(super) const MAX_OPENING: usize = 256;

/// A namespace to be opened, and who waits for it.
pub(super) struct Ask {
    pub(super) tenant: TenantId,
    pub(super) record: Record,
    pub(super) manner: Manner,
    pub(super) answer: oneshot::Sender<Result<Option<String>, BlocksError>>,
}

/// The one who writes the file.
pub(super) struct Writer {
    pub(super) file: PathBuf,
    pub(super) bounds: Bounds,
    pub(super) shared: Arc<Shared>,
}

impl Writer {
    /// Until nobody can ask any more.
    pub(super) fn run(&self, asked: &mpsc::Receiver<Ask>) {
        while let Ok(first) = asked.recv() {
            let waiting = asked.try_iter().take(MAX_OPENING - 1);
            self.serve(std::iter::once(first).chain(waiting).collect());
        }
    }

    /// Judges asks in order, makes them durable together, and answers.
    fn serve(&self, asks: Vec<Ask>) {
        let mut next = self.shared.names.read().clone();
        let mut new: Vec<(NamespaceId, Known)> = Vec::new();
        let mut spaces = Vec::new();
        let mut answers = Vec::new();
        for ask in &asks {
            let judged = next.open(&ask.record, ask.manner, self.bounds);
            if let Ok((_, true)) = &judged {
                let id = ask.record.namespace().id(&ask.record.tenant);
                new.push((id, ask.record.known(ask.tenant)));
                spaces.push(ask.record.space());
            }
            answers.push(judged.map(|(difference, _)| difference));
        }
        let written = match new.is_empty() {
            true => Ok(()),
            false => self.write(&next).or_else(go_on_without_room),
        };
        match written {
            Ok(()) => {
                for (id, known) in &new {
                    self.shared.domains.set(*id, known.tenant.domain());
                }
                spaces
                    .into_iter()
                    .for_each(|space| self.shared.spaces.set(space));
                self.shared.known.write().extend(new);
                *self.shared.names.write() = next;
            }
            // Who asked twice in one batch leans on what was not written: nobody is told yes.
            Err(error) => {
                for answer in answers.iter_mut().filter(|answer| answer.is_ok()) {
                    let told = io::Error::new(error.kind(), error.to_string());
                    *answer = Err(BlocksError::Registry(told));
                }
            }
        }
        for (ask, answer) in asks.into_iter().zip(answers) {
            let _ = ask.answer.send(answer); // who has gone away asks again
        }
    }

    /// All of them: those that found no room before as well.
    fn write(&self, names: &Names) -> io::Result<()> {
        let records: Vec<&Record> = names.iter().collect();
        let text = serde_json::to_vec_pretty(&records).expect("plain fields");
        write_whole(&self.file, &text, 0o644)
    }
}

fn go_on_without_room(error: io::Error) -> io::Result<()> {
    if !is_no_room(&error) {
        return Err(error);
    }
    tracing::warn!(
        %error,
        "the disk is full: a new namespace is known until this node stops, and written with the next one that finds room"
    );
    Ok(())
}

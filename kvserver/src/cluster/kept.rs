//! What a node keeps of the cluster on disk: its name, and the members it knew last.
//!
//! ```text
//! data_dir/node_id        16 hex digits, made at the first start
//! data_dir/cluster.json   {"generation": of the last start, "members": [..], "before": {..}}   replaced as a whole
//! ```
//!
//! A restarted node begins with its last view, so it has its old place at once and finds the others by itself, whoever
//! told it to join the first time. Generations grow over restarts even when the machine's time went back.
//!
//! What lies on its disk was put under views that may be older: the one before the oldest change that was still young is
//! kept too, so that a node which dies while it hands runs over goes on with that in its next life. Where no change was
//! young, the last view is that one: members may come and go while a node is down.
//!
//! Errors: [`KeptError`]; a view that cannot be read is reported and forgotten, for gossip brings it again.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use kvproto::{Member, MemberId, MemberState, View};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    data_dir::{is_no_room, write_whole, write_whole_by},
};

/// Why a node's name or its view could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The file of the name.
    #[error("cannot use {}: {source}; make it readable, or name the node with --node-id", path.display())]
    Name {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name that is none.
    #[error("{} holds {text:?}, which names no node; remove it, or name the node with --node-id", path.display())]
    Nameless {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The file of the view.
    #[error("cannot write {}: {source}", path.display())]
    View {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A node's memory of the cluster.
#[derive(Debug)]
pub struct Kept {
    file: PathBuf,
    /// Who this node is.
    pub id: MemberId,
    /// This start's number; above every earlier one.
    pub generation: u64,
    /// The members known last; empty at the first start.
    pub view: View,
    /// Under which most of what lies here was put.
    pub before: Before,
    /// By way of which the file is replaced: another one in each life, because the last write of the one before may still
    /// be under way when a node is started again in the same process.
    beside: PathBuf,
    /// Held while it is replaced; true when nothing may be written any more.
    is_closed: Mutex<bool>,
}

/// The members before the oldest change that is young, or before this life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Before {
    /// When it changed, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The members then.
    pub view: View,
}

/// Names of such files, so that what crashes leave behind is little.
const BESIDES: usize = 16;

#[derive(Default, Serialize, Deserialize)]
struct Text {
    generation: u64,
    members: Vec<Record>,
    #[serde(default)]
    before: TextBefore,
}

#[derive(Default, Serialize, Deserialize)]
struct TextBefore {
    unix_ms: u64,
    members: Vec<Record>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    id: String,
    generation: u64,
    version: u64,
    weight: u32,
    zone: String,
    state: u8,
    address: String,
}

impl Kept {
    /// Reads what `data_dir` holds, and begins another life of the node; `named`: its name, if it was given one;
    /// `window`: how long a change is young.
    ///
    /// # Errors
    /// When the name can be neither read nor written.
    pub fn open(
        data_dir: &Path,
        named: &str,
        window: Duration,
        clock: &dyn Clock,
    ) -> Result<Self, KeptError> {
        let id = match named {
            "" => name(&data_dir.join("node_id"), clock)?,
            named => named.to_owned(),
        };
        let file = data_dir.join("cluster.json");
        let text = read(&file).unwrap_or_else(|problem| {
            tracing::warn!(file = %file.display(), problem, "the last view of the cluster cannot be read; starting without it");
            Text::default()
        });
        static LIVES: AtomicUsize = AtomicUsize::new(0);
        let life = LIVES.fetch_add(1, Ordering::Relaxed) % BESIDES;
        let now = clock.unix_ms();
        let view = view(text.members);
        let TextBefore { unix_ms, members } = text.before;
        let is_young = u128::from(now.saturating_sub(unix_ms)) < window.as_millis();
        let before = match is_young && !members.is_empty() {
            true => Before {
                unix_ms,
                view: self::view(members),
            },
            false => Before {
                unix_ms: now,
                view: view.clone(),
            },
        };
        let kept = Self {
            beside: file.with_extension(format!("{life}.new")),
            generation: now.max(text.generation.saturating_add(1)),
            view,
            before,
            id: MemberId(id),
            file,
            is_closed: Mutex::new(false),
        };
        // Before anybody hears of this life: a later one must be above it.
        match kept.write(&kept.view, &kept.before) {
            // What was read stays where it is. A later life is above this one as long as the machine's time goes on.
            Err(KeptError::View { path, source }) if is_no_room(&source) => {
                tracing::warn!(file = %path.display(), error = %source, "the disk is full; this start is not recorded");
            }
            written => written?,
        }
        Ok(kept)
    }

    /// Whether others were known when the node stopped.
    #[must_use]
    pub fn was_member(&self) -> bool {
        let others = self.view.members().iter();
        let mut others = others.filter(|m| m.id != self.id && m.state != MemberState::Gone);
        others.next().is_some()
    }

    /// Keeps this view instead of the last one, and the one before.
    ///
    /// # Errors
    /// When it cannot be written; the last one stays.
    pub fn write(&self, view: &View, before: &Before) -> Result<(), KeptError> {
        let records = |view: &View| view.members().iter().map(Record::of).collect();
        let text = Text {
            generation: self.generation,
            members: records(view),
            before: TextBefore {
                unix_ms: before.unix_ms,
                members: records(&before.view),
            },
        };
        let bytes = serde_json::to_vec_pretty(&text).expect("plain fields");
        let is_closed = self.is_closed.lock();
        if *is_closed {
            return Ok(());
        }
        write_whole_by(&self.beside, &self.file, &bytes, 0o644).map_err(|source| KeptError::View {
            path: self.file.clone(),
            source,
        })
    }

    /// What is being written is written; from now on nothing is.
    pub fn close(&self) {
        *self.is_closed.lock() = true;
    }
}

impl Record {
    fn of(member: &Member) -> Self {
        Self {
            id: member.id.0.clone(),
            generation: member.generation,
            version: member.version,
            weight: member.weight,
            zone: member.zone.clone(),
            state: member.state as u8,
            address: member.address.clone(),
        }
    }

    fn member(self) -> Option<Member> {
        Some(Member {
            id: MemberId(self.id),
            generation: self.generation,
            version: self.version,
            weight: self.weight,
            zone: self.zone,
            state: MemberState::from_wire(self.state.into())?,
            address: self.address,
        })
    }
}

fn view(members: Vec<Record>) -> View {
    View::new(members.into_iter().filter_map(Record::member))
}

fn read(file: &Path) -> Result<Text, String> {
    match fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| e.to_string()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Text::default()),
        Err(e) => Err(e.to_string()),
    }
}

fn name(path: &Path, clock: &dyn Clock) -> Result<String, KeptError> {
    let refuse = |source| KeptError::Name {
        path: path.to_owned(),
        source,
    };
    match fs::read_to_string(path) {
        Ok(text) => {
            let id = text.trim();
            match !id.is_empty() && id.len() <= 64 && !id.chars().any(char::is_control) {
                true => Ok(id.to_owned()),
                false => Err(KeptError::Nameless {
                    path: path.to_owned(),
                    text,
                }),
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let id = format!("{:016x}", clock.random_u64());
            write_whole(path, format!("{id}\n").as_bytes(), 0o644).map_err(refuse)?;
            Ok(id)
        }
        Err(e) => Err(refuse(e)),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::{clock::ManualClock, cluster::tests::member};

    const WINDOW: Duration = Duration::from_secs(600);

    fn open(dir: &TempDir, named: &str, clock: &ManualClock) -> Result<Kept, KeptError> {
        Kept::open(dir.path(), named, WINDOW, clock)
    }

    #[test]
    fn a_restart_keeps_the_name_and_the_view_and_is_a_later_life() {
        let dir = TempDir::new().unwrap();
        let clock = ManualClock::new(1);
        let first = open(&dir, "", &clock).unwrap();
        assert!(!first.was_member());
        let view = View::new([member("a", 2), member("b", 1)]);
        first.write(&view, &first.before).unwrap();
        // Another clock, as far behind as a machine's time may fall.
        let again = open(&dir, "", &ManualClock::new(9)).unwrap();
        assert_ne!(again.beside, first.beside, "their writes do not meet");
        assert_eq!((&again.id, &again.view), (&first.id, &view));
        assert!(again.was_member() && again.generation > first.generation);
    }

    #[test]
    fn what_is_closed_is_written_no_more() {
        let dir = TempDir::new().unwrap();
        let clock = ManualClock::new(1);
        let first = open(&dir, "", &clock).unwrap();
        let view = View::new([member("a", 2), member("b", 1)]);
        first.write(&view, &first.before).unwrap();
        first.close();
        first
            .write(&View::new([member("a", 3)]), &first.before)
            .unwrap();
        assert_eq!(open(&dir, "", &clock).unwrap().view, view);
    }

    #[test]
    fn the_view_before_a_young_change_outlives_a_restart_and_an_old_one_does_not() {
        let dir = TempDir::new().unwrap();
        let clock = ManualClock::new(1);
        let first = open(&dir, "", &clock).unwrap();
        let before = Before {
            unix_ms: clock.unix_ms(),
            view: View::new([member("a", 2)]),
        };
        let view = View::new([member("a", 2), member("b", 1)]);
        first.write(&view, &before).unwrap();
        clock.advance(WINDOW / 2);
        let second = open(&dir, "", &clock).unwrap();
        assert_eq!((&second.view, &second.before), (&view, &before));
        clock.advance(WINDOW);
        // What is on the disk then was put under the last view, whatever has changed since.
        let third = open(&dir, "", &clock).unwrap();
        assert_eq!((&third.view, &third.before.view), (&view, &view));
    }

    #[test]
    fn a_file_of_an_earlier_version_is_read() {
        let dir = TempDir::new().unwrap();
        let clock = ManualClock::new(1);
        fs::write(
            dir.path().join("cluster.json"),
            br#"{"generation": 17, "members": [{"id": "a", "generation": 1, "version": 1, "weight": 2,
                "zone": "", "state": 2, "address": "http://a:7070"}]}"#,
        )
        .unwrap();
        let kept = open(&dir, "a", &clock).unwrap();
        assert_eq!(kept.view.members().len(), 1);
        assert_eq!(kept.before.view, kept.view);
    }

    #[test]
    fn a_full_disk_stops_no_restart() {
        let dir = TempDir::new().unwrap();
        let clock = ManualClock::new(1);
        let first = open(&dir, "", &clock).unwrap();
        let view = View::new([member("a", 2), member("b", 1)]);
        first.write(&view, &first.before).unwrap();
        // Whatever is written by way of these has no room.
        for life in 0..BESIDES {
            let beside = dir.path().join(format!("cluster.{life}.new"));
            std::os::unix::fs::symlink("/dev/full", beside).unwrap();
        }
        clock.advance(Duration::from_millis(1));
        let again = open(&dir, "", &clock).unwrap();
        assert_eq!((&again.id, &again.view), (&first.id, &view));
        assert!(again.generation > first.generation);
    }

    #[test]
    fn a_torn_view_is_forgotten_and_the_name_is_not() {
        let dir = TempDir::new().unwrap();
        let clock = ManualClock::new(1);
        let first = open(&dir, "", &clock).unwrap();
        fs::write(dir.path().join("cluster.json"), b"{\"generation\": 17").unwrap();
        let again = open(&dir, "", &clock).unwrap();
        assert_eq!((again.id, again.view), (first.id, View::default()));
    }

    #[test]
    fn a_file_that_names_nobody_is_refused_with_its_path() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("node_id"), b"\n").unwrap();
        let error = open(&dir, "", &ManualClock::new(1)).unwrap_err();
        assert!(error.to_string().contains("node_id"), "{error}");
        let named = open(&dir, "west-1", &ManualClock::new(1)).unwrap();
        assert_eq!(named.id.0, "west-1");
    }
}

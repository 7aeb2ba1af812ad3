//! A scenario's handle on a load that runs: what it is told, and what it has said so far.
//!
//! Units: shares of blocks asked for, milliseconds. Errors: panics, as a test's.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Stdio},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    Audit, Plan, Said, Tally,
    process::{WINDOW, now},
};
use crate::{
    namespaces::Network,
    patience::{until, within_awake},
};

/// Over how long a share is taken when it is to be a level.
const SPELL: Duration = Duration::from_secs(2);

/// A load that runs.
pub struct Load {
    child: Child,
    lines: ChildStdin,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Default)]
struct Heard {
    tallies: Vec<Tally>,
    offences: Vec<String>,
    audits: Vec<Audit>,
    stops: usize,
    is_over: bool,
}

impl Load {
    /// Starts one at `place`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(network: &Network, place: &str, program: &Path, plan: &Plan) -> Self {
        let plan = serde_json::to_string(plan).expect("plain values");
        let mut child = network
            .command(place, program)
            .arg(plan)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the load's program");
        let lines = child.stdin.take().expect("a pipe");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let noting = Arc::clone(&heard);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                noting.lock().note(&line);
            }
            noting.lock().is_over = true;
        });
        Self {
            child,
            lines,
            heard,
        }
    }

    /// Puts everything, `stored` or in memory, and reads it.
    ///
    /// # Panics
    /// When not all of it is there afterwards.
    pub async fn fill(&mut self, stored: bool) {
        let line = if stored { "fill stored" } else { "fill" };
        let filled = self.audit_by(line).await;
        assert_eq!(filled.readable, filled.blocks, "filled");
    }

    /// Reads everything once.
    pub async fn audit(&mut self) -> Audit {
        self.audit_by("audit").await
    }

    async fn audit_by(&mut self, line: &str) -> Audit {
        let before = self.heard.lock().audits.len();
        self.say(line);
        self.wait(line, |heard| heard.audits.len() > before).await;
        self.heard.lock().audits[before]
    }

    /// The clients turn from now on; with `refills` they put what they miss.
    pub fn go(&mut self, refills: bool) {
        self.say(if refills { "go refill" } else { "go" });
    }

    /// The turns end. Answers what has happened until then.
    pub async fn stop(&mut self) -> Tally {
        let before = self.heard.lock().stops;
        self.say("stop");
        self.wait("stop", |heard| heard.stops > before).await;
        self.tally()
    }

    fn say(&mut self, line: &str) {
        let said = writeln!(self.lines, "{line}").and_then(|()| self.lines.flush());
        said.unwrap_or_else(|error| panic!("the load has ended ({error}): {:?}", self.offences()));
    }

    async fn wait(&self, what: &str, is_so: impl Fn(&Heard) -> bool) {
        until(&format!("the load answers {what:?}"), async || {
            let heard = self.heard.lock();
            assert!(!heard.is_over, "the load has ended: {:?}", heard.offences);
            is_so(&heard)
        })
        .await;
    }

    /// Offences, in words.
    #[must_use]
    pub fn offences(&self) -> Vec<String> {
        self.heard.lock().offences.clone()
    }

    /// The latest tally.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.heard
            .lock()
            .tallies
            .last()
            .copied()
            .unwrap_or_default()
    }

    /// Waits until the share over two seconds, all of them after this call, is at least `level`. Answers how long it took
    /// to get there, those two seconds left out.
    ///
    /// # Panics
    /// When it is not in time.
    pub async fn returns_to(&self, what: &str, level: f64, limit: Duration) -> Duration {
        let (from, began) = (self.tally(), now());
        let is_there = until(what, async || {
            self.best_since(&from).is_some_and(|best| best >= level)
        });
        if within_awake(limit + SPELL, is_there).await.is_none() {
            let course = self.course(&from);
            panic!("not within {limit:?}: {what}: {level:.3}; second by second: {course}");
        }
        let took = began.elapsed().saturating_sub(SPELL);
        println!("  {what}: {:.2} s", took.as_secs_f64());
        took
    }

    /// The best share over a spell since `from`.
    fn best_since(&self, from: &Tally) -> Option<f64> {
        let heard = self.heard.lock();
        let since = heard
            .tallies
            .iter()
            .filter(|tally| tally.at_ms >= from.at_ms);
        let since: Vec<&Tally> = since.collect();
        let windows = usize::try_from(SPELL.as_millis() / WINDOW.as_millis()).ok()?;
        let spells = since.windows(windows + 1);
        let shares = spells.filter_map(|spell| share(spell[0], spell[windows]));
        shares.max_by(f64::total_cmp)
    }

    /// The share once it is steady: over the first two seconds from now on.
    pub async fn level(&self) -> f64 {
        let from = self.tally();
        until("the load turns", async || self.best_since(&from).is_some()).await;
        self.best_since(&from).unwrap_or_default()
    }

    /// The lowest share of a second since `from`, and when it began.
    #[must_use]
    pub fn lowest(&self, from: &Tally) -> Option<(f64, u64)> {
        let heard = self.heard.lock();
        let since: Vec<&Tally> = heard
            .tallies
            .iter()
            .filter(|t| t.at_ms >= from.at_ms)
            .collect();
        let of_second = since.windows(5).filter_map(|window| {
            let share = share(window[0], window[4])?;
            Some((share, window[0].at_ms - from.at_ms))
        });
        of_second.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Shares second by second since `from`, as people read them.
    #[must_use]
    pub fn course(&self, from: &Tally) -> String {
        let heard = self.heard.lock();
        let since: Vec<&Tally> = heard
            .tallies
            .iter()
            .filter(|t| t.at_ms >= from.at_ms)
            .collect();
        let seconds: BTreeMap<u64, &Tally> = since
            .iter()
            .map(|tally| ((tally.at_ms - from.at_ms) / 1000, *tally))
            .collect();
        let seconds: Vec<&Tally> = seconds.into_values().collect();
        let shares = seconds
            .windows(2)
            .map(|pair| match share(pair[0], pair[1]) {
                Some(share) => format!("{:.0}", share * 100.0),
                None => "-".to_owned(),
            });
        shares.collect::<Vec<_>>().join(" ")
    }

    /// That nothing happened that must never happen.
    ///
    /// # Panics
    /// When something did.
    pub fn assert_clean(&self) {
        let (tally, offences) = (self.tally(), self.offences());
        let faults = (tally.wrong, tally.late, tally.dishonest);
        assert_eq!(faults, (0, 0, 0), "wrong, late, dishonest: {offences:#?}");
        assert!(tally.calls > 0, "it has asked");
    }
}

fn share(first: &Tally, last: &Tally) -> Option<f64> {
    let asked = last.asked.checked_sub(first.asked).filter(|n| *n > 0)?;
    Some((last.hits - first.hits) as f64 / asked as f64)
}

impl Heard {
    fn note(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Said::Tally(tally)) => self.tallies.push(tally),
            Ok(Said::Audit(audit)) => self.audits.push(audit),
            Ok(Said::Stopped(_)) => self.stops += 1,
            Ok(Said::Offence(what)) => self.offences.push(what),
            Err(_) => self.offences.push(format!("it said {line:?}")),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_what_was_asked_in_between() {
        let tally = |at_ms, asked, hits| Tally {
            at_ms,
            asked,
            hits,
            ..Tally::default()
        };
        let (first, last) = (tally(0, 100, 50), tally(250, 200, 140));
        assert_eq!(share(&first, &last), Some(0.9));
        assert_eq!(share(&first, &first), None);
    }
}

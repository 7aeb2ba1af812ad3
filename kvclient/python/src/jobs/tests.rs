//! Jobs taken, waited for, counted and given up, by hand.

use std::{
    future::Future,
    task::{Context, Poll, Waker},
};

use kvclient::clock::SystemClock;

use super::*;

const NOW: Tick = Tick(Duration::ZERO);

fn submit(jobs: &Jobs<&'static str>, job: u64, kind: JobKind) -> Result<(), Refused> {
    jobs.submit(job, kind, vec![job as u32], NOW, || "work")
}

fn take(jobs: &Jobs<&'static str>, kind: JobKind) -> Option<u64> {
    match pin!(jobs.take(kind)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(taken) => Some(taken.job),
        Poll::Pending => None,
    }
}

#[test]
fn jobs_are_taken_in_order_by_kind_and_reported_once() {
    let jobs = Jobs::new(8);
    for (job, kind) in [(1, JobKind::Save), (2, JobKind::Load), (3, JobKind::Load)] {
        submit(&jobs, job, kind).unwrap();
    }
    assert_eq!(take(&jobs, JobKind::Load), Some(2));
    assert_eq!(take(&jobs, JobKind::Load), Some(3));
    assert_eq!(take(&jobs, JobKind::Load), None);
    let outcome = Outcome {
        blocks: 1,
        bytes: 9,
        ..Outcome::default()
    };
    jobs.end(3, outcome, Tick(Duration::from_secs(1)));
    let done = jobs.finished();
    assert_eq!(
        (done[0].job, done[0].bytes, done[0].took),
        (3, 9, Duration::from_secs(1))
    );
    assert!(jobs.finished().is_empty());
    assert_eq!(jobs.live(), 2);
}

#[test]
fn two_runners_that_wait_get_a_job_each() {
    let jobs = Jobs::new(8);
    let mut context = Context::from_waker(Waker::noop());
    let (mut one, mut two) = (
        pin!(jobs.take(JobKind::Load)),
        pin!(jobs.take(JobKind::Load)),
    );
    assert!(one.as_mut().poll(&mut context).is_pending());
    assert!(two.as_mut().poll(&mut context).is_pending());
    submit(&jobs, 1, JobKind::Load).unwrap();
    submit(&jobs, 2, JobKind::Load).unwrap();
    assert!(one.as_mut().poll(&mut context).is_ready());
    assert!(two.as_mut().poll(&mut context).is_ready());
}

#[test]
fn a_job_counts_until_it_was_reported() {
    let jobs = Jobs::new(2);
    submit(&jobs, 1, JobKind::Load).unwrap();
    submit(&jobs, 2, JobKind::Save).unwrap();
    assert_eq!(submit(&jobs, 3, JobKind::Load), Err(Refused::Full));
    assert_eq!(submit(&jobs, 1, JobKind::Load), Err(Refused::Known));
    jobs.end(1, Outcome::default(), NOW);
    assert_eq!(submit(&jobs, 3, JobKind::Load), Err(Refused::Full));
    assert_eq!(submit(&jobs, 1, JobKind::Load), Err(Refused::Known));
    jobs.finished();
    submit(&jobs, 1, JobKind::Load).unwrap();
}

#[test]
fn waiting_for_a_job_takes_its_report() {
    let (jobs, clock) = (Jobs::new(8), SystemClock::new());
    submit(&jobs, 1, JobKind::Load).unwrap();
    assert_eq!(jobs.wait(1, Duration::ZERO, &clock), None);
    assert_eq!(jobs.wait(7, Duration::from_secs(60), &clock), None);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| jobs.wait(1, Duration::from_secs(60), &clock));
        jobs.end(1, Outcome::default(), NOW);
        assert_eq!(waiting.join().unwrap().unwrap().job, 1);
    });
    assert!(jobs.finished().is_empty());
}

#[test]
fn blocks_may_be_reused_once_every_save_has_read_them() {
    let (jobs, clock) = (Jobs::new(8), SystemClock::new());
    submit(&jobs, 1, JobKind::Save).unwrap();
    submit(&jobs, 2, JobKind::Load).unwrap();
    take(&jobs, JobKind::Save);
    jobs.gathered(1);
    assert!(jobs.wait_gathered(Duration::ZERO, &clock));
    assert_eq!(jobs.live(), 2);
}

#[test]
fn saves_that_keep_the_engine_waiting_are_given_up() {
    let (jobs, clock) = (Jobs::new(8), SystemClock::new());
    submit(&jobs, 1, JobKind::Save).unwrap();
    submit(&jobs, 2, JobKind::Save).unwrap();
    take(&jobs, JobKind::Save);
    let hurried = |since| {
        let mut context = Context::from_waker(Waker::noop());
        pin!(jobs.hurried_since(since))
            .poll(&mut context)
            .is_ready()
    };
    assert!(!hurried(0));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| jobs.wait_gathered(Duration::ZERO, &clock));
        while !hurried(0) {
            std::thread::yield_now();
        }
        assert!(!waiting.is_finished());
        jobs.end(1, Outcome::default(), NOW);
        assert!(!waiting.join().unwrap());
    });
    let done: Vec<_> = jobs
        .finished()
        .into_iter()
        .map(|d| (d.job, d.failed_block_ids))
        .collect();
    assert_eq!(done, [(2, vec![2]), (1, vec![])]);
}

#[test]
fn a_closed_queue_ends_every_job() {
    let jobs = Jobs::new(8);
    submit(&jobs, 1, JobKind::Load).unwrap();
    submit(&jobs, 2, JobKind::Load).unwrap();
    take(&jobs, JobKind::Load);
    jobs.close(NOW);
    assert_eq!(submit(&jobs, 3, JobKind::Load), Err(Refused::Closed));
    assert_eq!(jobs.finished().len(), 1);
    jobs.end_all("closed", NOW);
    assert_eq!(jobs.finished()[0].failed_block_ids, [1]);
    assert_eq!(jobs.live(), 0);
}

//! vLLM's secondary tier: `Chunks`, and the `Ending` of a job.

use std::collections::HashMap;

use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};

use super::convert::{self, BlockIds, Done};
use crate::connector::tier::{self, Answer, Ends};

/// A request's chunks at a tier: what was asked of them, and the jobs that move them.
#[pyclass(module = "terrace._terrace")]
pub(super) struct Chunks(tier::Tier);

/// What became of one of vLLM's jobs.
#[pyclass(module = "terrace._terrace", frozen, get_all)]
pub(super) struct Ending {
    job: u64,
    blocks: usize,
    bytes: u64,
    failed: Vec<usize>,
    dropped: usize,
    reason: Option<String>,
    forget: Vec<String>,
}

/// vLLM's note of where each key of a request ends.
struct Noted<'n, 'py>(&'n Bound<'py, PyDict>);

impl Ends for Noted<'_, '_> {
    fn end_of(&self, key: &[u8]) -> Option<usize> {
        let key = PyBytes::new(self.0.py(), key);
        self.0.get_item(key).ok()??.extract().ok()
    }

    fn each(&self, show: &mut dyn FnMut(&[u8], usize)) {
        for (key, end) in self.0 {
            if let (Ok(key), Ok(end)) = (key.cast::<PyBytes>(), end.extract()) {
                show(key.as_bytes(), end);
            }
        }
    }
}

/// A job of the cache: its number, the lookup it is loaded under, hashes, first block, rows.
type Run<'py> = (
    u64,
    Option<String>,
    Bound<'py, PyBytes>,
    usize,
    Bound<'py, PyBytes>,
);

#[pymethods]
impl Chunks {
    #[classattr]
    const MAX_QUESTIONS: usize = tier::MAX_QUESTIONS;

    #[new]
    fn new(chunk_tokens: HashMap<u32, usize>) -> Self {
        Self(tier::Tier::new(chunk_tokens))
    }

    fn begin_request(&mut self, request: &str) {
        self.0.begin_request(request);
    }

    fn lookup(
        &mut self,
        request: &str,
        key: &[u8],
        ends: &Bound<'_, PyDict>,
        cache: &Bound<'_, PyAny>,
    ) -> PyResult<Option<bool>> {
        let answer = self.0.lookup(request, key, &Noted(ends), |question| {
            let hashes = PyBytes::new(cache.py(), &question.hashes);
            let asked = (
                question.name.as_str(),
                hashes,
                question.width,
                question.first,
            );
            cache
                .call_method1("lookup", asked)?
                .extract::<Option<usize>>()
        })?;
        Ok(match answer {
            Answer::Hit => Some(true),
            Answer::Miss => Some(false),
            Answer::Retry => None,
        })
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one of vLLM's jobs, and who asks"
    )]
    fn begin<'py>(
        &mut self,
        py: Python<'py>,
        job: u64,
        request: &str,
        keys: Vec<Bound<'py, PyBytes>>,
        rows: BlockIds,
        ends: &Bound<'py, PyDict>,
        promotion: bool,
    ) -> Vec<Run<'py>> {
        let keys: Vec<&[u8]> = keys.iter().map(|key| key.as_bytes()).collect();
        let runs = self
            .0
            .begin(job, request, &keys, &rows.0, &Noted(ends), promotion);
        let run = |run: tier::Run| {
            let (hashes, rows) = (PyBytes::new(py, &run.hashes), convert::ids(py, &run.rows));
            (run.job, run.question, hashes, run.first, rows)
        };
        runs.into_iter().map(run).collect()
    }

    fn ended(&mut self, finished: Done) -> Option<Ending> {
        self.0.ended(finished.into()).map(Ending::from)
    }

    fn refuse(&mut self, run: u64, reason: &str) -> Option<Ending> {
        self.0.refuse(run, reason).map(Ending::from)
    }

    fn give_up(&mut self, run: u64, reason: &str) -> Option<Ending> {
        self.0.give_up(run, reason).map(Ending::from)
    }

    fn end_step(&mut self, scheduled: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
        let requests = scheduled.try_iter()?.map(|request| request?.extract());
        let requests = requests.collect::<PyResult<Vec<String>>>()?;
        Ok(self.0.end_step(requests.iter().map(String::as_str)))
    }

    fn end_request(&mut self, request: &str) -> Vec<String> {
        self.0.end_request(request)
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    #[getter]
    fn runs(&self) -> Vec<u64> {
        self.0.runs()
    }

    #[getter]
    fn requests(&self) -> usize {
        self.0.requests()
    }
}

impl From<tier::Ending> for Ending {
    fn from(ending: tier::Ending) -> Self {
        let tier::Ending {
            job,
            blocks,
            bytes,
            failed,
            dropped,
            reason,
            forget,
        } = ending;
        Self {
            job,
            blocks,
            bytes,
            failed,
            dropped,
            reason,
            forget,
        }
    }
}

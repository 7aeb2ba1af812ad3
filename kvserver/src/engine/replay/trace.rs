//! A request trace in memory: which prefix blocks each request names, root first.
//!
//! Format: JSON Lines as published with Mooncake (FAST'25): one object per request with `hash_ids`, an array of
//! integers, equal ids meaning a reusable prefix block; `timestamp` (ms), `input_length` and `output_length`
//! (tokens) are optional. Other fields are passed over, blank lines too.
//!
//! Shape: ids are renamed to 0, 1, 2, … in order of appearance and laid end to end: four bytes a reference.
//! Errors: name the line (from 1) and the field.

use std::{collections::HashMap, io::BufRead};

use serde_json::Value;

/// Why a trace was not read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The stream failed.
    #[error("line {line}: not readable")]
    Io {
        /// Line, from 1.
        line: usize,
        /// The cause.
        source: std::io::Error,
    },
    /// The line is not a JSON object.
    #[error("line {line}: not a JSON object: {problem}")]
    Json {
        /// Line, from 1.
        line: usize,
        /// What the parser said.
        problem: String,
    },
    /// A field is missing or of the wrong sort.
    #[error("line {line}: {field}: {problem}")]
    Field {
        /// Line, from 1.
        line: usize,
        /// The field at fault.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// More than `u32::MAX` distinct blocks or references.
    #[error("line {line}: more than {} blocks", u32::MAX)]
    TooLarge {
        /// Line, from 1.
        line: usize,
    },
}

/// A trace. See the module page.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    blocks: Vec<u32>,
    /// End of each request in `blocks`.
    ends: Vec<u32>,
    unique: u32,
    input_tokens: u64,
}

impl Trace {
    /// Reads JSON Lines to the end.
    ///
    /// # Errors
    /// The first line that is not a request.
    pub fn read(reader: impl BufRead) -> Result<Self, TraceError> {
        let mut trace = Self::default();
        let mut names: HashMap<u64, u32> = HashMap::new();
        for (number, text) in reader.lines().enumerate() {
            let line = number + 1;
            let text = text.map_err(|source| TraceError::Io { line, source })?;
            if text.trim().is_empty() {
                continue;
            }
            let row: serde_json::Map<String, Value> =
                serde_json::from_str(&text).map_err(|error| TraceError::Json {
                    line,
                    problem: error.to_string(),
                })?;
            trace.input_tokens += natural(&row, "input_length", line)?.unwrap_or(0);
            natural(&row, "output_length", line)?;
            natural(&row, "timestamp", line)?;
            for id in hash_ids(&row, line)? {
                let next = names.len();
                let name = *names
                    .entry(id?)
                    .or_insert(u32::try_from(next).map_err(|_| TraceError::TooLarge { line })?);
                trace.blocks.push(name);
            }
            trace.end_request(line)?;
            trace.unique = u32::try_from(names.len()).map_err(|_| TraceError::TooLarge { line })?;
        }
        Ok(trace)
    }

    /// From requests already in memory: dense or not, ids are renamed as when read.
    #[must_use]
    pub fn from_requests<R: AsRef<[u64]>>(requests: impl IntoIterator<Item = R>) -> Self {
        let mut trace = Self::default();
        let mut names: HashMap<u64, u32> = HashMap::new();
        for request in requests {
            for id in request.as_ref() {
                let next = names.len() as u32;
                trace.blocks.push(*names.entry(*id).or_insert(next));
            }
            trace.ends.push(trace.blocks.len() as u32);
        }
        trace.unique = names.len() as u32;
        trace
    }

    fn end_request(&mut self, line: usize) -> Result<(), TraceError> {
        let end = u32::try_from(self.blocks.len()).map_err(|_| TraceError::TooLarge { line })?;
        self.ends.push(end);
        Ok(())
    }

    /// The requests in order, each a slice of block names, root first.
    pub fn requests(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        (0..self.ends.len()).map(|i| {
            let start = if i == 0 { 0 } else { self.ends[i - 1] };
            &self.blocks[start as usize..self.ends[i] as usize]
        })
    }

    /// Number of requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no request.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Block references over all requests.
    #[must_use]
    pub fn block_refs(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Distinct blocks.
    #[must_use]
    pub fn unique_blocks(&self) -> u64 {
        u64::from(self.unique)
    }

    /// Sum of `input_length`, tokens; 0 where the trace does not say.
    #[must_use]
    pub fn input_tokens(&self) -> u64 {
        self.input_tokens
    }
}

fn natural(
    row: &serde_json::Map<String, Value>,
    field: &'static str,
    line: usize,
) -> Result<Option<u64>, TraceError> {
    match row.get(field) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| TraceError::Field {
            line,
            field,
            problem: format!("{value} is not a natural number"),
        }),
    }
}

fn hash_ids(
    row: &serde_json::Map<String, Value>,
    line: usize,
) -> Result<impl Iterator<Item = Result<u64, TraceError>>, TraceError> {
    let wrong = move |problem: String| TraceError::Field {
        line,
        field: "hash_ids",
        problem,
    };
    let ids = match row.get("hash_ids") {
        None => return Err(wrong("missing".into())),
        Some(Value::Array(ids)) => ids,
        Some(other) => return Err(wrong(format!("{other} is not an array"))),
    };
    Ok(ids.iter().map(move |id| {
        id.as_u64()
            .ok_or_else(|| wrong(format!("{id} is not a natural number")))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_renamed_in_order_of_appearance() {
        let text = "{\"hash_ids\": [7, 9]}\n\n{\"input_length\": 3, \"hash_ids\": [7, 1, 9], \"other\": null}\n";
        let trace = Trace::read(text.as_bytes()).unwrap();
        assert_eq!(
            trace.requests().collect::<Vec<_>>(),
            [&[0, 1][..], &[0, 2, 1]]
        );
        assert_eq!(
            (
                trace.unique_blocks(),
                trace.block_refs(),
                trace.input_tokens()
            ),
            (3, 5, 3)
        );
    }

    #[test]
    fn errors_name_line_and_field() {
        let read = |text: &str| Trace::read(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(read("{\"hash_ids\": []}\n{}"), "line 2: hash_ids: missing");
        assert_eq!(
            read("{\"hash_ids\": [1, -2]}"),
            "line 1: hash_ids: -2 is not a natural number"
        );
        assert_eq!(
            read("{\"hash_ids\": 5}"),
            "line 1: hash_ids: 5 is not an array"
        );
        assert_eq!(
            read("{\"hash_ids\": [], \"input_length\": \"x\"}"),
            "line 1: input_length: \"x\" is not a natural number"
        );
        assert!(read("{\"hash_ids\": [1").starts_with("line 1: not a JSON object"));
        assert!(read("[1]").starts_with("line 1: not a JSON object"));
    }
}

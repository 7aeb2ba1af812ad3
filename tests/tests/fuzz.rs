//! Bounded fuzzing of every parser, from the corpus in `fuzz/corpus/` and from its seeded mutations.
//!
//! `TERRACE_FUZZ_ROUNDS` (default 4000 per target) and `TERRACE_FUZZ_SEED` (default 1) set how much and which.
//! A failure prints the input; put it into the target's corpus folder once it is mended.

use std::{fs, panic, path::Path};

use kvtests::{
    mutate::{Dice, mutate},
    targets::TARGETS,
};

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text}: expected a number")),
        Err(_) => default,
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a directory entry").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
        .iter()
        .map(|file| fs::read(file).expect("a corpus file"))
        .collect()
}

#[test]
fn no_bytes_from_outside_make_a_parser_panic() {
    let (rounds, seed) = (
        number("TERRACE_FUZZ_ROUNDS", 4000),
        number("TERRACE_FUZZ_SEED", 1),
    );
    for (name, target) in TARGETS {
        let corpus = corpus(name);
        let mut dice = Dice::new(seed);
        let fresh = std::iter::repeat_with(|| mutate(&mut dice, &corpus)).take(rounds as usize);
        for (round, input) in corpus.iter().cloned().chain(fresh).enumerate() {
            let outcome = panic::catch_unwind(|| target(&input));
            assert!(
                outcome.is_ok(),
                "{name}, seed {seed}, round {round}: input {}",
                input
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect::<String>()
            );
        }
    }
}

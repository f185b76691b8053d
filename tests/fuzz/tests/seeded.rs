//! Runs every fuzz target with its kept inputs, in `seeds`, and with a fixed seed, which takes
//! seconds and is reproducible.
//!
//! `HYPERCAST_FUZZ_CASES` sets the number of cases, `HYPERCAST_FUZZ_SEED` the seed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use hypercast_fuzz::{
    BODIES, COMPONENT, DIFFERENTIAL, FuzzTarget, GRAPH, LEARNING, PUBLICATION, PUSH, STORE, UPDATE,
};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

fn number(variable: &str, otherwise: u64) -> u64 {
    let parse = |text: String| text.parse().unwrap_or_else(|_| panic!("{variable} is a number"));
    std::env::var(variable).map_or(otherwise, parse)
}

fn run(target: &FuzzTarget, cases: u64) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name);
    for seed in seeds.read_dir().into_iter().flatten() {
        let file = seed.expect("a readable folder").path();
        let bytes = std::fs::read(&file).expect("a readable input");
        if catch_unwind(AssertUnwindSafe(|| target.run(&bytes))).is_err() {
            panic!("{} fails", file.display());
        }
    }
    let mut random = SmallRng::seed_from_u64(number("HYPERCAST_FUZZ_SEED", 1));
    for case in 0..number("HYPERCAST_FUZZ_CASES", cases) {
        let mut bytes = vec![0; random.random_range(16..1024)];
        random.fill_bytes(&mut bytes);
        let outcome = catch_unwind(AssertUnwindSafe(|| target.run(&bytes)));
        if let Err(panic) = outcome {
            let name = target.name;
            let file = std::env::temp_dir().join(format!("hypercast-fuzz-{name}-{case}"));
            std::fs::write(&file, &bytes).expect("a file for the input");
            eprintln!("{name}: case {case} fails; its input is in {}", file.display());
            resume_unwind(panic);
        }
    }
}

#[test]
fn component() {
    run(&COMPONENT, 150);
}

#[test]
fn graph() {
    run(&GRAPH, 1000);
}

#[test]
fn differential() {
    run(&DIFFERENTIAL, 2000);
}

#[test]
fn bodies() {
    run(&BODIES, 1000);
}

#[test]
fn learning() {
    run(&LEARNING, 60);
}

#[test]
fn publication() {
    run(&PUBLICATION, 300);
}

#[test]
fn push() {
    run(&PUSH, 2000);
}

#[test]
fn update() {
    run(&UPDATE, 200);
}

#[test]
fn store() {
    run(&STORE, 200);
}

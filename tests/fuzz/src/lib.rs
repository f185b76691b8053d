//! The fuzz targets, as a library, so that `cargo verify` can run them with a fixed seed.
//!
//! The fuzzer's bytes are not the input itself. They describe how to build one: which changes to
//! make to a real component, store or publication, which nodes a network has, or which names and
//! numbers a body contains. So most inputs get past the first check, and a few hundred bytes are
//! enough. A target panics if the host panics or breaks an invariant. An error is the expected
//! result of a bad input; the targets do not check its text.

use arbitrary::{Result, Unstructured};

mod bodies;
mod component;
mod differential;
mod edit;
mod graph;
mod honest;
mod learning;
mod model;
mod publication;
mod push;
mod store;
mod update;
mod world;

/// Runs one input; a panic is a finding.
pub struct FuzzTarget {
    /// The name in `cargo fuzz run` and `fuzz/run`.
    pub name: &'static str,
    /// Builds an input from the bytes and runs it. Fails if there are too few bytes.
    run: fn(&mut Unstructured) -> Result<()>,
}

impl FuzzTarget {
    /// Runs the input that `bytes` describe.
    ///
    /// # Panics
    /// The host panics or breaks an invariant.
    pub fn run(&self, bytes: &[u8]) {
        let _ = (self.run)(&mut Unstructured::new(bytes));
    }
}

/// Loads changed components, builds their networks and ranks with them.
pub const COMPONENT: FuzzTarget = FuzzTarget { name: "component", run: component::run };

/// Runs random networks through the validator, both executors and the backward pass.
pub const GRAPH: FuzzTarget = FuzzTarget { name: "graph", run: graph::run };

/// Compares every way to run random networks, and their gradients, with an evaluation in f64.
pub const DIFFERENTIAL: FuzzTarget = FuzzTarget { name: "differential", run: differential::run };

/// Parses and converts bodies of HTTP requests, and runs features, join and FM on them.
pub const BODIES: FuzzTarget = FuzzTarget { name: "bodies", run: bodies::run };

/// Takes events to a trained, published and serving FM, beside those of honest users.
pub const LEARNING: FuzzTarget = FuzzTarget { name: "learning", run: learning::run };

/// Follows changed streams of published weights.
pub const PUBLICATION: FuzzTarget = FuzzTarget { name: "publication", run: publication::run };

/// Reads and verifies changed bodies of pushes.
pub const PUSH: FuzzTarget = FuzzTarget { name: "push", run: push::run };

/// Applies changed updates of weights to a serving model.
pub const UPDATE: FuzzTarget = FuzzTarget { name: "update", run: update::run };

/// Opens, reads and checks stores with changed files.
pub const STORE: FuzzTarget = FuzzTarget { name: "store", run: store::run };

/// Every target with its name.
pub const TARGETS: [&FuzzTarget; 9] =
    [&COMPONENT, &GRAPH, &DIFFERENTIAL, &BODIES, &LEARNING, &PUBLICATION, &PUSH, &UPDATE, &STORE];

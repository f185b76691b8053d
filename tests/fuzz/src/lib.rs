//! What the fuzz targets do with their bytes: a library, so that `cargo verify` can run the same on a fixed seed.
//!
//! The bytes never are the input itself but say how it is made: which changes are made to a real component, a real
//! store or a real publication, which nodes a network has, which names and numbers a body holds. So most inputs
//! come past the first check, and a few hundred bytes are enough for any of them. A target panics where the host
//! would, and where what it says of itself is not so; errors are what bad input deserves.
//!
//! It finds inputs; it does not judge how errors are worded.

use arbitrary::{Result, Unstructured};

mod bodies;
mod component;
mod edit;
mod graph;
mod model;
mod publication;
mod push;
mod store;
mod update;
mod world;

/// A target: its name, and what it does with bytes.
pub struct Target {
    /// As `cargo fuzz run` and `fuzz/run` know it.
    pub name: &'static str,
    /// Runs one input. Bytes that end too early are no input.
    run: fn(&mut Unstructured) -> Result<()>,
}

impl Target {
    /// Runs the input that `bytes` describe.
    ///
    /// # Panics
    /// On a fault of the host.
    pub fn run(&self, bytes: &[u8]) {
        let _ = (self.run)(&mut Unstructured::new(bytes));
    }
}

/// A component's bytes, through loading, describing, its network, and one ranking.
pub const COMPONENT: Target = Target { name: "component", run: component::run };

/// A network, through the validator, both executors and the backward pass.
pub const GRAPH: Target = Target { name: "graph", run: graph::run };

/// Bodies of HTTP requests, through parsing, conversion and what follows from them: features and the join.
pub const BODIES: Target = Target { name: "bodies", run: bodies::run };

/// A stream of published weights, as its follower reads it.
pub const PUBLICATION: Target = Target { name: "publication", run: publication::run };

/// The body of a push.
pub const PUSH: Target = Target { name: "push", run: push::run };

/// New weights for a model that serves.
pub const UPDATE: Target = Target { name: "update", run: update::run };

/// A store's files, opened in every way, read and checked.
pub const STORE: Target = Target { name: "store", run: store::run };

/// All of them.
pub const TARGETS: [&Target; 7] =
    [&COMPONENT, &GRAPH, &BODIES, &PUBLICATION, &PUSH, &UPDATE, &STORE];

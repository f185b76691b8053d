//! Tests of an expert, as ordinary Rust tests.
//!
//! [`Harness::of`] loads a component in the host's own runtime, with the engine, checks, executor
//! and trainer of a daemon. [`Harness::native`] calls the SDK's trait in this process instead, so
//! that a debugger can stop in `rank`, `labels` or `network`; the host's executor still runs the
//! graph. Neither measures speed: use `cargo hypercast bench` for that.
//!
//! ```text
//! World               what an expert is tested in: schema, embeddings, limits, seed
//! RequestBuilder      builds a request (a Case) in a World
//! Harness             an expert in a World: predict, rank, labels, ...
//! Harness::check_all  the checks that every expert must pass, one method each
//! Harness::golden     compares answers with those in a committed file
//! Failure             a failed check: where, what was seen, what to do
//! standard_tests!     the tests of every plugin in this repository
//! session             the same for tests that only start an installed `hypercast`
//! ```
//!
//! ```no_run
//! use hypercast_harness::{Harness, component};
//!
//! let harness = Harness::of(component("home-feed"));
//! harness.check_all()?;
//! let request = harness.world().request(1).surface("feed").items([7, 8, 9]).serving().build();
//! let ranking = harness.rank_with(&request, &[("click", vec![0.1, 0.9, 0.5])], 2)?;
//! assert_eq!(ranking.items, [8, 9]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cases;
mod checks;
mod component;
pub mod convert;
mod error;
mod golden;
mod harness;
mod native;
mod request_spec;
mod runtime;
pub mod session;
mod training;
mod world;

pub use cases::{Case, RequestBuilder, RequestBuilder as Request};
pub use component::component;
pub use error::{Error, Failure, FailureLocation, FailureLocation as Place, Failures};
pub use harness::{Harness, Ranking};
pub use request_spec::{
    CandidateSpec, CandidateSpecs, FeatureSpec, RankedCandidate, RankedSpec, RequestSpec,
};
pub use world::World;

/// Defines the tests of a plugin in this repository: it passes every check, as a component and
/// natively, and answers as recorded in `tests/golden.json`. Takes the expert's type.
#[macro_export]
macro_rules! standard_tests {
    ($expert:ty) => {
        #[test]
        fn the_component_passes_every_check() -> Result<(), $crate::Failures> {
            $crate::Harness::of($crate::component(env!("CARGO_PKG_NAME"))).check_all()
        }

        #[test]
        fn the_trait_passes_every_check_without_wasm() -> Result<(), $crate::Failures> {
            $crate::Harness::native::<$expert>().check_all()
        }

        #[test]
        fn it_answers_as_before() -> Result<(), $crate::Failure> {
            let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.json");
            $crate::Harness::of($crate::component(env!("CARGO_PKG_NAME"))).golden(golden)?;
            $crate::Harness::native::<$expert>().golden(golden)
        }
    };
}

pub use hypercast_data::schema;
pub use hypercast_expert::ExpertPredictions as Predictions;
pub use hypercast_expert::wasm::contract;
pub use hypercast_fm::example::{Event, Example, Item, Outcome, Target, User};

//! `hypercast-harness`: tests of an expert, as ordinary Rust.
//!
//! ```no_run
//! use hypercast_harness::{Failures, Harness, component};
//!
//! # #[allow(clippy::needless_doctest_main)]
//! #[test]
//! fn it_keeps_every_promise() -> Result<(), Failures> {
//!     Harness::of(component(env!("CARGO_PKG_NAME"))).check_all()
//! }
//! ```
//!
//! [`Harness::of`] loads a component in the host's own runtime: the engine, the checks, the executor and the
//! trainer that a daemon uses, and nothing in their place. [`Harness::native`] calls the SDK's trait in this
//! process instead, so that a debugger stops in `rank`, `labels` or `network`; the graph that `network` built is
//! run there by the host's executor too, as nothing else can run one. [`World`] makes requests of any schema.
//! [`Harness::check_all`] is what every expert must keep; [`Harness::golden`] is what one expert answered before.
//! It measures no speed: `cargo hypercast bench` does.

mod cases;
mod checks;
mod component;
mod convert;
mod error;
mod golden;
mod harness;
mod native;
mod runtime;
mod training;
mod world;

pub use cases::{Case, Request};
pub use component::component;
pub use error::{Error, Failure, Failures, Place};
pub use harness::{Harness, Ranking};
pub use world::World;

pub use hypercast_data::schema;
pub use hypercast_expert::Predictions;
pub use hypercast_expert::wasm::contract;
pub use hypercast_fm::example::{Event, Example, Item, Outcome, Target, User};

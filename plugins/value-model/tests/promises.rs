//! What every expert must keep, in the host's own runtime; and what this one answered before.

use hypercast_harness::{Failure, Failures, Harness, component};
use value_model::ValueModel;

#[test]
fn the_component_keeps_every_promise() -> Result<(), Failures> {
    Harness::of(component(env!("CARGO_PKG_NAME"))).check_all()
}

#[test]
fn so_does_the_trait_without_wasm() -> Result<(), Failures> {
    Harness::native::<ValueModel>().check_all()
}

#[test]
fn it_answers_as_before() -> Result<(), Failure> {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.json");
    Harness::of(component(env!("CARGO_PKG_NAME"))).golden(golden)?;
    Harness::native::<ValueModel>().golden(golden)
}

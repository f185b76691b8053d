//! What every expert must keep, in the host's own runtime: `cargo hypercast test -p hello-expert`.

use hypercast_harness::{Failures, Harness, component};

#[test]
fn it_keeps_every_promise() -> Result<(), Failures> {
    Harness::of(component(env!("CARGO_PKG_NAME"))).check_all()
}

//! The expert passes every check in the host's own runtime. Run this with
//! `cargo hypercast test -p hello-expert`.

use hypercast_harness::{Failures, Harness, component};

#[test]
fn it_passes_every_check() -> Result<(), Failures> {
    Harness::of(component(env!("CARGO_PKG_NAME"))).check_all()
}

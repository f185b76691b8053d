//! The bindings that `wit-bindgen` generates from `sdk/wit/expert.wit`.
//!
//! A plugin that implements the contract by hand uses these; any other uses the
//! trait `Expert` and never sees them.

// The generated types carry the contract's comments, which not every field has.
#![allow(missing_docs)]
// The generator's functions take a record's fields one by one.
#![allow(clippy::too_many_arguments)]

wit_bindgen::generate!({
    path: "wit",
    world: "expert",
    pub_export_macro: true,
    export_macro_name: "export_expert_world",
    default_bindings_module: "hypercast_sdk::raw",
    generate_all,
});

pub use hypercast::expert::types;

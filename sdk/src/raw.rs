//! The bindings that `wit-bindgen` generates from `sdk/wit/expert.wit`.
//!
//! Use them only in a plugin that implements the contract by hand; other plugins implement the
//! trait `Expert`.

// The generated items have no doc comments; `expert.wit` documents them.
#![allow(missing_docs)]
// A generated function has one parameter for each field of a record.
#![allow(clippy::too_many_arguments)]

wit_bindgen::generate!({
    path: "wit",
    world: "expert",
    pub_export_macro: true,
    export_macro_name: "export_expert_world",
    default_bindings_module: "hypercast_sdk::raw",
    generate_all,
    additional_derives: [PartialEq],
});

pub use hypercast::expert::types;

/// The hooks that a component may export besides, in a world of their own.
pub mod hooks {
    wit_bindgen::generate!({
        path: "wit",
        world: "training-hooks",
        pub_export_macro: true,
        export_macro_name: "export_training_hooks",
        default_bindings_module: "hypercast_sdk::raw::hooks",
        with: { "hypercast:expert/types@3.0.0": crate::raw::hypercast::expert::types },
    });
}

//! HSTU attention over jagged batches: a Burn op with a hand-written backward.
//!
//! `attention` says what is computed and holds the types; `oracle` computes it
//! plainly in f64; `cpu` is the fused path of the Flex backend; `gpu` that of
//! CubeCL's backends, CUDA and wgpu; `plain` composes it from primitive Burn ops,
//! for what those cannot run and to compare with; `autodiff` makes it
//! differentiable; `history` attends to histories that are kept between passes,
//! `dense` is what a layer does around it when it serves; `layer` is the whole
//! layer as one op, with its gradients, for training, and `mlp` a network of two
//! linear layers likewise. Nothing here knows of models.

pub mod attention;
pub mod cpu;
pub mod dense;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod gpu;
pub mod history;
pub mod layer;
pub mod mlp;
pub mod oracle;
pub mod plain;

mod autodiff;

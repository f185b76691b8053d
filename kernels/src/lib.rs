//! HSTU attention over jagged batches: a Burn op with a hand-written backward.
//!
//! `attention` says what is computed and holds the types; `oracle` computes it
//! plainly in f64; `cpu` is the fused path of the Flex backend; `plain`
//! composes it from primitive Burn ops for backends without a kernel of their
//! own; `autodiff` makes it differentiable; `history` attends to histories that
//! are kept between passes, and `dense` is what a layer does around it when it
//! serves. Nothing here knows of models.

pub mod attention;
pub mod cpu;
pub mod dense;
pub mod history;
pub mod oracle;
pub mod plain;

mod autodiff;

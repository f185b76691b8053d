//! Tests of the expert runtime across its parts.

pub(crate) mod allocations;
pub(crate) mod build;
mod components;
mod contracts;
mod fm_logits;
mod imported;
mod own_losses;
mod owned;
mod parameters;
mod refusals;
mod scores;
mod training_only;

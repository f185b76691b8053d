//! Tests of the expert runtime across its parts.

pub(crate) mod allocations;
pub(crate) mod build;
mod components;
mod contracts;
mod own_losses;
mod parameters;
mod refusals;
mod training_only;

//! Which model versions serve, and how they change while requests run.
//!
//! The registry (or, before the first promotion, the configuration) gives a [`desired_set`];
//! [`loader`] loads it into a [`serving_set`], which a request uses from its beginning to its end.
//! `follow` repeats this whenever the registry changes, `weight_updates` applies published
//! weights to loaded versions, `outcomes` compares what they predicted with what happened, and
//! [`shadow`] shows answered requests to versions that only measure.

pub mod desired_set;
pub(crate) mod follow;
pub mod loader;
mod outcomes;
pub mod serving_set;
pub mod shadow;
pub(crate) mod weight_updates;

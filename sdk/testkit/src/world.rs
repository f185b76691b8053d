//! The world that an expert is tested in.

use std::path::{Path, PathBuf};

use serde::Serialize;

/// The schema, embeddings and limits that an expert is tested with. What a test does not set is as
/// in a world of `hypercast simulate` with embeddings of 64 values.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TestWorld {
    schema: Option<PathBuf>,
    tae_dim: Option<usize>,
    content_dim: Option<usize>,
    seed: Option<u64>,
    fm_version: Option<String>,
    max_candidates: Option<usize>,
    max_flops: Option<u64>,
    deadline_ms: Option<u32>,
}

impl TestWorld {
    /// A world with the schema in a file, such as the `schema.toml` of a data set.
    pub fn of_schema(file: impl AsRef<Path>) -> TestWorld {
        TestWorld { schema: Some(file.as_ref().into()), ..TestWorld::default() }
    }

    /// Sets the number of values of an embedding; 0 means a host without a foundation model.
    pub fn tae_dim(self, tae_dim: usize) -> TestWorld {
        TestWorld { tae_dim: Some(tae_dim), ..self }
    }

    /// Sets the number of values of the items' content vectors; 0, the default, means none.
    pub fn content_dim(self, content_dim: usize) -> TestWorld {
        TestWorld { content_dim: Some(content_dim), ..self }
    }

    /// Sets the seed from which users, items and outcomes are generated.
    pub fn seed(self, seed: u64) -> TestWorld {
        TestWorld { seed: Some(seed), ..self }
    }

    /// Sets the version (semver) of the FM. The expert must accept it.
    pub fn fm_version(self, version: &str) -> TestWorld {
        TestWorld { fm_version: Some(version.into()), ..self }
    }

    /// Sets the most candidates of a request; 1,000 by default, as in a daemon.
    pub fn max_candidates(self, max_candidates: usize) -> TestWorld {
        TestWorld { max_candidates: Some(max_candidates), ..self }
    }

    /// Sets the limit of FLOPs per candidate (`plugin_limits.max_flops` of a daemon).
    pub fn max_flops(self, flops: u64) -> TestWorld {
        TestWorld { max_flops: Some(flops), ..self }
    }

    /// Sets the deadline of a guest's call, in milliseconds; 5,000 by default, so that tests also
    /// pass on a busy machine.
    pub fn deadline_ms(self, deadline_ms: u32) -> TestWorld {
        TestWorld { deadline_ms: Some(deadline_ms), ..self }
    }
}

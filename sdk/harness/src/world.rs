//! The world that an expert is tested in: a schema, an FM's embeddings, limits,
//! and a seed that all requests follow from.

use std::path::Path;
use std::sync::Arc;

use hypercast_data::import::simulate;
use hypercast_data::schema::Schema;
use hypercast_data::synthetic::{Size, Synthetic};
use hypercast_expert::graph::GraphLimits;
use hypercast_expert::{Limits, LoadOptions};
use hypercast_sdk::Expert;

use crate::cases::{Case, Request};
use crate::component::Component;
use crate::error::Error;
use crate::harness::Harness;
use crate::native::Native;

/// Candidates of the largest request that a daemon takes, unless it is told otherwise.
const MAX_CANDIDATES: usize = 1_000;

/// A guest's deadline here, in milliseconds: one that a busy machine does not reach. `cargo hypercast bench` tells the
/// headroom to the real one.
const DEADLINE_MS: u32 = 5_000;

/// What an expert is tested in.
#[derive(Clone)]
pub struct World {
    pub(crate) synthetic: Synthetic,
    pub(crate) options: LoadOptions,
    pub(crate) max_candidates: usize,
}

impl Default for World {
    /// The schema of `hypercast simulate` with three surfaces (feed, search, stories), and embeddings of 64 values.
    fn default() -> World {
        World::new(simulate::schema(3))
    }
}

impl World {
    /// A world of a schema, with embeddings of 64 values.
    pub fn new(schema: Schema) -> World {
        let limits =
            Limits { deadline_ms: DEADLINE_MS, deadline_max_ms: DEADLINE_MS, ..Limits::default() };
        World {
            synthetic: Synthetic::new(Arc::new(schema), 64, 1),
            options: LoadOptions {
                limits,
                graph_limits: GraphLimits::default(),
                tae_dim: 64,
                fm_version: None,
            },
            max_candidates: MAX_CANDIDATES,
        }
    }

    /// A world of the schema in a file: the `schema.toml` of a data set.
    ///
    /// # Errors
    /// A file that cannot be read, or holds no valid schema.
    pub fn from_file(schema: &Path) -> Result<World, Error> {
        Ok(World::new(Schema::load(schema)?))
    }

    /// With embeddings of so many values; 0 is a host without a foundation model.
    pub fn tae_dim(mut self, tae_dim: usize) -> World {
        self.options.tae_dim = tae_dim;
        self.synthetic = Synthetic::new(self.schema().clone(), tae_dim, 1);
        self
    }

    /// With other users, items and outcomes.
    pub fn seed(mut self, seed: u64) -> World {
        self.synthetic = Synthetic::new(self.schema().clone(), self.synthetic.tae_dim(), seed);
        self
    }

    /// With an FM of this version (semver), which the expert must accept.
    pub fn fm_version(mut self, version: &str) -> World {
        self.options.fm_version = Some(version.into());
        self
    }

    /// With so many candidates in the largest request; 1,000 unless set, as in a daemon.
    pub fn max_candidates(self, max_candidates: usize) -> World {
        World { max_candidates, ..self }
    }

    /// With this limit of FLOPs a candidate, as the surface's operator set it (`plugin_limits.max_flops`).
    pub fn max_flops(mut self, flops: u64) -> World {
        self.options.graph_limits.flops_per_candidate = flops;
        self
    }

    /// With this deadline of a guest's call, in milliseconds; 5,000 unless set.
    pub fn deadline_ms(mut self, deadline_ms: u32) -> World {
        let limits = &mut self.options.limits;
        (limits.deadline_ms, limits.deadline_max_ms) = (deadline_ms, deadline_ms);
        self
    }

    /// The schema.
    pub fn schema(&self) -> &Arc<Schema> {
        self.synthetic.schema()
    }

    /// A request of 20 candidates, to be changed as a test needs.
    pub fn request(&self, number: u64) -> Request {
        Request::new(self.synthetic.clone(), number)
    }

    /// A log: `requests` requests of six candidates with their outcomes, on `surfaces` in turn.
    pub fn log(&self, requests: usize, surfaces: &[u16]) -> Vec<Case> {
        let size = |at: usize| Size {
            surface: surfaces[at % surfaces.len()],
            candidates: 6,
            history: at % 40,
        };
        let case = |at: usize| Case::new(self.synthetic.request(at as u64, size(at)));
        (0..requests).map(case).collect()
    }

    /// A component in this world.
    ///
    /// # Errors
    /// A component that the host refuses.
    pub fn component(&self, file: &Path) -> Result<Harness, Error> {
        Harness::new(self.clone(), Box::new(Component::load(self, file)?))
    }

    /// The SDK's trait in this world, without Wasm.
    ///
    /// # Errors
    /// A network that cannot be built, or that the host refuses.
    pub fn native<E: Expert + 'static>(&self) -> Result<Harness, Error> {
        Harness::new(self.clone(), Box::new(Native::<E>::load(self)?))
    }
}

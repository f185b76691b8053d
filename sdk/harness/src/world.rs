//! The world that an expert is tested in: a schema, the FM's embeddings, limits, and the seed from
//! which all requests are generated.

use std::path::Path;
use std::sync::Arc;

use hypercast_data::schema::Schema;
use hypercast_data::simulate;
use hypercast_data::synthetic::{Synthetic, SyntheticSize};
use hypercast_expert::graph::GraphLimits;
use hypercast_expert::{Limits, LoadOptions};
use hypercast_sdk::Expert;

use crate::cases::{Case, RequestBuilder};
use crate::component::ComponentCode;
use crate::error::Error;
use crate::harness::Harness;
use crate::native::NativeCode;

/// The most candidates of a request, as in a daemon's default configuration.
const MAX_CANDIDATES: usize = 1_000;

/// The deadline of a guest's call, in milliseconds. It is long, so that tests also pass on a busy
/// machine; `cargo hypercast bench` shows the headroom to the real deadline.
const DEADLINE_MS: u32 = 5_000;

/// The schema, embeddings and limits that an expert is tested with. Builds requests.
#[derive(Clone)]
pub struct World {
    pub(crate) synthetic: Synthetic,
    pub(crate) options: LoadOptions,
    pub(crate) max_candidates: usize,
}

impl Default for World {
    /// A world with the schema of `hypercast simulate`, three surfaces (feed, search, stories) and
    /// embeddings of 64 values.
    fn default() -> World {
        World::new(simulate::schema(3))
    }
}

impl World {
    /// A world with the given schema and embeddings of 64 values.
    pub fn new(schema: Schema) -> World {
        let limits =
            Limits { deadline_ms: DEADLINE_MS, deadline_max_ms: DEADLINE_MS, ..Limits::default() };
        World {
            synthetic: Synthetic::new(Arc::new(schema), 64, 1),
            options: LoadOptions {
                registered: None,
                limits,
                graph_limits: GraphLimits::default(),
                tae_dim: 64,
                content_dim: 0,
                fm_version: None,
                without_fm_logits: false,
            },
            max_candidates: MAX_CANDIDATES,
        }
    }

    /// A world with the schema in a file, such as the `schema.toml` of a data set.
    ///
    /// # Errors
    /// The file cannot be read or does not contain a valid schema.
    pub fn from_file(schema: &Path) -> Result<World, Error> {
        Ok(World::new(Schema::load(schema)?))
    }

    /// Sets the number of values of an embedding; 0 means a host without a foundation model.
    pub fn tae_dim(mut self, tae_dim: usize) -> World {
        self.options.tae_dim = tae_dim;
        let content_dim = self.synthetic.content_dim();
        self.synthetic =
            Synthetic::new(self.schema().clone(), tae_dim, 1).with_content(content_dim);
        self
    }

    /// Sets the number of values of the items' content vectors; 0, the default, means none.
    pub fn content_dim(mut self, content_dim: usize) -> World {
        self.options.content_dim = content_dim;
        self.synthetic = self.synthetic.with_content(content_dim);
        self
    }

    /// Sets the seed from which users, items and outcomes are generated.
    pub fn seed(mut self, seed: u64) -> World {
        let (tae_dim, content_dim) = (self.synthetic.tae_dim(), self.synthetic.content_dim());
        self.synthetic =
            Synthetic::new(self.schema().clone(), tae_dim, seed).with_content(content_dim);
        self
    }

    /// Sets the version (semver) of the FM. The expert must accept it.
    pub fn fm_version(mut self, version: &str) -> World {
        self.options.fm_version = Some(version.into());
        self
    }

    /// Sets the most candidates of a request; 1,000 by default, as in a daemon.
    pub fn max_candidates(mut self, max_candidates: usize) -> World {
        self.options.graph_limits.serving.rows = max_candidates;
        World { max_candidates, ..self }
    }

    /// Sets the limit of FLOPs per candidate (`plugin_limits.max_flops` of a daemon).
    pub fn max_flops(mut self, flops: u64) -> World {
        self.options.graph_limits.flops_per_candidate = flops;
        self
    }

    /// Sets the deadline of a guest's call, in milliseconds; 5,000 by default.
    pub fn deadline_ms(mut self, deadline_ms: u32) -> World {
        let limits = &mut self.options.limits;
        (limits.deadline_ms, limits.deadline_max_ms) = (deadline_ms, deadline_ms);
        self
    }

    /// The schema of this world.
    pub fn schema(&self) -> &Arc<Schema> {
        self.synthetic.schema()
    }

    /// Starts a request with 20 candidates. Different numbers give different requests.
    pub fn request(&self, number: u64) -> RequestBuilder {
        RequestBuilder::new(self.synthetic.clone(), number)
    }

    /// Generates a log of requests with outcomes, each with six candidates. They alternate between
    /// the surfaces with the given indices. Of every second request of a surface it is known where
    /// its candidates were ranked.
    pub fn log(&self, requests: usize, surfaces: &[u16]) -> Vec<Case> {
        let size = |at: usize| SyntheticSize {
            surface: surfaces[at % surfaces.len()],
            candidates: 6,
            history: at % 40,
        };
        let case = |at: usize| {
            let case = Case::new(self.synthetic.request(at as u64, size(at)));
            if (at / surfaces.len()).is_multiple_of(2) { case } else { case.ranked_by_chance() }
        };
        (0..requests).map(case).collect()
    }

    /// Loads a component in this world.
    ///
    /// # Errors
    /// The host refuses the component.
    pub fn component(&self, file: &Path) -> Result<Harness, Error> {
        ComponentCode::load(self, file)
    }

    /// Runs the SDK's trait in this world, without Wasm.
    ///
    /// # Errors
    /// The network cannot be built, or the host refuses it.
    pub fn native<E: Expert + 'static>(&self) -> Result<Harness, Error> {
        NativeCode::<E>::load(self)
    }
}

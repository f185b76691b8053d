//! What the subcommands of `hypercast plugin` look at: a component, in the world that it is to fit.

use std::path::PathBuf;
use std::sync::Arc;

use hypercast_config::{Config, FlopsShare, OverFlopsShare, PluginLimits};
use hypercast_data::dataset::content;
use hypercast_data::schema::{Schema, fm_spec};
use hypercast_data::simulate;
use hypercast_expert::{Blueprint, Engine, EngineConfig, LoadOptions};
use hypercast_fm::{cost::one_stage_flops, spec::FmSpec};
use hypercast_serve::Result;

/// A component, and what it is to fit.
#[derive(Debug, Clone, clap::Args)]
pub struct PluginUnderTest {
    /// The component, as `cargo hypercast build` writes it.
    pub file: PathBuf,
    /// The schema that it is to fit (`schema.toml` of a data set); that of `hypercast simulate` if
    /// missing
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// A configuration, whose [plugin_limits] are the budgets; those of an empty one if missing
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The width of the foundation model's embedding, 0 without one; the configuration's if missing
    #[arg(long)]
    pub tae_dim: Option<usize>,
    /// The most FLOPs a candidate that its surface allows, in place of the configuration's
    #[arg(long)]
    pub max_flops: Option<u64>,
}

/// A component that fits.
pub struct LoadedPlugin {
    /// The checked plugin and graph.
    pub blueprint: Arc<Blueprint>,
    /// What it fits.
    pub schema: Arc<Schema>,
    /// The number of values of the items' content vectors.
    pub content_dim: usize,
    /// What it may use.
    pub limits: PluginLimits,
    /// What its network costs beside a one-stage model of the size of the configuration's FM; none
    /// without either.
    pub flops_share: Option<FlopsShare>,
}

impl PluginUnderTest {
    /// Loads and checks it, exactly as training and serving do.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn load(&self) -> Result<LoadedPlugin> {
        let schema = match &self.schema {
            Some(file) => Schema::load(file)?,
            None => simulate::schema(3),
        };
        let mut config = match &self.config {
            Some(file) => Config::read(file)?,
            None => Config::default(),
        };
        let tae_dim = self.tae_dim.unwrap_or(match config.fm.tae_dim {
            0 => config.fm.dim,
            tae_dim => tae_dim,
        });
        let limits = &mut config.plugin_limits;
        limits.max_flops = self.max_flops.unwrap_or(limits.max_flops);
        let engine = Engine::new(EngineConfig { instances: 8, ..limits.engine() })?;
        let beside = self.schema.as_ref().and_then(|file| file.parent());
        let content_dim = content::width_in(beside.unwrap_or(&config.paths.dataset))?;
        let own = config.load_options("", content_dim);
        // Without a configuration no FM is known.
        let fm = self.config.as_ref().filter(|_| tae_dim > 0).map(|_| fm_spec(&schema));
        let spec = fm.transpose()?.map(|spec| FmSpec { content: content_dim, ..spec });
        let one_stage = spec.map(|spec| one_stage_flops(&config.fm, &spec));
        let options = LoadOptions { tae_dim, registered: None, ..own };
        let limits = config.plugin_limits;
        let blueprint = Blueprint::load(&engine, &self.file, &schema, &options)?;
        let network = blueprint.flops();
        let flops_share = one_stage.map(|one_stage| FlopsShare { network, one_stage });
        let (blueprint, schema) = (Arc::new(blueprint), Arc::new(schema));
        Ok(LoadedPlugin { blueprint, schema, content_dim, limits, flops_share })
    }
}

impl LoadedPlugin {
    /// How its network costs more than a new version may, if it does.
    pub fn over_flops_share(&self) -> Option<OverFlopsShare> {
        self.limits.check_flops_share(&self.surface_names(), self.flops_share?).err()
    }

    /// The share that it may have of a one-stage model's FLOPs.
    pub fn max_flops_share(&self) -> f64 {
        self.limits.flops_share_of(&self.surface_names()).0
    }

    fn surface_names(&self) -> Vec<String> {
        self.surfaces().map(|at| self.schema.surfaces[usize::from(at)].clone()).collect()
    }

    /// The surfaces that the component can serve, by index.
    pub fn surfaces(&self) -> impl Iterator<Item = u16> + '_ {
        let all = self.schema.surfaces.iter().zip(0..);
        all.filter(|(name, _)| self.blueprint.serves(name)).map(|(_, index)| index)
    }
}

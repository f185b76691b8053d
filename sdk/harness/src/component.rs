//! Runs a component in the host's own runtime.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use hypercast_expert::graph::ExpertGraph;
use hypercast_expert::wasm::Call;
use hypercast_expert::{
    Blueprint, BreakerConfig, Device, Engine, EngineConfig, ExpertFault, ExpertPredictions,
    Parameters, ServedExpert,
};

use crate::cases::Case;
use crate::contract::{
    ActionBatch, Description, Evaluation, HostInfo, NamedColumn, Ranked, TaskLabels, TrainingStep,
    Verdict,
};
use crate::error::Error;
use crate::runtime::{RankCall, Runtime};
use crate::training;
use crate::world::World;

/// Returns the component of a package, which `cargo hypercast test` (or, in HyperCast's repository,
/// `cargo verify`) has built.
///
/// # Panics
/// There is no such component.
pub fn component(package: &str) -> PathBuf {
    let file = format!("{package}.wasm");
    let given = std::env::var_os("HYPERCAST_COMPONENT").map(PathBuf::from);
    let given = given.filter(|path| path.file_name().is_some_and(|name| name == file.as_str()));
    let folder = std::env::var_os("HYPERCAST_PLUGINS").map(|folder| Path::new(&folder).join(&file));
    // `cargo hypercast build` writes components to the target folder, which also contains this
    // test's executable.
    let own = std::env::current_exe().unwrap_or_default();
    let built = own.ancestors().skip(1).map(|folder| folder.join("hypercast").join(&file));
    let candidates = given.into_iter().chain(folder).chain(built);
    candidates.into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("cannot find {file}: run `cargo hypercast test`, which builds it, instead of `cargo test`")
    })
}

/// A loaded component and its parameters.
pub(crate) struct ComponentRuntime {
    world: World,
    file: PathBuf,
    expert: ServedExpert,
    parameters: Parameters,
}

impl ComponentRuntime {
    pub(crate) fn load(world: &World, file: &Path) -> Result<ComponentRuntime, Error> {
        let schema = world.schema();
        let blueprint = Arc::new(Blueprint::load(engine(), file, schema, &world.options)?);
        let parameters = blueprint.init_parameters(training::normaliser(world), training::SEED);
        let parameters = training::shaken(parameters, &blueprint.graph);
        ComponentRuntime::new(world, file, blueprint, parameters)
    }

    fn new(
        world: &World,
        file: &Path,
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
    ) -> Result<ComponentRuntime, Error> {
        let breaker = BreakerConfig { faults: u32::MAX, ..BreakerConfig::default() };
        let expert = ServedExpert::new(blueprint, parameters.clone(), Device::Cpu, breaker)?;
        Ok(ComponentRuntime { world: world.clone(), file: file.into(), expert, parameters })
    }

    /// The loaded and checked plugin, which training needs.
    pub(crate) fn blueprint(&self) -> &Arc<Blueprint> {
        self.expert.blueprint()
    }
}

impl Runtime for ComponentRuntime {
    fn description(&self) -> &Description {
        &self.blueprint().description
    }

    fn info(&self) -> &HostInfo {
        &self.blueprint().info
    }

    fn graph(&self) -> &Arc<ExpertGraph> {
        &self.blueprint().graph
    }

    fn rank_columns(&self, case: &Case) -> Vec<NamedColumn> {
        self.blueprint().columns.rank_columns(&case.example, case.tae())
    }

    fn predict(&self, case: &Case) -> Result<ExpertPredictions, String> {
        self.expert.predict(&[&case.example], case.tae()).map_err(words)
    }

    fn rank(&self, call: &RankCall) -> Result<Vec<Ranked>, String> {
        let plugin = &self.blueprint().plugin;
        plugin.rank(&call.request, &call.predictions, &call.columns).map_err(words)
    }

    fn rank_twice(&self, call: &RankCall) -> Result<[Vec<Ranked>; 2], String> {
        let mut instance = self.blueprint().plugin.instance(Call::Rank).map_err(words)?;
        let mut rank =
            || instance.rank(&call.request, &call.predictions, &call.columns).map_err(words);
        Ok([rank()?, rank()?])
    }

    fn labels(&self, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let blueprint = self.blueprint();
        blueprint.plugin.labels(&blueprint.description, &blueprint.info, batch).map_err(words)
    }

    fn sample(&self, batch: &ActionBatch) -> Result<Vec<f32>, String> {
        self.blueprint().plugin.sample(&self.blueprint().info, batch).map_err(words)
    }

    fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        self.blueprint().plugin.schedule(step).map_err(words)
    }

    fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String> {
        self.blueprint().plugin.evaluate(&self.blueprint().info, evaluation).map_err(words)
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn with_parameters(&self, parameters: Parameters) -> Result<Box<dyn Runtime>, Error> {
        let blueprint = self.blueprint().clone();
        Ok(Box::new(ComponentRuntime::new(&self.world, &self.file, blueprint, parameters)?))
    }

    fn reloaded(&self) -> Result<Box<dyn Runtime>, Error> {
        let (world, file) = (&self.world, &self.file);
        let blueprint = Blueprint::load(engine(), file, world.schema(), &world.options)?;
        let parameters = self.parameters.clone();
        Ok(Box::new(ComponentRuntime::new(world, file, Arc::new(blueprint), parameters)?))
    }
}

/// The engine of all tests in this process. There is only one, because it reserves address space
/// for its instances.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let config = EngineConfig { instances: 16, ..EngineConfig::default() };
        Engine::new(config).unwrap_or_else(|error| panic!("{error}"))
    })
}

fn words(fault: ExpertFault) -> String {
    fault.to_string()
}

//! A component in the host's own runtime: nothing here stands in for it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use hypercast_expert::graph::Graph;
use hypercast_expert::wasm::Call;
use hypercast_expert::{
    Blueprint, BreakerConfig, Device, Engine, EngineConfig, Expert, ExpertFault, Parameters,
    Predictions,
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

/// The component of a package, as `cargo hypercast test` built it (or, in HyperCast's repository, `cargo verify`).
///
/// # Panics
/// If there is none.
pub fn component(package: &str) -> PathBuf {
    let file = format!("{package}.wasm");
    let given = std::env::var_os("HYPERCAST_COMPONENT").map(PathBuf::from);
    let given = given.filter(|path| path.file_name().is_some_and(|name| name == file.as_str()));
    let folder = std::env::var_os("HYPERCAST_PLUGINS").map(|folder| Path::new(&folder).join(&file));
    // A test's executable lies in the target folder, and so does what `cargo hypercast build` makes.
    let own = std::env::current_exe().unwrap_or_default();
    let built = own.ancestors().skip(1).map(|folder| folder.join("hypercast").join(&file));
    let candidates = given.into_iter().chain(folder).chain(built);
    candidates.into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("there is no {file}: run `cargo hypercast test`, which builds it, in place of `cargo test`")
    })
}

/// A loaded component with parameters.
pub(crate) struct Component {
    world: World,
    file: PathBuf,
    expert: Expert,
    parameters: Parameters,
}

impl Component {
    pub(crate) fn load(world: &World, file: &Path) -> Result<Component, Error> {
        let schema = world.schema();
        let blueprint = Arc::new(Blueprint::load(engine(), file, schema, &world.options)?);
        let parameters = blueprint.init_parameters(training::normaliser(world), training::SEED);
        let parameters = training::shaken(parameters, &blueprint.graph);
        Component::new((world, file), blueprint, parameters)
    }

    fn new(
        (world, file): (&World, &Path),
        blueprint: Arc<Blueprint>,
        parameters: Parameters,
    ) -> Result<Component, Error> {
        let breaker = BreakerConfig { faults: u32::MAX, ..BreakerConfig::default() };
        let expert = Expert::new(blueprint, parameters.clone(), Device::Cpu, breaker)?;
        Ok(Component { world: world.clone(), file: file.into(), expert, parameters })
    }

    /// What training needs: the checked plugin.
    pub(crate) fn blueprint(&self) -> &Arc<Blueprint> {
        self.expert.blueprint()
    }
}

impl Runtime for Component {
    fn description(&self) -> &Description {
        &self.blueprint().description
    }

    fn info(&self) -> &HostInfo {
        &self.blueprint().info
    }

    fn graph(&self) -> &Arc<Graph> {
        &self.blueprint().graph
    }

    fn rank_columns(&self, case: &Case) -> Vec<NamedColumn> {
        self.blueprint().columns.rank_columns(&case.example, case.tae())
    }

    fn predict(&self, case: &Case) -> Result<Predictions, String> {
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
        Ok(Box::new(Component::new((&self.world, &self.file), blueprint, parameters)?))
    }

    fn anew(&self) -> Result<Box<dyn Runtime>, Error> {
        let schema = self.world.schema();
        let blueprint = Blueprint::load(engine(), &self.file, schema, &self.world.options)?;
        let parameters = self.parameters.clone();
        Ok(Box::new(Component::new((&self.world, &self.file), Arc::new(blueprint), parameters)?))
    }
}

/// One for all tests of a process: it reserves the instances' address space.
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

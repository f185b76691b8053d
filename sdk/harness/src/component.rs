//! Runs a component in the host's own runtime.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use hypercast_expert::wasm::Call;
use hypercast_expert::{Blueprint, Engine, EngineConfig, ExpertFault};

use crate::contract::{
    ActionBatch, Evaluation, EvaluationRows, Ranked, TaskLabels, TrainingStep, Verdict,
};
use crate::error::Error;
use crate::harness::Harness;
use crate::runtime::{ExpertCode, RankCall};
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

pub(crate) struct ComponentCode {
    file: PathBuf,
    blueprint: Arc<Blueprint>,
}

impl ComponentCode {
    /// Loads the component in `file`.
    pub(crate) fn load(world: &World, file: &Path) -> Result<Harness, Error> {
        let blueprint = Blueprint::load(engine(), file, world.schema(), &world.options)?;
        let Blueprint { description, info, graph, .. } = &blueprint;
        let (description, info, graph) = (description.clone(), info.clone(), graph.clone());
        let code = ComponentCode { file: file.into(), blueprint: Arc::new(blueprint) };
        Harness::new(world, description, info, graph, Arc::new(code))
    }
}

impl ExpertCode for ComponentCode {
    fn rank(&self, call: &RankCall) -> Result<Vec<Ranked>, String> {
        let plugin = &self.blueprint.plugin;
        plugin.rank(&call.request, &call.predictions, &call.columns).map_err(words)
    }

    fn rank_twice(&self, call: &RankCall) -> Result<[Vec<Ranked>; 2], String> {
        let mut instance = self.blueprint.plugin.instance(Call::Rank).map_err(words)?;
        let mut rank =
            || instance.rank(&call.request, &call.predictions, &call.columns).map_err(words);
        Ok([rank()?, rank()?])
    }

    fn labels(&self, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let Blueprint { plugin, description, info, .. } = &*self.blueprint;
        plugin.labels(description, info, batch).map_err(words)
    }

    fn weights(&self, batch: &ActionBatch) -> Result<Vec<Vec<f32>>, String> {
        let Blueprint { plugin, description, info, .. } = &*self.blueprint;
        plugin.weights(description, info, batch).map_err(words)
    }

    fn sample(&self, batch: &ActionBatch) -> Result<Vec<f32>, String> {
        self.blueprint.plugin.sample(&self.blueprint.info, batch).map_err(words)
    }

    fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        self.blueprint.plugin.schedule(step).map_err(words)
    }

    fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String> {
        self.blueprint.plugin.evaluate(&self.blueprint.info, evaluation).map_err(words)
    }

    fn evaluate_rows(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Verdict, String> {
        let Blueprint { plugin, info, .. } = &*self.blueprint;
        plugin.evaluate_rows(info, evaluation, rows).map_err(words)
    }

    fn validation_score(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Option<f64>, String> {
        let Blueprint { plugin, info, .. } = &*self.blueprint;
        plugin.validation_score(info, evaluation, rows).map_err(words)
    }

    fn load(&self, world: &World) -> Result<Harness, Error> {
        ComponentCode::load(world, &self.file)
    }

    fn blueprint(&self) -> Option<&Arc<Blueprint>> {
        Some(&self.blueprint)
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

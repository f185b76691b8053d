//! What the follower needs of the expert that it trains, and the real one: a plugin's network.
//!
//! A simulator runs the follower with an expert that notes what it learns. When something is saved,
//! published or read is the follower's.

use hypercast_data::schema::Schema;
use hypercast_expert::{
    Chunk, Parameters, Provenance,
    train::{BatchReport, RefusedRequest, SavedTrainer, ScoredRows, TaskTargets},
    wasm::{
        ExpertFault,
        contract::{Evaluation, Task, Verdict},
    },
};
use hypercast_stream::{
    publish::WeightSource,
    registry::{ExpertVersion, Registry, SelfRegisteredExpert},
};

use super::{
    super::stream::{ExpertStream, LogView, Survey},
    ExpertContext,
};
use crate::error::Result;

/// Makes experts that learn online.
pub trait ExpertRuntime {
    /// An expert that has learned from nothing, for the rows of a view.
    ///
    /// # Errors
    /// A plugin that is refused, or that needs more than was logged.
    fn begin(&self, view: &LogView<'_>, survey: Survey) -> Result<Box<dyn OnlineExpert>>;

    /// Goes on with what [`OnlineExpert::saved`] gave.
    ///
    /// # Errors
    /// What was saved is of another network or configuration.
    fn resume(&self, schema: &Schema, saved: SavedTrainer) -> Result<Box<dyn OnlineExpert>>;

    /// The version as the registry describes it.
    ///
    /// # Errors
    /// It cannot be served, costs more than a new version may, or its plugin cannot be kept.
    fn describe(
        &self,
        registry: &Registry,
        version: &str,
        provenance: &Provenance,
    ) -> hypercast_stream::Result<ExpertVersion>;
}

/// An expert that learns online.
pub trait OnlineExpert {
    /// Its tasks, in the order of the predictions.
    fn tasks(&self) -> &[Task];

    /// The plugin, network and FM of what is published.
    fn provenance(&self) -> &Provenance;

    /// The parameters for predictions, averaged if the settings say so.
    fn weights(&self) -> &dyn WeightSource;

    /// Learns from the past before all else, and then goes on online. `report` sees the batches.
    ///
    /// # Errors
    /// Logs that cannot be read, a plugin whose hooks fail.
    fn learn_past(
        &mut self,
        view: &LogView<'_>,
        report: &mut dyn FnMut(&BatchReport<'_>),
    ) -> Result<()>;

    /// Predictions `[rows]` a task.
    ///
    /// # Errors
    /// TAEs that do not fit.
    fn predict(&self, chunk: Chunk<'_>) -> Result<Vec<Vec<f32>>>;

    /// The same by what was published last; empty if nothing was.
    ///
    /// # Errors
    /// As [`OnlineExpert::predict`].
    fn predict_as_published(&self, chunk: Chunk<'_>) -> Result<Vec<Vec<f32>>>;

    /// The plugin's labels, a task each.
    ///
    /// # Errors
    /// A plugin whose hooks fail.
    fn targets(&self, chunk: Chunk<'_>) -> Result<Vec<TaskTargets>>;

    /// Learns from a chunk; returns the requests that it did not learn from, in their order.
    ///
    /// # Errors
    /// A plugin that faults for all requests.
    fn train(&mut self, chunk: Chunk<'_>) -> Result<Vec<RefusedRequest>>;

    /// All that [`ExpertRuntime::resume`] needs, but for the usual loss.
    fn saved(&self) -> SavedTrainer;

    /// Sets what was published last.
    ///
    /// # Errors
    /// It is of another network.
    fn set_published(&mut self, saved: &SavedTrainer) -> Result<()>;

    /// Goes back to a saved state.
    ///
    /// # Errors
    /// It is of another network.
    fn go_back(&mut self, saved: &SavedTrainer) -> Result<()>;

    /// Keeps some of a chunk's requests with what was predicted of them, for
    /// [`OnlineExpert::evaluate`]. What reads no rows keeps none.
    ///
    /// # Errors
    /// As [`OnlineExpert::predict`].
    fn sample(&mut self, _: Chunk<'_>, _: ScoredRows<'_>) -> Result<()> {
        Ok(())
    }

    /// The plugin's word on what may be published.
    ///
    /// # Errors
    /// The plugin faults.
    fn evaluate(&self, evaluation: &Evaluation) -> std::result::Result<Verdict, ExpertFault>;

    /// The usual loss of a step; 0 before the first one.
    fn mean_loss(&self) -> f64;

    /// Goes on with the usual loss of an earlier life.
    fn set_mean_loss(&mut self, mean_loss: f64);

    /// Faults of the plugin's `schedule`.
    fn schedule_faults(&self) -> u64;
}

/// Experts whose plugins run in this process.
pub(super) struct PluginRuntime<'a>(pub(super) ExpertContext<'a>);

/// The network of a plugin in training.
struct PluginExpert {
    stream: ExpertStream,
    published: Option<Parameters>,
}

impl ExpertRuntime for PluginRuntime<'_> {
    fn begin(&self, view: &LogView<'_>, survey: Survey) -> Result<Box<dyn OnlineExpert>> {
        let stream = self.0.setup().begin(view, survey, |_| ())?;
        Ok(Box::new(PluginExpert { stream, published: None }))
    }

    fn resume(&self, schema: &Schema, saved: SavedTrainer) -> Result<Box<dyn OnlineExpert>> {
        let stream = self.0.setup().resume(schema, saved)?;
        Ok(Box::new(PluginExpert { stream, published: None }))
    }

    fn describe(
        &self,
        registry: &Registry,
        version: &str,
        provenance: &Provenance,
    ) -> hypercast_stream::Result<ExpertVersion> {
        let ExpertContext { dataset, config, entry, guests } = self.0;
        let schema = &dataset.schema;
        let surfaces = &config.serving_surfaces(entry, schema)?;
        let new = SelfRegisteredExpert {
            config,
            entry,
            surfaces,
            version,
            provenance,
            guests,
            schema,
            content_dim: dataset.content,
        };
        new.describe(registry)
    }
}

impl OnlineExpert for PluginExpert {
    fn tasks(&self) -> &[Task] {
        &self.stream.blueprint.description.tasks
    }

    fn provenance(&self) -> &Provenance {
        &self.stream.trainer.parameters().provenance
    }

    fn weights(&self) -> &dyn WeightSource {
        self.stream.trainer.parameters()
    }

    fn learn_past(
        &mut self,
        view: &LogView<'_>,
        report: &mut dyn FnMut(&BatchReport<'_>),
    ) -> Result<()> {
        self.stream.learn_past(view, report)?;
        self.stream.go_online()
    }

    fn predict(&self, chunk: Chunk<'_>) -> Result<Vec<Vec<f32>>> {
        Ok(self.stream.trainer.predict(chunk)?)
    }

    fn predict_as_published(&self, chunk: Chunk<'_>) -> Result<Vec<Vec<f32>>> {
        match &self.published {
            Some(published) => Ok(self.stream.trainer.predict_with(published, chunk)?),
            None => Ok(Vec::new()),
        }
    }

    fn targets(&self, chunk: Chunk<'_>) -> Result<Vec<TaskTargets>> {
        Ok(self.stream.trainer.targets(chunk)?)
    }

    fn train(&mut self, chunk: Chunk<'_>) -> Result<Vec<RefusedRequest>> {
        Ok(self.stream.trainer.train(chunk, |_| ())?)
    }

    fn saved(&self) -> SavedTrainer {
        self.stream.trainer.saved()
    }

    fn set_published(&mut self, saved: &SavedTrainer) -> Result<()> {
        let blueprint = &self.stream.blueprint;
        let name = &blueprint.description.name;
        let parameters = saved.predicting(blueprint).map_err(|why| {
            hypercast_expert::Error::misfit(
                name,
                format!("what it published last is of {why}; train the expert anew"),
            )
        })?;
        self.published = Some(parameters);
        self.stream.trainer.forget_sample();
        Ok(())
    }

    fn go_back(&mut self, saved: &SavedTrainer) -> Result<()> {
        self.stream.trainer.forget_sample();
        Ok(self.stream.trainer.go_back(saved)?)
    }

    fn sample(&mut self, chunk: Chunk<'_>, scored: ScoredRows<'_>) -> Result<()> {
        Ok(self.stream.trainer.sample(chunk, scored)?)
    }

    fn evaluate(&self, evaluation: &Evaluation) -> std::result::Result<Verdict, ExpertFault> {
        self.stream.trainer.judge(evaluation)
    }

    fn mean_loss(&self) -> f64 {
        self.stream.trainer.mean_loss()
    }

    fn set_mean_loss(&mut self, mean_loss: f64) {
        self.stream.trainer.set_mean_loss(mean_loss);
    }

    fn schedule_faults(&self) -> u64 {
        self.stream.trainer.schedule_faults()
    }
}

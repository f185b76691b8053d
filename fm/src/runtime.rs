//! How those who follow a stream make and load models. Production runs [`BurnRuntime`]; a simulator
//! of crashes runs models so small that a run of seconds trains and loads hundreds of them.

use std::path::Path;

use crate::{
    Result,
    device::DeviceKind,
    inference::{self, FmServingOptions, FoundationModel},
    spec::{FmConfig, FmSpec},
    trainer::{self, FmTrainer, ResumePaths},
    update::WeightUpdate,
};

/// Makes trainers, and models of published weights.
pub trait FmRuntime: Send + Sync {
    /// As [`trainer::create`].
    ///
    /// # Errors
    /// As there.
    fn create(
        &self,
        dir: &Path,
        config: &FmConfig,
        spec: &FmSpec,
        device: DeviceKind,
    ) -> Result<Box<dyn FmTrainer>>;

    /// As [`trainer::resume`].
    ///
    /// # Errors
    /// As there.
    fn resume(
        &self,
        from: ResumePaths<'_>,
        config: &FmConfig,
        spec: &FmSpec,
        device: DeviceKind,
    ) -> Result<Box<dyn FmTrainer>>;

    /// A model of complete weights that takes updates. Its files are in the folder `work`, which is
    /// replaced and which only this process may use.
    ///
    /// # Errors
    /// Weights that form no model, or a folder that cannot be written.
    fn load_published(
        &self,
        weights: WeightUpdate,
        work: &Path,
        serving: FmServingOptions,
    ) -> Result<Box<dyn FoundationModel>>;
}

/// The models of this crate, which Burn runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct BurnRuntime;

impl FmRuntime for BurnRuntime {
    fn create(
        &self,
        dir: &Path,
        config: &FmConfig,
        spec: &FmSpec,
        device: DeviceKind,
    ) -> Result<Box<dyn FmTrainer>> {
        trainer::create(dir, config, spec, device)
    }

    fn resume(
        &self,
        from: ResumePaths<'_>,
        config: &FmConfig,
        spec: &FmSpec,
        device: DeviceKind,
    ) -> Result<Box<dyn FmTrainer>> {
        trainer::resume(from, config, spec, device)
    }

    fn load_published(
        &self,
        weights: WeightUpdate,
        work: &Path,
        serving: FmServingOptions,
    ) -> Result<Box<dyn FoundationModel>> {
        let checkpoint = work.join("checkpoint");
        weights.checkpoint(&checkpoint)?;
        inference::load_updatable(&checkpoint, &work.join("rows"), serving)
    }
}

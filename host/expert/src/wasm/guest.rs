//! A guest of any contract that the host speaks, called with the types of the present one.

use wasmtime::component::{
    Component, ComponentExportIndex, ComponentNamedList, Instance, InstancePre, Lift, Linker,
    Lower, TypedFunc,
};
use wasmtime::{AsContextMut, Store};

use super::contract::{
    self, ActionBatch, Contract, Description, Evaluation, EvaluationRows, HostInfo, NamedColumn,
    Network, Prediction, RankRequest, Ranked, TaskLabels, TaskWeights, TrainingStep, Verdict,
};
use super::contract2;
use super::engine::HostState;

/// A guest that is ready to be instantiated.
pub(super) enum GuestPre {
    Second(contract2::ExpertPre<HostState>),
    Third(ThirdPre),
}

/// An instance of a guest.
pub(super) enum Guest {
    Second(contract2::Expert),
    Third(ThirdGuest),
}

/// A component of contract 3, with where its exports are.
pub(super) struct ThirdPre {
    instance: InstancePre<HostState>,
    exports: contract::ExpertIndices,
    hooks: OptionalHooks,
}

/// An instance of a component of contract 3.
pub(super) struct ThirdGuest {
    expert: contract::Expert,
    instance: Instance,
    hooks: OptionalHooks,
}

/// Where the hooks are that a component need not export.
#[derive(Clone)]
struct OptionalHooks {
    weights: Option<ComponentExportIndex>,
    evaluate_rows: Option<ComponentExportIndex>,
    validation_score: Option<ComponentExportIndex>,
}

/// The types of the hook `weights`.
type WeightsHook<'a> =
    TypedFunc<(&'a HostInfo, &'a ActionBatch), (Result<Vec<TaskWeights>, String>,)>;

/// The types of the hook `evaluate-rows`.
type EvaluateRowsHook<'a> =
    TypedFunc<(&'a HostInfo, &'a Evaluation, &'a EvaluationRows), (Verdict,)>;

/// The types of the hook `validation-score`.
type ValidationScoreHook<'a> =
    TypedFunc<(&'a HostInfo, &'a Evaluation, &'a EvaluationRows), (Result<Option<f64>, String>,)>;

impl GuestPre {
    /// Links a component that imports the types of `contract`.
    pub(super) fn new(
        linker: &Linker<HostState>,
        component: &Component,
        contract: Contract,
    ) -> wasmtime::Result<GuestPre> {
        let pre = linker.instantiate_pre(component)?;
        Ok(match contract {
            Contract::Second => GuestPre::Second(contract2::ExpertPre::new(pre)?),
            Contract::Third => {
                let index = |name| component.get_export_index(None, name);
                let hooks = OptionalHooks {
                    weights: index("weights"),
                    evaluate_rows: index("evaluate-rows"),
                    validation_score: index("validation-score"),
                };
                let exports = contract::ExpertIndices::new(&pre)?;
                GuestPre::Third(ThirdPre { instance: pre, exports, hooks })
            }
        })
    }

    pub(super) fn contract(&self) -> Contract {
        match self {
            GuestPre::Second(_) => Contract::Second,
            GuestPre::Third(_) => Contract::Third,
        }
    }

    /// Whether a component has the hook `weights`.
    pub(super) fn weighs(&self) -> bool {
        matches!(self, GuestPre::Third(pre) if pre.hooks.weights.is_some())
    }

    /// Whether a component has the hook `evaluate-rows`.
    pub(super) fn evaluates_rows(&self) -> bool {
        matches!(self, GuestPre::Third(pre) if pre.hooks.evaluate_rows.is_some())
    }

    /// Whether a component has the hook `validation-score`.
    pub(super) fn scores_passes(&self) -> bool {
        matches!(self, GuestPre::Third(pre) if pre.hooks.validation_score.is_some())
    }

    pub(super) fn instantiate(&self, store: &mut Store<HostState>) -> wasmtime::Result<Guest> {
        Ok(match self {
            GuestPre::Second(pre) => Guest::Second(pre.instantiate(store)?),
            GuestPre::Third(ThirdPre { instance, exports, hooks }) => {
                let instance = instance.instantiate(&mut *store)?;
                let expert = exports.load(&mut *store, &instance)?;
                Guest::Third(ThirdGuest { expert, instance, hooks: hooks.clone() })
            }
        })
    }
}

impl Guest {
    /// A description of columns and options that the host knows, or why it is none.
    pub(super) fn describe(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
    ) -> wasmtime::Result<Result<Description, String>> {
        match self {
            Guest::Second(guest) => contract2::describe(guest, store, info).map(Ok),
            Guest::Third(guest) => guest.expert.call_describe(store, info).map(Description::read),
        }
    }

    pub(super) fn network(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
    ) -> wasmtime::Result<Result<Network, String>> {
        match self {
            Guest::Second(guest) => contract2::network(guest, store, info),
            Guest::Third(guest) => guest.expert.call_network(store, info),
        }
    }

    pub(super) fn rank(
        &self,
        store: &mut Store<HostState>,
        request: &RankRequest,
        predictions: &[Prediction],
        columns: &[NamedColumn],
    ) -> wasmtime::Result<Result<Vec<Ranked>, String>> {
        match self {
            Guest::Second(guest) => contract2::rank(guest, store, request, predictions, columns),
            Guest::Third(guest) => guest.expert.call_rank(store, request, predictions, columns),
        }
    }

    pub(super) fn labels(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
        batch: &ActionBatch,
    ) -> wasmtime::Result<Result<Vec<TaskLabels>, String>> {
        match self {
            Guest::Second(guest) => contract2::labels(guest, store, info, batch),
            Guest::Third(guest) => guest.expert.call_labels(store, info, batch),
        }
    }

    pub(super) fn sample(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
        batch: &ActionBatch,
    ) -> wasmtime::Result<Vec<f32>> {
        match self {
            Guest::Second(guest) => contract2::sample(guest, store, info, batch),
            Guest::Third(guest) => guest.expert.call_sample(store, info, batch),
        }
    }

    pub(super) fn schedule(
        &self,
        store: &mut Store<HostState>,
        step: TrainingStep,
    ) -> wasmtime::Result<f32> {
        match self {
            Guest::Second(guest) => contract2::schedule(guest, store, step),
            Guest::Third(guest) => guest.expert.call_schedule(store, step),
        }
    }

    pub(super) fn evaluate(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
        evaluation: &Evaluation,
    ) -> wasmtime::Result<Verdict> {
        match self {
            Guest::Second(guest) => contract2::evaluate(guest, store, info, evaluation),
            Guest::Third(guest) => guest.expert.call_evaluate(store, info, evaluation),
        }
    }

    /// Calls the hook `weights`; a guest without it has none.
    pub(super) fn weights(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
        batch: &ActionBatch,
    ) -> wasmtime::Result<Result<Vec<TaskWeights>, String>> {
        let Guest::Third(guest) = self else { return Ok(Ok(Vec::new())) };
        let Some(index) = &guest.hooks.weights else { return Ok(Ok(Vec::new())) };
        let hook: WeightsHook = guest.hook(&mut *store, index)?;
        let (weights,) = hook.call(store, (info, batch))?;
        Ok(weights)
    }

    /// Calls the hook `evaluate-rows`, or `evaluate` of a guest without it.
    pub(super) fn evaluate_rows(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> wasmtime::Result<Verdict> {
        let Guest::Third(guest) = self else { return self.evaluate(store, info, evaluation) };
        let Some(index) = &guest.hooks.evaluate_rows else {
            return self.evaluate(store, info, evaluation);
        };
        let hook: EvaluateRowsHook = guest.hook(&mut *store, index)?;
        let (verdict,) = hook.call(store, (info, evaluation, rows))?;
        Ok(verdict)
    }

    /// Calls the hook `validation-score`; a guest without it has no score of its own.
    pub(super) fn validation_score(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> wasmtime::Result<Result<Option<f64>, String>> {
        let Guest::Third(guest) = self else { return Ok(Ok(None)) };
        let Some(index) = &guest.hooks.validation_score else { return Ok(Ok(None)) };
        let hook: ValidationScoreHook = guest.hook(&mut *store, index)?;
        let (score,) = hook.call(store, (info, evaluation, rows))?;
        Ok(score)
    }

    /// Says which hook has other types than the contract's, and how; they are looked up when they
    /// are called, since `rank` needs none of them.
    pub(super) fn check_hooks(&self, store: &mut Store<HostState>) -> Result<(), String> {
        let Guest::Third(guest) = self else { return Ok(()) };
        let OptionalHooks { weights, evaluate_rows, validation_score } = &guest.hooks;
        let of = |name: &'static str| {
            move |error: wasmtime::Error| {
                format!("its export `{name}` is not that of the contract: {error:#}")
            }
        };
        if let Some(index) = weights {
            let hook: wasmtime::Result<WeightsHook> = guest.hook(&mut *store, index);
            hook.map_err(of("weights"))?;
        }
        if let Some(index) = evaluate_rows {
            let hook: wasmtime::Result<EvaluateRowsHook> = guest.hook(&mut *store, index);
            hook.map_err(of("evaluate-rows"))?;
        }
        if let Some(index) = validation_score {
            let hook: wasmtime::Result<ValidationScoreHook> = guest.hook(&mut *store, index);
            hook.map_err(of("validation-score"))?;
        }
        Ok(())
    }
}

impl ThirdGuest {
    fn hook<P, R>(
        &self,
        store: impl AsContextMut,
        index: &ComponentExportIndex,
    ) -> wasmtime::Result<TypedFunc<P, R>>
    where
        P: ComponentNamedList + Lower,
        R: ComponentNamedList + Lift,
    {
        self.instance.get_typed_func(store, index)
    }
}

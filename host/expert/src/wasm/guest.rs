//! A guest of any contract that the host speaks, called with the types of the present one.

use wasmtime::Store;
use wasmtime::component::{Component, Linker};

use super::contract::{
    self, ActionBatch, Contract, Description, Evaluation, HostInfo, NamedColumn, Network,
    Prediction, RankRequest, Ranked, TaskLabels, TrainingStep, Verdict,
};
use super::contract2;
use super::engine::HostState;

/// A guest that is ready to be instantiated.
pub(super) enum GuestPre {
    Second(contract2::ExpertPre<HostState>),
    Third(contract::ExpertPre<HostState>),
}

/// An instance of a guest.
pub(super) enum Guest {
    Second(contract2::Expert),
    Third(contract::Expert),
}

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
            Contract::Third => GuestPre::Third(contract::ExpertPre::new(pre)?),
        })
    }

    pub(super) fn contract(&self) -> Contract {
        match self {
            GuestPre::Second(_) => Contract::Second,
            GuestPre::Third(_) => Contract::Third,
        }
    }

    pub(super) fn instantiate(&self, store: &mut Store<HostState>) -> wasmtime::Result<Guest> {
        Ok(match self {
            GuestPre::Second(pre) => Guest::Second(pre.instantiate(store)?),
            GuestPre::Third(pre) => Guest::Third(pre.instantiate(store)?),
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
            Guest::Third(guest) => guest.call_describe(store, info).map(Description::read),
        }
    }

    pub(super) fn network(
        &self,
        store: &mut Store<HostState>,
        info: &HostInfo,
    ) -> wasmtime::Result<Result<Network, String>> {
        match self {
            Guest::Second(guest) => contract2::network(guest, store, info),
            Guest::Third(guest) => guest.call_network(store, info),
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
            Guest::Third(guest) => guest.call_rank(store, request, predictions, columns),
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
            Guest::Third(guest) => guest.call_labels(store, info, batch),
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
            Guest::Third(guest) => guest.call_sample(store, info, batch),
        }
    }

    pub(super) fn schedule(
        &self,
        store: &mut Store<HostState>,
        step: TrainingStep,
    ) -> wasmtime::Result<f32> {
        match self {
            Guest::Second(guest) => contract2::schedule(guest, store, step),
            Guest::Third(guest) => guest.call_schedule(store, step),
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
            Guest::Third(guest) => guest.call_evaluate(store, info, evaluation),
        }
    }
}

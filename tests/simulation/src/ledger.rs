//! What callers were told, against which the streams are held.

use std::collections::BTreeMap;

use hypercast_stream::{
    events::{AppendReceipt, EventKind},
    streams::{StreamRecord, Topic},
};

use crate::{
    expert_trainer::ExpertLedger,
    installation::Life,
    plan::Plan,
    publications::{self, NamedWeights},
    rollout_oracles::RolloutLedger,
    versions::RegisteredVersion,
    workload::IngestCall,
    world::Process,
};

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The oracle that says so.
    pub oracle: &'static str,
    /// What it saw.
    pub what: String,
}

/// What was told, by the number of the call.
#[derive(Default)]
pub struct Ledger {
    /// Whether the call was acknowledged.
    pub acknowledged: Vec<bool>,
    /// Record ids that callers had sent when the call was made first.
    sent_before: Vec<Option<u64>>,
    /// What went wrong.
    pub violations: Vec<Violation>,
    /// Registrations of versions that processes were told to be stored.
    pub registered: Vec<RegisteredVersion>,
    /// Whether some that processes were told of are gone, since the stream was restored.
    pub decisions_undone: bool,
    /// Weights that trainers began to publish, in that order.
    pub published: Vec<NamedWeights>,
    /// The number of those that were the last to be surely published.
    pub last_published: Option<usize>,
    /// What the trainer of an expert published.
    pub expert: ExpertLedger,
    /// What weights were learned from, by their mark.
    pub learned: BTreeMap<u64, Vec<u64>>,
    /// Rollouts and pushes.
    pub rollouts: RolloutLedger,
    /// Gaps that joiners counted.
    pub gaps_told: u64,
    /// Records that the server lost.
    pub lost: BTreeMap<Topic, Vec<StreamRecord>>,
    /// Positions of events at which a joiner went on from a state of an earlier version.
    pub upgraded: Vec<u64>,
    /// Gaps that joiners counted in the events.
    pub event_gaps_told: u64,
    /// Joined records that the server lost inside of their stream.
    pub lost_joined: Vec<StreamRecord>,
    /// Those that it lost at the end, so that others may have come at their positions.
    pub cut_joined: Vec<StreamRecord>,
    /// How often that was so.
    pub cuts: u64,
    ids_sent: u64,
    moments: u64,
}

/// What a life of a joiner has seen of missing events.
#[derive(Debug, Clone, Copy)]
pub struct GapsSeen {
    /// Gaps that the server showed to its process.
    pub met: u64,
    /// Gaps that it counted, in any of its streams.
    pub told: u64,
    /// Whether it must stop at one.
    pub is_to_stop: bool,
}

impl GapsSeen {
    /// Of a process; none if it does not join.
    pub fn of(process: &Process, life: &Option<Life>) -> Option<GapsSeen> {
        let told = life.as_ref()?.gaps_told()?;
        let is_to_stop = life.as_ref()?.stops_at_gaps;
        Some(GapsSeen { met: process.network.gaps.get(), told, is_to_stop })
    }
}

impl Ledger {
    /// Of calls of which none was made.
    pub fn new(calls: usize) -> Ledger {
        let (acknowledged, sent_before) = (vec![false; calls], vec![None; calls]);
        Ledger { acknowledged, sent_before, ..Ledger::default() }
    }

    /// The next one in an order of what several processes do.
    pub fn moment(&mut self) -> u64 {
        self.moments += 1;
        self.moments
    }

    /// Notes that a call is made.
    pub fn attempt(&mut self, number: usize, call: &IngestCall) {
        self.sent_before[number].get_or_insert(self.ids_sent);
        self.ids_sent += call.events.len() as u64;
    }

    /// Notes a receipt; says what is wrong with it.
    pub fn acknowledge(
        &mut self,
        number: usize,
        call: &IngestCall,
        receipt: AppendReceipt,
        plan: &Plan,
    ) -> Option<String> {
        if !std::mem::replace(&mut self.acknowledged[number], true) {
            return None;
        }
        let has_ids = call.events.iter().all(|event| !matches!(event.kind, EventKind::Item(_)));
        let sent = self.ids_sent - self.sent_before[number]?;
        let is_known = sent < plan.settings.remembered_ids as u64;
        (has_ids && is_known && receipt.accepted > self.lost(&Topic::events()).len()).then(|| {
            format!(
                "call {number} was acknowledged, and sent again after {sent} other events; {} of \
                 its events were stored again",
                receipt.accepted
            )
        })
    }

    /// Whether the trainer of a stream's weights had these when it published.
    pub fn has_weights(&self, topic: &Topic, weights: &NamedWeights) -> bool {
        if *topic == publications::topic() {
            self.published.contains(weights)
        } else {
            self.expert.has(weights)
        }
    }

    /// What the server lost of a stream.
    pub fn lost(&self, topic: &Topic) -> &[StreamRecord] {
        self.lost.get(topic).map_or(&[], Vec::as_slice)
    }

    /// The first position of a stream at which a record was lost at any time; else its end.
    pub fn intact(&self, topic: &Topic) -> u64 {
        self.lost(topic).iter().map(|record| record.position).min().unwrap_or(u64::MAX)
    }

    /// Whether every call was.
    pub fn all_acknowledged(&self) -> bool {
        self.acknowledged.iter().all(|&told| told)
    }
}

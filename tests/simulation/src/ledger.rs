//! What callers were told, against which the streams are held.

use hypercast_stream::events::{AppendReceipt, EventKind};

use crate::{
    plan::Plan, publications::NamedWeights, versions::RegisteredVersion, workload::IngestCall,
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
    /// Weights that trainers began to publish, in that order.
    pub published: Vec<NamedWeights>,
    /// The name of those that were the last to be surely published.
    pub last_published: Option<String>,
    ids_sent: u64,
    moments: u64,
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
        (has_ids && is_known && receipt.accepted > 0).then(|| {
            format!(
                "call {number} was acknowledged, and sent again after {sent} other events; {} of \
                 its events were stored again",
                receipt.accepted
            )
        })
    }

    /// Whether every call was.
    pub fn all_acknowledged(&self) -> bool {
        self.acknowledged.iter().all(|&told| told)
    }
}

//! What callers were told, against which the streams are held.

use hypercast_stream::events::{AppendReceipt, EventKind};

use crate::{plan::Plan, workload::Call};

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
    /// Record ids that callers had sent when a call was acknowledged; none if it was not.
    pub acknowledged: Vec<Option<u64>>,
    /// What went wrong.
    pub violations: Vec<Violation>,
    ids_sent: u64,
}

impl Ledger {
    /// Of calls of which none was made.
    pub fn new(calls: usize) -> Ledger {
        Ledger { acknowledged: vec![None; calls], ..Ledger::default() }
    }

    /// Notes that a call is made.
    pub fn attempt(&mut self, call: &Call) {
        self.ids_sent += call.events.len() as u64;
    }

    /// Notes a receipt; says what is wrong with it.
    pub fn acknowledge(
        &mut self,
        number: usize,
        call: &Call,
        receipt: AppendReceipt,
        plan: &Plan,
    ) -> Option<String> {
        let before = self.acknowledged[number].replace(self.ids_sent)?;
        let has_ids = call.events.iter().all(|event| !matches!(event.kind, EventKind::Item(_)));
        let sent = self.ids_sent - before;
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
        self.acknowledged.iter().all(Option::is_some)
    }
}

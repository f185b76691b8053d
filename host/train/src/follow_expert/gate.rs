//! What may be published: the expert's own word on what was predicted since the last publication,
//! by what learns and by what was published last, on the same rows, and the operator's limits of
//! NE. It publishes nothing itself.

use prometheus::IntCounter;
use serde_json::{Value, json};

use super::{
    super::{
        eval_window::{self, EvalWindow, WindowPredictions, judge},
        holds::HoldLog,
    },
    online::OnlineExpert,
    state::LastPublished,
};
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::NeLimits;
use hypercast_expert::{
    Chunk,
    train::{SavedTrainer, ScoredRows},
    wasm::contract::Verdict,
};

/// Puts the rows measured since the last publication to the expert's `evaluate`.
pub(super) struct PublishGate {
    pub(super) measured: EvalWindow,
    /// What was published last.
    pub(super) last: Option<SavedTrainer>,
    limits: NeLimits,
    holds: HoldLog,
    rolled_back: IntCounter,
    schedule_faults: IntCounter,
}

/// The expert's word, and what it was told, for people.
pub(super) struct GateDecision {
    pub(super) verdict: Verdict,
    pub(super) measured: Value,
}

impl PublishGate {
    /// A gate in a trainer's work folder, that goes on with what was measured since `last` was
    /// published.
    ///
    /// # Errors
    /// A limit is for a task that the expert does not have.
    pub(super) fn new(
        measured: EvalWindow,
        last: Option<SavedTrainer>,
        limits: NeLimits,
        holds: HoldLog,
        telemetry: &JobMetrics,
    ) -> Result<PublishGate> {
        measured.check_limits(&limits)?;
        Ok(PublishGate {
            measured,
            last,
            limits,
            holds,
            rolled_back: telemetry.counter(
                "hypercast_rolled_back_publications_total",
                "Times that the expert's evaluate took the trainer back to what was published last",
            ),
            schedule_faults: telemetry.counter(
                "hypercast_schedule_faults_total",
                "Faults of the expert's schedule; their steps were taken at the host's own rate",
            ),
        })
    }

    /// Notes what `expert` said of rows that it is about to learn from, and what those parameters
    /// would say that were published last.
    pub(super) fn measure(
        &mut self,
        expert: &mut dyn OnlineExpert,
        chunk: Chunk<'_>,
        candidate: &[Vec<f32>],
    ) -> Result<()> {
        let serving = expert.predict_as_published(chunk)?;
        let targets = expert.targets(chunk)?;
        let said = WindowPredictions { candidate, serving: &serving, targets: &targets };
        self.measured.push(chunk.examples.iter(), said, |_| true);
        expert.sample(chunk, ScoredRows { candidate, serving: &serving, targets: &targets })
    }

    /// Notes how often `schedule` has failed so far.
    pub(super) fn scheduled(&self, expert: &dyn OnlineExpert) {
        let new = expert.schedule_faults().saturating_sub(self.schedule_faults.get());
        self.schedule_faults.inc_by(new);
    }

    /// Whether what was learned may be published. There is nothing to go back to before the first
    /// publication.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub(super) fn ask(&self, expert: &dyn OnlineExpert) -> Result<GateDecision> {
        let said = expert.evaluate(&self.measured.evaluation());
        let judged = judge(said, &self.measured, &self.limits, self.last.is_some());
        let verdict = match (judged, &self.last) {
            (Verdict::RollBack(why), None) => {
                Verdict::Hold(format!("{why} (nothing was published that it could go back to)"))
            }
            (verdict, _) => verdict,
        };
        match &verdict {
            Verdict::Publish => {}
            Verdict::Hold(reason) => self.holds.held(reason)?,
            Verdict::RollBack(_) => self.rolled_back.inc(),
        }
        let measured = self.measured.line();
        Ok(GateDecision { verdict, measured })
    }

    /// From here on this is what was published last, and all is measured anew.
    pub(super) fn published(&mut self, saved: SavedTrainer) -> Result<()> {
        self.last = Some(saved);
        self.measured.rows.clear();
        self.holds.released()
    }

    /// What is to be saved beside a trainer that was not published as it is.
    pub(super) fn state(&self) -> (LastPublished, Vec<eval_window::WindowRow>) {
        let last = self
            .last
            .as_ref()
            .map_or(LastPublished::Nothing, |last| LastPublished::Earlier(Box::new(last.clone())));
        (last, self.measured.rows.iter().cloned().collect())
    }
}

impl GateDecision {
    /// A line for people; none of a publication, which has its own.
    pub(super) fn line(&self, position: Value) -> Option<Value> {
        let (kind, reason) = match &self.verdict {
            Verdict::Publish => return None,
            Verdict::Hold(reason) => ("held", reason),
            Verdict::RollBack(reason) => ("rolled-back", reason),
        };
        Some(json!({
            "kind": kind, "reason": reason, "position": position, "evaluation": self.measured,
        }))
    }
}

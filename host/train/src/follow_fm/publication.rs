//! How a streaming trainer publishes: the gate judges what was learned, what moved is taken from
//! the weights, and while another thread sends it, learning goes on. One publication is sent at a
//! time; one that fails is tried again later, as a snapshot.

use std::{io::Write, time::Duration};

use hypercast_core::clock;
use hypercast_fm::checkpoint::FmManifest;
use hypercast_stream::{
    publish::{SentPublication, TrainingPosition},
    registry::self_register_fm,
};
use serde_json::json;

use super::{FmFollower, gate::FmVerdict, report::timed};
use crate::{
    error::{Error, Result},
    progress_log::{tell, told},
};

/// A publication that is being sent.
pub(super) struct FmPublication {
    manifest: FmManifest,
    verdict: FmVerdict,
    /// Where the trainer stood.
    position: u64,
    /// How long nothing was learned for it: the gate's time, that of taking what moved, and in the
    /// end that of the registry.
    pause: Duration,
}

impl FmFollower {
    /// Begins a publication if it is due, and the one before is sent and loaded by the gate. Tells
    /// of one that has ended.
    pub(super) fn publish_if_due(&mut self, out: &mut dyn Write) -> Result<()> {
        let every = Duration::from_secs(self.config.publish.every_s);
        if !self.is_publishing() && clock::since(self.asked_at) >= every {
            self.publish(out)?;
        }
        let Some(ended) = self.publisher.ended() else { return Ok(()) };
        self.end_publication(ended, out)?;
        self.gate.catch_up_beside();
        Ok(())
    }

    /// Whether a publication is being sent, or loaded by the gate.
    pub(super) fn is_publishing(&self) -> bool {
        self.publisher.is_sending() || self.gate.is_catching_up()
    }

    /// Begins to publish what was learned, unless the gate holds it, or nothing was.
    pub(super) fn publish(&mut self, out: &mut dyn Write) -> Result<()> {
        let started = clock::instant();
        self.asked_at = started;
        let position = self.place.position();
        if self.asked_position == Some(position) {
            return Ok(());
        }
        let facts = TrainingPosition {
            trained_position: self.place.trained_position(),
            trained_until_ms: self.place.until_ms,
            ingested_ms: self.place.ingested_ms,
        };
        let times = &mut self.report.times;
        timed(&mut times.gate, || {
            self.gate.score();
            self.gate.compare_taes(&*self.trainer)
        })?;
        let trained = self.trainer.trained_weights(&self.options.version)?;
        let verdict = self.gate.judge(&trained.manifest);
        let Some(reason) = &verdict.held else {
            timed(&mut times.publish, || self.publisher.begin(&trained, facts))?;
            let (manifest, pause) = (trained.manifest, clock::since(started));
            self.publication = Some(FmPublication { manifest, verdict, position, pause });
            self.asked_position = Some(position);
            return Ok(());
        };
        self.gate.held(reason)?;
        self.report.held += 1;
        self.asked_position = Some(position);
        let mut line = json!({ "kind": "held", "reason": reason, "position": position });
        verdict.describe(&mut line);
        tell(out, &line)
    }

    /// Waits until the publication has ended that is being sent, if one is.
    pub(super) fn await_publication(&mut self, out: &mut dyn Write) -> Result<()> {
        let Some(ended) = self.publisher.wait() else { return Ok(()) };
        self.end_publication(ended, out)
    }

    /// Notes how a publication ended. One that failed is asked about again, although nothing was
    /// learned since.
    fn end_publication(
        &mut self,
        ended: hypercast_stream::Result<SentPublication>,
        out: &mut dyn Write,
    ) -> Result<()> {
        let publication = self.publication.take().expect("it was noted when it began");
        let FmPublication { manifest, verdict, position, pause } = publication;
        let sent = ended.inspect_err(|_| self.asked_position = None)?;
        let started = clock::instant();
        let (registry, failures) = (&mut self.registry, &mut self.failures);
        self_register_fm(registry, &*self.engine, &manifest, &self.schema, failures);
        self.gate.published()?;
        let pause = pause + clock::since(started);
        self.report.published += 1;
        self.meters.published(pause, &sent);
        let mut line = told(&sent.stats, json!(position), pause + sent.took);
        line["paused_ms"] = json!(pause.as_millis() as u64);
        verdict.describe(&mut line);
        tell(out, &line)
    }

    /// Counts a failure, and says it once. It is tried again later.
    pub(super) fn publication_failed(&mut self, error: &Error) {
        self.meters.failures.inc();
        if self.failures.is_news(error) {
            tracing::warn!(%error, "weights could not be published; trying again later");
        }
        self.asked_at = clock::instant();
    }
}

//! Publishing beside learning: a publication is prepared on the trainer's thread and sent by
//! another.

use std::{panic::resume_unwind, time::Duration};

use hypercast_core::{background_job::BackgroundJob, clock};

use super::{PublicationStats, Publisher, TrainingPosition, WeightSource};
use crate::error::Result;

/// Publishes a model's weights while its trainer goes on. One publication is sent at a time, so
/// that memory holds one ([`super::PreparedPublication`]), besides the eight records, of a MiB at
/// most, that are appended together. Dropping it waits for a publication that is being sent.
pub struct BackgroundPublisher {
    /// `None` while a publication is sent: its thread has the publisher.
    idle: Option<Publisher>,
    sending: Option<BackgroundJob<SendResult>>,
}

/// What the thread of a publication gives back.
struct SendResult {
    publisher: Publisher,
    sent: Result<SentPublication>,
}

/// A publication that is durable.
#[derive(Debug, Clone, Copy)]
pub struct SentPublication {
    /// Its kind, and what it has in rows, blocks and bytes.
    pub stats: PublicationStats,
    /// How long it took to send, beside the trainer.
    pub took: Duration,
}

impl BackgroundPublisher {
    /// No publication is sent yet.
    pub fn new(publisher: Publisher) -> BackgroundPublisher {
        BackgroundPublisher { idle: Some(publisher), sending: None }
    }

    /// Whether a publication is sent, or has ended and nobody has asked how.
    pub fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Takes what is to be published from weights that do not change meanwhile, and begins to send
    /// it.
    ///
    /// # Errors
    /// As [`Publisher::prepare`].
    ///
    /// # Panics
    /// A publication is being sent, or the system has no thread left.
    pub fn begin(&mut self, source: &dyn WeightSource, training: TrainingPosition) -> Result<()> {
        let publisher = self.idle.as_mut().expect("one publication is sent at a time");
        let prepared = publisher.prepare(source, training)?;
        let mut publisher = self.idle.take().expect("it was there");
        let send = move || {
            let started = clock::instant();
            let sent = publisher.send(prepared);
            let sent = sent.map(|stats| SentPublication { stats, took: clock::since(started) });
            SendResult { publisher, sent }
        };
        let job = BackgroundJob::start("publish", send);
        self.sending = Some(job.unwrap_or_else(|error| panic!("{error}")));
        Ok(())
    }

    /// How the publication ended that was begun last, once; `None` while it is sent.
    pub fn ended(&mut self) -> Option<Result<SentPublication>> {
        let job = self.sending.take_if(|job| job.is_finished())?;
        Some(self.settle(job))
    }

    /// The same, after waiting for its end; `None` if there is none.
    pub fn wait(&mut self) -> Option<Result<SentPublication>> {
        let job = self.sending.take()?;
        Some(self.settle(job))
    }

    fn settle(&mut self, job: BackgroundJob<SendResult>) -> Result<SentPublication> {
        let SendResult { publisher, sent } = job.join().unwrap_or_else(|why| resume_unwind(why));
        self.idle = Some(publisher);
        sent
    }
}

impl Drop for BackgroundPublisher {
    fn drop(&mut self) {
        if let Some(job) = self.sending.take() {
            // If it panicked, the log has the panic already.
            let _ = job.join();
        }
    }
}

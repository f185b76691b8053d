//! The ids that are texts, of a daemon's callers: it keeps each with its key before it answers, so
//! that reports can name users and items, and refuses one whose key another text has.
//!
//! An answer has the ids of its request, so it needs none of this. Where the schema says that ids
//! are integers, nothing is kept.

use std::{path::Path, sync::Mutex};

use hypercast_config::Config;
use hypercast_core::logging::RepeatedFailures;
use hypercast_data::{
    Error as DataError,
    dataset::{
        entity_id::TextId,
        id_dictionary::{IdDictionary, InsertedIds},
        ids::{ITEM_IDS, USER_IDS, for_each_id},
    },
    schema::{EntityIds, IdKind, Schema},
};
use prometheus::{IntCounterVec, IntGauge};

use crate::{
    error::Result,
    metrics::Metrics,
    request::api::{Refusal, RequestResult},
    threads::lock,
};

/// The ids that are texts. See the module.
#[derive(Default)]
pub struct CallerIds {
    /// None where all ids are integers.
    kept: Option<KeptIds>,
}

struct KeptIds {
    dictionary: IdDictionary,
    count: IntGauge,
    left_out: IntCounterVec,
    failures: Mutex<RepeatedFailures>,
}

impl CallerIds {
    /// Opens the dictionary of a process, whose part of the system is `role`, and takes those of
    /// the data set over.
    ///
    /// # Errors
    /// Another process has it, the data set's is damaged, or the file system fails.
    pub fn open(
        config: &Config,
        dataset: &Path,
        schema: &Schema,
        role: &str,
        metrics: &Metrics,
    ) -> Result<CallerIds> {
        let EntityIds { users, items } = schema.ids;
        if [users, items] == [IdKind::Integer; 2] {
            return Ok(CallerIds::default());
        }
        let dir = config.paths.state.join("ids").join(role);
        let kept = KeptIds {
            dictionary: IdDictionary::open(&dir, config.server.max_text_ids)?,
            count: metrics.gauge("hypercast_text_ids", "Ids that are strings whose texts are kept"),
            left_out: metrics.counter(
                "hypercast_text_ids_left_out_total",
                "Times that the text of an id was not kept: full (server.max_text_ids), failed (the file could not be written)",
                &["cause"],
            ),
            failures: Mutex::default(),
        };
        for (kind, file) in [(users, USER_IDS), (items, ITEM_IDS)] {
            if kind == IdKind::String {
                kept.take_over(dataset, file)?;
            }
        }
        Ok(CallerIds { kept: Some(kept) })
    }

    /// Keeps the ids of a ranking. It is answered also where they cannot be written.
    ///
    /// # Errors
    /// An id has the key of another one.
    pub(crate) fn store<'a>(
        &self,
        ids: impl Iterator<Item = &'a TextId> + Clone,
    ) -> RequestResult<()> {
        let Some(kept) = &self.kept else { return Ok(()) };
        match kept.insert(ids) {
            Err(error @ DataError::IdCollision { .. }) => refused(&error),
            Err(error) => {
                kept.left_out.with_label_values(&["failed"]).inc();
                if lock(&kept.failures).is_news(&error) {
                    tracing::warn!(%error, "the texts of ids cannot be kept; requests are answered");
                }
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }

    /// Keeps the ids of events, durably.
    ///
    /// # Errors
    /// An id has the key of another one; then none is kept. The file system fails.
    pub(crate) fn store_durably<'a>(
        &self,
        ids: impl Iterator<Item = &'a TextId> + Clone,
    ) -> RequestResult<()> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let stored = kept.insert(ids).and_then(|_| kept.dictionary.sync());
        stored.or_else(|error| match error {
            DataError::IdCollision { .. } => refused(&error),
            error => Err(Refusal::internal(error)),
        })
    }
}

fn refused(error: &DataError) -> RequestResult<()> {
    Err(Refusal::BadRequest(error.to_string()))
}

impl KeptIds {
    fn insert<'a>(
        &self,
        ids: impl Iterator<Item = &'a TextId> + Clone,
    ) -> hypercast_data::Result<InsertedIds> {
        let inserted = self.dictionary.insert(ids)?;
        self.count.set(self.dictionary.len() as i64);
        if inserted.left_out > 0 {
            self.left_out.with_label_values(&["full"]).inc_by(inserted.left_out as u64);
            let full = "the dictionary of ids is full (server.max_text_ids): requests go on, and \
                        reports name further ids by their keys";
            if lock(&self.failures).is_news(&full) {
                tracing::warn!("{full}");
            }
        }
        Ok(inserted)
    }

    /// Takes the ids of a data set's dictionary over, if it is here: a process that only takes
    /// events needs no more of the data set than its schema.
    fn take_over(&self, dataset: &Path, file: &str) -> Result<()> {
        let path = dataset.join(file);
        if !path.is_file() {
            let path = path.display();
            tracing::info!("{path} is missing: reports name its ids once requests have sent them");
            return Ok(());
        }
        let mut batch = Vec::with_capacity(TAKE_OVER);
        for_each_id(dataset, file, |id| {
            batch.push(id);
            if batch.len() == TAKE_OVER {
                self.insert(batch.iter())?;
                batch.clear();
            }
            Ok(())
        })?;
        self.insert(batch.iter())?;
        Ok(self.dictionary.sync()?)
    }
}

/// Ids of a data set that are taken over at a time.
const TAKE_OVER: usize = 4096;

//! Followers of streams and logs go on through growths of the schema: each ends where it is, as it
//! does on SIGTERM, and is opened anew in the same process.

use std::path::Path;
use std::sync::Arc;

use hypercast_core::shutdown::Shutdown;
use hypercast_data::{
    dataset::Dataset,
    logs,
    schema::{Schema, SchemaWatch},
};

/// What a follower follows.
pub struct Followed<'a> {
    /// The folder of its data set.
    pub dataset: &'a Path,
    /// The folder of the logs that it follows, if it follows no streams.
    logs: Option<&'a Path>,
    /// Whether it is the FM's trainer, which alone reads alignment modules.
    is_fm_trainer: bool,
}

impl<'a> Followed<'a> {
    /// Streams, whose writers have read the data set's own schema.
    pub fn streams(dataset: &'a Path) -> Followed<'a> {
        Followed { dataset, logs: None, is_fm_trainer: false }
    }

    /// Streams that the FM's trainer follows.
    pub fn by_fm_trainer(dataset: &'a Path) -> Followed<'a> {
        Followed { is_fm_trainer: true, ..Followed::streams(dataset) }
    }

    /// Feature logs, whose writer takes a growth over before those who read them.
    pub fn logs(dataset: &'a Path, logs: &'a Path) -> Followed<'a> {
        Followed { logs: Some(logs), ..Followed::streams(dataset) }
    }

    /// Notices that what is followed may be of a new layout.
    fn watch(&self, own: Arc<Schema>) -> SchemaWatch {
        match self.logs {
            Some(logs) => SchemaWatch::of_logs(logs::schema_path(logs), own),
            None => {
                let of = match self.is_fm_trainer {
                    true => SchemaWatch::of_fm_trainer,
                    false => SchemaWatch::new,
                };
                of(self.dataset.join("schema.toml"), own)
            }
        }
    }

    /// Runs a follower until it ends by itself or `signals` asks it to; opens it anew each time
    /// that the schema has grown.
    ///
    /// # Errors
    /// The data set cannot be read, or the follower fails while the schema has not grown.
    pub fn through_growths(
        self,
        signals: &Shutdown,
        mut follow: impl FnMut(Dataset, &Shutdown) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut before = None;
        loop {
            let dataset = Dataset::open(self.dataset)?;
            anyhow::ensure!(
                before.as_ref() != Some(&dataset.schema),
                "what is followed has a schema that has grown, and {} has that of before: run \
                 `hypercast schema apply` on this machine, too, and start this again",
                self.dataset.display()
            );
            before = Some(dataset.schema.clone());
            let watch = self.watch(dataset.schema.clone());
            let stop = signals.part(move || watch.has_grown());
            let ended = follow(dataset, &stop);
            if signals.is_requested() || !stop.is_requested() {
                return ended;
            }
            match ended {
                Ok(()) => tracing::info!("the schema has grown; going on under the new one"),
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "ended while the schema grew; going on under the new one where it was saved"
                ),
            }
        }
    }
}

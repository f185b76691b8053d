//! The logging tier: the host's own, with models that say which weights they have. Each request of
//! `joined` is logged once, and with no weights that had learned from it.

use std::{collections::BTreeMap, io, path::Path, sync::Arc, time::Duration};

use hypercast_config::Config;
use hypercast_core::{disk, shutdown::Shutdown};
use hypercast_data::dataset::table::{CellType, Field, TableReader};
use hypercast_data::schema::MAX_ACTIONS;
use hypercast_stream::streams::{StreamEngine, StreamRecord};
use hypercast_train::{
    ServiceContext,
    logging::{LoggingOptions, LoggingTier, ToLog},
};

use crate::{
    installation::{config, dataset},
    model::{NotingRuntime, RecordKey, mark_of},
    plan::Role,
    plant::Plant,
    trainer::{JoinedKey, KeyCounts, VERSION},
    world::Simulation,
};

/// A logging tier in one of its lives.
pub struct SteppedTier(LoggingTier);

impl SteppedTier {
    /// Goes on behind the last complete file.
    ///
    /// # Errors
    /// What it would say before it ends.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        config: &Config,
        plant: Option<Plant>,
    ) -> Result<SteppedTier, String> {
        let context = ServiceContext { dataset: dataset(), config, engine };
        let runtime = Arc::new(NotingRuntime { plant });
        let options = LoggingOptions::default();
        let opened = LoggingTier::open(context, runtime, options, &Shutdown::default());
        Ok(SteppedTier(opened.map_err(|error| error.to_string())?))
    }

    /// Does what is to be done now, and says whether it logged something.
    ///
    /// # Errors
    /// What it says before it ends.
    pub fn step(&mut self) -> Result<bool, String> {
        let to_log = ToLog { version: VERSION.into(), checkpoint: None, published: true };
        let before = self.0.position();
        let mut active = || Ok(vec![to_log.clone()]);
        let stepped = self.0.step(&mut active, Duration::ZERO, &mut io::sink());
        stepped.map_err(|error| error.to_string())?;
        Ok(self.0.position() > before)
    }

    /// Ends it in order: the file under way is complete.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn stop(self) -> Result<(), String> {
        self.0.finish(&mut io::sink()).map(drop).map_err(|error| error.to_string())
    }
}

/// A request in the logs.
struct LoggedRow {
    key: u64,
    /// The weights of its embeddings; `None` if there were none that it could have.
    mark: Option<u64>,
}

/// Holds the logs against `joined`, once the tier has ended in order.
pub fn check(world: &Simulation, joined: &[StreamRecord]) {
    let (at, process) = world.process(Role::LoggingTier);
    if !world.finish(at) {
        return;
    }
    let logs = config(&world.plan).paths.logs;
    let rows = match world.observe(&process.machine, || read_logs(&logs)) {
        Ok(rows) => rows,
        Err(error) => return world.violate("logged once", error),
    };
    let mut left = KeyCounts::new(world);
    // By key, how many records have it.
    let mut same: BTreeMap<u64, usize> = BTreeMap::new();
    // Before the first publication examples wait.
    let waits = world.ledger.borrow().last_published.is_none();
    for record in joined {
        let Some(JoinedKey { key, has_targets }) = JoinedKey::of(record) else { continue };
        *same.entry(key).or_default() += 1;
        match has_targets {
            true if waits => left.allow(key),
            true => left.expect(key, record.position),
            false => {}
        }
    }
    let ledger = world.ledger.borrow();
    let mut leaks = Vec::new();
    for LoggedRow { key, mark } in rows {
        left.came(key);
        // Weights without a mark have learned from nothing.
        let learned = mark.filter(|&mark| mark != 0).map(|mark| ledger.learned.get(&mark));
        // What is there twice may be learned from as the one and logged as the other.
        let is_single = same.get(&key) == Some(&1);
        match learned {
            Some(None) => leaks.push(format!("no trainer had the weights of record {key:016x}")),
            Some(Some(learned)) if is_single && learned.contains(&key) => {
                leaks.push(format!("weights of record {key:016x} had learned from it"));
            }
            _ => {}
        }
    }
    drop(ledger);
    leaks.into_iter().for_each(|leak| world.violate("no leak", leak));
    left.tell(world, "logged once");
}

/// All rows of complete files, as any tool reads them.
fn read_logs(logs: &Path) -> Result<Vec<LoggedRow>, String> {
    let names = disk::names(logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    let is_complete = |name: &str| name.starts_with("requests-") && name.ends_with(".parquet");
    let mut rows = Vec::new();
    for name in names {
        let name = name.to_string_lossy();
        if is_complete(&name) {
            let examples = logs.join(name.replacen("requests-", "examples-", 1));
            read_file(&logs.join(&*name), &examples, &mut rows)
                .map_err(|error| error.to_string())?;
        }
    }
    Ok(rows)
}

fn read_file(
    requests: &Path,
    examples: &Path,
    rows: &mut Vec<LoggedRow>,
) -> hypercast_data::Result<()> {
    let (requests, examples) = (TableReader::open(requests)?, TableReader::open(examples)?);
    let item = &dataset().schema.id_columns()[1];
    let tae = format!("tae:{VERSION}");
    let of_requests = [
        Field::new("request", CellType::U64),
        Field::new("time_ms", CellType::I64),
        Field::new("correction", CellType::Bool),
        Field::new("targets", CellType::U32),
    ];
    let mut of_examples = vec![
        Field::new(item.clone(), CellType::U64),
        Field::new("actions", CellType::U64).of_masks(MAX_ACTIONS),
        Field::new("known", CellType::U64).of_masks(MAX_ACTIONS),
    ];
    if examples.has(&tae) {
        of_examples.push(Field::list(tae, CellType::F32));
    }
    for group in 0..requests.groups() {
        let requests = requests.read(group, &of_requests)?;
        let examples = examples.read(group, &of_examples)?;
        let mut target = 0;
        for (row, &request) in requests[0].u64s().iter().enumerate() {
            let (time_ms, is_correction) = (requests[1].i64s()[row], requests[2].bools()[row]);
            let mut key = RecordKey::new(request, time_ms, is_correction);
            let mark = examples.get(3).and_then(|tae| mark_of(&tae.f32s()[tae.range(target)]));
            for _ in 0..requests[3].u32s()[row] {
                let [item, actions, known] = [0, 1, 2].map(|column: usize| &examples[column]);
                key.add(item.u64s()[target], actions.u64s()[target], known.u64s()[target]);
                target += 1;
            }
            rows.push(LoggedRow { key: key.number(), mark });
        }
    }
    Ok(())
}

//! Every crash point of what writes files that must survive: a script runs again and again, and is
//! ended before its first operation on the disk, its second one, and so on. After each, another
//! process must find what the script had acknowledged.

use std::{
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
    path::Path,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use hypercast_core::{atomic_dir, atomic_file, disk, simulated};
use hypercast_data::dataset::{entity_id::TextId, id_dictionary::IdDictionary, ids::id_key};
use hypercast_data::logs::{
    LogFollower, LogOptions, LogPosition, LogRow, LogVersion, LogWriter, LoggedPlace, TaeStorage,
};
use hypercast_fm::example::{Example, Item, Outcome, Target, User};
use hypercast_simulation::{
    disk::NameOrder,
    host::{ArmedFault, DiskFault, Machine, ProcessHost, SimulatedCrash, SimulatedTime},
    installation::dataset,
};
use hypercast_stream::{
    join::StateDir,
    streams::{DirectoryEngine, DirectoryLimits, Record, StreamEngine, StreamPlace, Topic},
};

/// How often each power cut is tried.
const SEEDS: u64 = 12;

/// Runs `script` with a crash at each of its operations; `check` gets what it had acknowledged by
/// then, as the number of its calls of the closure. Power cuts are tried with several seeds, since
/// each loses something else.
fn every_crash_point(seeds: u64, script: impl Fn(&dyn Fn()), check: impl Fn(usize)) {
    let faults = [
        DiskFault::Kill,
        DiskFault::PowerCut(NameOrder::Journal),
        DiskFault::PowerCut(NameOrder::Any),
    ];
    let mut points = 0;
    for fault in faults {
        let seeds = if fault == DiskFault::Kill { 1 } else { seeds };
        for seed in 0..seeds {
            for spared in 0.. {
                let (machine, timeline) =
                    (Rc::<Machine>::default(), Rc::<SimulatedTime>::default());
                let host = Rc::new(ProcessHost::new("script", &machine, &timeline, seed));
                host.armed.borrow_mut().push(ArmedFault { fault, spared, hits: 1 });
                let acknowledged = std::cell::Cell::new(0);
                let entered = simulated::enter(host.clone());
                let run = panic::catch_unwind(AssertUnwindSafe(|| {
                    script(&|| acknowledged.update(|count| count + 1));
                }));
                drop(entered);
                if let Err(panicked) = &run {
                    assert!(panicked.is::<SimulatedCrash>(), "{fault:?} after {spared}");
                }
                let after = ProcessHost::new("after", &machine, &timeline, seed);
                let entered = simulated::enter(Rc::new(after));
                let checked = panic::catch_unwind(AssertUnwindSafe(|| check(acknowledged.get())));
                drop(entered);
                if let Err(panicked) = checked {
                    eprintln!("{fault:?} after {spared} operations, seed {seed}");
                    panic::resume_unwind(panicked);
                }
                if run.is_ok() {
                    break;
                }
                points += 1;
            }
        }
    }
    assert!(points > 100, "{points} crash points");
}

#[test]
fn of_files() {
    let path = Path::new("/work/state");
    every_crash_point(
        SEEDS,
        |acknowledge| {
            atomic_dir::create(Path::new("/work")).unwrap();
            for version in 1..=3_u8 {
                atomic_file::write(path, &[version; 2000]).unwrap();
                acknowledge();
            }
        },
        |acknowledged| match disk::read(path) {
            Ok(content) => {
                let version = content[0];
                assert_eq!(content, [version; 2000], "whole");
                assert!(usize::from(version) >= acknowledged, "{version} after {acknowledged}");
            }
            Err(error) => assert_eq!(acknowledged, 0, "{error}"),
        },
    );
}

#[test]
fn of_folders() {
    let path = Path::new("/work/checkpoint");
    every_crash_point(
        SEEDS,
        |acknowledge| {
            for version in 1..=3_u8 {
                let filled = atomic_dir::replace(path, |draft| {
                    atomic_dir::create(&draft.join("deep"))?;
                    for name in ["one", "deep/two"] {
                        atomic_file::write(&draft.join(name), &[version; 700])
                            .map_err(|error| hypercast_core::Error::Internal(error.to_string()))?;
                    }
                    Ok::<(), hypercast_core::Error>(())
                });
                filled.unwrap();
                acknowledge();
            }
        },
        |acknowledged| {
            let current = atomic_dir::current(path);
            if !disk::exists(&current) {
                assert_eq!(acknowledged, 0);
                return;
            }
            let [one, two] =
                ["one", "deep/two"].map(|name| disk::read(&current.join(name)).unwrap());
            assert_eq!(one, two, "of one version");
            assert_eq!(one, [one[0]; 700], "whole");
            assert!(usize::from(one[0]) >= acknowledged);
            atomic_dir::recover(path).unwrap();
            assert_eq!(disk::read(&path.join("one")).unwrap(), one);
        },
    );
}

#[test]
fn of_states() {
    let dir = Path::new("/work/joiner");
    every_crash_point(
        SEEDS,
        |acknowledge| {
            let folder = StateDir::lock(dir).unwrap();
            for version in 1..=3_u64 {
                folder.write(&vec![version; 300], &StreamPlace::at(version).into(), &()).unwrap();
                acknowledge();
            }
        },
        |acknowledged| {
            let folder = StateDir::lock(dir).unwrap();
            let read = folder.read::<Vec<u64>, ()>().unwrap();
            let version = read.map_or(0, |(state, place, ())| {
                assert_eq!(place, Some(StreamPlace::at(state[0]).into()), "of one version");
                state[0]
            });
            assert!(version as usize >= acknowledged, "{version} after {acknowledged}");
        },
    );
}

/// The TAE of a logged request.
const TAE: [f32; 2] = [1.0, 2.0];

/// Logs that go on where they are.
fn log_writer() -> LogWriter {
    let tae = TaeStorage::F32;
    let options = LogOptions { history_len: 4, rows_per_file: 100, file_seconds: 0, tae };
    let versions = vec![LogVersion::new("1.0.0", TAE.len())];
    LogWriter::create(Path::new("/work/logs"), &dataset().schema, options, versions).unwrap()
}

/// Logs a request whose number is its position in the stream.
fn log(writer: &mut LogWriter, request: u64) {
    let schema = &dataset().schema;
    let target = Target {
        item: Arc::new(Item { id: 1, ids: vec![0], ..Item::default() }),
        ids: vec![1; schema.id_columns().len()],
        features: vec![0.5; schema.feature_columns().len()],
        outcome: Outcome { actions: 1, known: 3, ..Outcome::UNKNOWN },
        truth: Vec::new(),
    };
    let user = Arc::<User>::default();
    let (surface, time_ms, history) = (0, request as i64, Vec::new());
    let example = Example { request, user, surface, time_ms, history, targets: vec![target] };
    let row = LogRow {
        example: &example,
        taes: &[&TAE],
        predictions: &[],
        ranked: &[],
        correction: false,
        ingested_ms: 1,
        place: Some(LoggedPlace { position: request, checksum: None }),
    };
    writer.write(row).unwrap();
}

#[test]
fn of_logs() {
    every_crash_point(
        4,
        |acknowledge| {
            let mut writer = log_writer();
            for request in 1..=3 {
                log(&mut writer, request);
                writer.cut().unwrap();
                acknowledge();
            }
        },
        |acknowledged| {
            let mut writer = log_writer();
            let position = writer.place().map_or(0, |place| place.position);
            assert!(position >= acknowledged as u64, "{position} after {acknowledged}");
            log(&mut writer, position + 1);
            writer.cut().unwrap();
            let dir = Path::new("/work/logs");
            let mut rows = LogFollower::open(dir, "1.0.0", LogPosition::default()).unwrap();
            for request in 1..=position + 1 {
                let row = rows.next_request().unwrap().expect("a row a position");
                assert_eq!((row.example.request, row.tae), (request, TAE.to_vec()));
            }
            assert!(rows.next_request().unwrap().is_none(), "each is there once");
        },
    );
}

/// Runs something on a new host of a machine; false if a fault that waits for it has ended it.
fn run_on(host: ProcessHost, run: impl FnOnce()) -> bool {
    let entered = simulated::enter(Rc::new(host));
    let run = panic::catch_unwind(AssertUnwindSafe(run));
    drop(entered);
    if let Err(panicked) = run {
        if !panicked.is::<SimulatedCrash>() {
            panic::resume_unwind(panicked);
        }
        return false;
    }
    true
}

/// A reader may see a file between its rename and the sync of its folder. If the power fails then,
/// the next writer puts other requests into a file of that number.
#[test]
fn of_writers_of_logs_that_are_followed() {
    const REQUESTS: u64 = 4;
    let dir = Path::new("/work/logs");
    let mut read_before = 0;
    for (names, seed) in [NameOrder::Journal, NameOrder::Any]
        .into_iter()
        .flat_map(|names| (0..4).map(move |seed| (names, seed)))
    {
        for spared in 0.. {
            let (machine, timeline) = (Rc::<Machine>::default(), Rc::<SimulatedTime>::default());
            let host = |name| ProcessHost::new(name, &machine, &timeline, seed);
            let writer = host("writer");
            writer.armed.borrow_mut().push(ArmedFault { fault: DiskFault::Kill, spared, hits: 1 });
            let is_over = run_on(writer, || {
                let mut writer = log_writer();
                for request in 1..REQUESTS {
                    log(&mut writer, request);
                    writer.cut().unwrap();
                }
            });
            let (mut place, mut read) = (LogPosition::default(), Vec::new());
            let mut follow = || {
                let Ok(mut rows) = LogFollower::open(dir, "1.0.0", place) else { return };
                while let Some(row) = rows.next_request().unwrap() {
                    read.push(row.example.request);
                }
                place = rows.position();
                read_before += read.len();
            };
            assert!(run_on(host("trainer"), &mut follow));
            host("power").cut_power(names);
            assert!(run_on(host("next writer"), || {
                let mut writer = log_writer();
                let logged = writer.place().map_or(0, |place| place.position);
                (logged + 1..=REQUESTS).for_each(|request| log(&mut writer, request));
                writer.cut().unwrap();
            }));
            assert!(run_on(host("next trainer"), follow));
            let all: Vec<u64> = (1..=REQUESTS).collect();
            assert_eq!(read, all, "{names:?} after {spared} operations, seed {seed}");
            if is_over {
                break;
            }
        }
    }
    assert!(read_before > 0);
}

/// An engine whose segments end after one group, with room for a few of them.
fn engine() -> DirectoryEngine {
    let limits = DirectoryLimits {
        fsync: true,
        segment_bytes: 2000,
        retain_bytes: 8000,
        remembered_ids: 1000,
    };
    DirectoryEngine::with(Path::new("/work/streams"), limits).unwrap()
}

/// Groups of records of more than half a segment, so that segments begin and old ones go.
const GROUPS: u64 = 8;

/// Records of a group.
const GROUP: u64 = 3;

fn group(number: u64) -> Vec<Record> {
    let record = |at: u64| {
        let id = number * GROUP + at + 1;
        let mut payload = vec![(id % 251) as u8; 600];
        payload[..8].copy_from_slice(&id.to_le_bytes());
        Record { id, payload }
    };
    (0..GROUP).map(record).collect()
}

#[test]
fn of_streams() {
    let topic = Topic::events();
    every_crash_point(
        SEEDS,
        |acknowledge| {
            for number in 0..GROUPS {
                // Two writers, one after the other, so that a stream is also opened again.
                let engine = engine();
                engine.appender(&topic).unwrap().append(&group(number)).unwrap();
                if number == 5 {
                    engine.trim(&topic, 13).unwrap();
                }
                acknowledge();
            }
        },
        |acknowledged| {
            let acknowledged = acknowledged as u64 * GROUP;
            let engine = engine();
            // Also a process that reads first finds what was acknowledged.
            let span = engine.span(&topic).unwrap();
            assert!(span.end >= acknowledged, "{span:?} after {acknowledged}");
            let appender = engine.appender(&topic).unwrap();
            let span = engine.span(&topic).unwrap();
            assert!(span.end >= acknowledged, "{span:?} after {acknowledged}");
            assert!(span.start <= acknowledged.saturating_sub(GROUP), "{span:?}");
            let mut reader = engine.reader(&topic, span.start).unwrap();
            let mut position = span.start;
            while position < span.end {
                for record in reader.next(100, Duration::ZERO).unwrap() {
                    let id = u64::from_le_bytes(record.payload[..8].try_into().unwrap());
                    assert_eq!((record.position, id), (position, position + 1));
                    position += 1;
                }
            }
            // What was acknowledged is known, and work goes on.
            if let Some(last) = acknowledged.checked_sub(GROUP) {
                let again = appender.append(&group(last / GROUP)).unwrap();
                assert_eq!(again.repeated as u64, GROUP, "after {acknowledged}");
            }
            let end = appender.append(&group(GROUPS)).unwrap().end;
            assert_eq!(end, span.end + GROUP);
        },
    );
}

#[test]
fn of_dictionaries_of_ids() {
    let dir = Path::new("/work/ids");
    let ids = |round: usize| ["user", "item"].map(|of| format!("{of}-{round}"));
    let ids = |round| ids(round).map(|text| TextId::new(&text).unwrap());
    let open = || IdDictionary::open(dir, 100).unwrap();
    every_crash_point(
        SEEDS,
        |acknowledge| {
            let dictionary = open();
            for round in 0..4 {
                dictionary.insert(ids(round).iter()).unwrap();
                dictionary.sync().unwrap();
                acknowledge();
            }
        },
        |acknowledged| {
            let dictionary = open();
            let mut known = BTreeMap::new();
            let whole = |id: TextId| {
                assert_eq!(id.key(), id_key(id.text()), "nothing half written is there");
                known.insert(id.key().key, id.text().to_owned());
                Ok(())
            };
            dictionary.for_each(whole).unwrap();
            for id in (0..acknowledged).flat_map(ids) {
                assert_eq!(known.get(&id.key().key).map(String::as_str), Some(id.text()));
            }
            // What was lost is stored when it is seen again, behind what was there.
            (0..4).for_each(|round| _ = dictionary.insert(ids(round).iter()).unwrap());
            drop(dictionary);
            assert_eq!(open().len(), 8);
        },
    );
}

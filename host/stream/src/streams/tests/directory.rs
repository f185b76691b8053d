//! The directory engine: the common promises, and those about files and processes.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use hypercast_core::error::ErrorKind;
use hypercast_core::prerequisite::skip;

use super::super::directory::DirectoryLimits;
use super::super::*;
use super::suite::{self, LONG, all, gap, numbered, record, texts, topic};

/// Segments are so small that every second append begins one.
const LIMITS: DirectoryLimits = DirectoryLimits {
    fsync: true,
    segment_bytes: 200,
    retain_bytes: 0,
    remembered_ids: suite::REMEMBERED,
};

/// Large enough for all records of a test.
const ONE_SEGMENT: DirectoryLimits = DirectoryLimits { segment_bytes: 1 << 30, ..LIMITS };

fn open(dir: &Path, limits: DirectoryLimits) -> DirectoryEngine {
    DirectoryEngine::with(dir, limits).unwrap()
}

fn segments(dir: &Path, topic: &Topic) -> Vec<PathBuf> {
    let files = fs::read_dir(dir.join(topic.name())).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|ext| ext == "records")).collect();
    segments.sort();
    segments
}

#[test]
fn a_directory_keeps_every_promise() {
    let dir = tempfile::tempdir().unwrap();
    suite::every_promise(&open(dir.path(), LIMITS));
    let dir = tempfile::tempdir().unwrap();
    suite::every_promise(&open(dir.path(), DirectoryLimits { fsync: false, ..LIMITS }));
}

#[test]
fn opened_again_it_continues() {
    let dir = tempfile::tempdir().unwrap();
    suite::opened_again_it_continues(&|| Arc::new(open(dir.path(), LIMITS)));
}

#[test]
fn only_so_many_ids_are_remembered_also_when_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("ids");
    let limits = DirectoryLimits { remembered_ids: 30, ..LIMITS };
    for first in (1..101).step_by(10) {
        let engine = open(dir.path(), limits);
        engine.appender(&topic).unwrap().append(&numbered(first..first + 10)).unwrap();
    }
    let engine = open(dir.path(), limits);
    let appender = engine.appender(&topic).unwrap();
    assert_eq!(appender.append(&numbered(71..101)).unwrap().repeated, 30);
    assert_eq!(appender.append(&numbered(70..71)).unwrap(), Appended { end: 101, repeated: 0 });
}

#[test]
fn a_tail_torn_at_any_byte_is_cut() {
    let topic = topic("torn");
    let whole = tempfile::tempdir().unwrap();
    let engine = open(whole.path(), ONE_SEGMENT);
    let appender = engine.appender(&topic).unwrap();
    appender.append(&numbered(1..4)).unwrap();
    let segment = &segments(whole.path(), &topic)[0];
    let end = whole.path().join(topic.name()).join("end");
    let (sound, believed) = (fs::read(segment).unwrap().len(), fs::read(&end).unwrap());
    appender.append(&[record(4, "the last one")]).unwrap();
    let bytes = fs::read(segment).unwrap();
    for length in sound..bytes.len() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(topic.name());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(segment.file_name().unwrap()), &bytes[..length]).unwrap();
        fs::write(folder.join("end"), &believed).unwrap();
        let engine = open(dir.path(), ONE_SEGMENT);
        let mut reader = engine.reader(&topic, 0).unwrap();
        assert_eq!(reader.next(10, LONG).unwrap().len(), 3);
        assert!(reader.next(10, Duration::ZERO).unwrap().is_empty(), "it is not stored yet");
        let appender = engine.appender(&topic).unwrap();
        assert_eq!(fs::read(folder.join(segment.file_name().unwrap())).unwrap().len(), sound);
        let appended = appender.append(&[record(4, "again")]).unwrap();
        assert_eq!(appended, Appended { end: 4, repeated: 0 }, "cut at {length}");
        assert_eq!(reader.next(10, LONG).unwrap()[0].payload, b"again");
    }
}

#[test]
fn an_acknowledged_record_that_is_cut_off_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("cut");
    open(dir.path(), ONE_SEGMENT).appender(&topic).unwrap().append(&numbered(1..4)).unwrap();
    let segment = &segments(dir.path(), &topic)[0];
    let length = fs::metadata(segment).unwrap().len();
    OpenOptions::new().write(true).open(segment).unwrap().set_len(length - 1).unwrap();
    let engine = open(dir.path(), ONE_SEGMENT);
    let at = length - length / 3;
    for error in [
        engine.appender(&topic).map(|_| ()).unwrap_err(),
        engine.reader(&topic, 2).unwrap().next(1, LONG).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains(segment.to_str().unwrap()), "{error}");
        assert!(error.contains(&format!("at byte {at} ")), "{error}");
    }
    // Without syncs, a power cut may do this.
    let engine = open(dir.path(), DirectoryLimits { fsync: false, ..ONE_SEGMENT });
    assert_eq!(engine.appender(&topic).unwrap().append(&[]).unwrap().end, 2);
}

#[test]
fn a_flipped_bit_is_an_error_that_names_file_and_byte() {
    let topic = topic("flip");
    let record_bytes = 21;
    // A byte of each of the header's four fields and of the payload; `back` of a first record
    // included.
    for byte in [0, 4, 8, 16, 20] {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path(), ONE_SEGMENT);
        let appender = engine.appender(&topic).unwrap();
        for id in 1..=5 {
            appender.append(&numbered(id..id + 1)).unwrap();
        }
        drop(appender);
        let segment = &segments(dir.path(), &topic)[0];
        let file = OpenOptions::new().read(true).write(true).open(segment).unwrap();
        let (at, mut bit) = (2 * record_bytes, [0]);
        file.read_exact_at(&mut bit, at + byte).unwrap();
        file.write_all_at(&[bit[0] ^ 1], at + byte).unwrap();
        let mut reader = engine.reader(&topic, 0).unwrap();
        assert_eq!(reader.next(10, LONG).unwrap().len(), 2, "the sound records before it");
        let read = reader.next(10, LONG).unwrap_err();
        // Also without the commit mark, because a later write follows.
        fs::remove_file(segment.with_file_name("end")).unwrap();
        let opened = engine.appender(&topic).map(|_| ()).unwrap_err();
        for error in [read.to_string(), opened.to_string()] {
            assert!(error.contains(segment.to_str().unwrap()), "{error}");
            assert!(error.contains(&format!("at byte {at} ")), "{error}");
        }
    }
}

#[test]
fn a_second_writer_is_refused_by_the_firsts_process_id() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("owned");
    let (first, second) = (open(dir.path(), LIMITS), open(dir.path(), LIMITS));
    let appender = first.appender(&topic).unwrap();
    assert!(first.appender(&topic).is_ok(), "the same engine returns it again");
    let refused = second.appender(&topic).map(|_| ()).unwrap_err();
    // What writes for a moment can try again, so it is neither refused nor a failure of the disk.
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    let (refused, folder) = (refused.to_string(), dir.path().join(topic.name()));
    let holder = format!("{}: process {} writes", folder.display(), std::process::id());
    assert!(refused.contains(&holder) && refused.contains("engine.dir"), "{refused}");
    assert!(second.append_at(&topic, 0, &numbered(1..2)).is_err());
    drop(appender);
    second.appender(&topic).unwrap().append(&numbered(1..2)).unwrap();
}

#[test]
fn engines_append_to_a_stream_in_turns() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("turns");
    thread::scope(|scope| {
        for name in ["left", "right"] {
            let engine = open(dir.path(), LIMITS);
            let topic = &topic;
            scope.spawn(move || {
                let mut won = 0;
                while won < 20 {
                    let end = engine.span(topic).unwrap().end;
                    let appended = engine.append_at(topic, end, &[record(0, name)]).unwrap();
                    won += u64::from(appended.is_some());
                }
            });
        }
    });
    let texts = all(&open(dir.path(), LIMITS), &topic, 0);
    assert_eq!(texts.len(), 40);
    assert_eq!(texts.iter().filter(|text| *text == "left").count(), 20);
}

#[test]
fn segments_follow_each_other_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("retained");
    let engine = open(dir.path(), DirectoryLimits { retain_bytes: 1000, ..LIMITS });
    let appender = engine.appender(&topic).unwrap();
    for first in (1000..2000).step_by(10) {
        appender.append(&numbered(first..first + 10)).unwrap();
    }
    let bytes: u64 =
        segments(dir.path(), &topic).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!((500..=1000).contains(&bytes), "{bytes}");
    let span = engine.span(&topic).unwrap();
    assert!(span.end == 1000 && span.start > 900, "{span:?}");
    assert_eq!(all(&engine, &topic, span.start), texts(1000 + span.start..2000));
    let error = engine.reader(&topic, 0).unwrap().next(1, LONG).unwrap_err();
    assert_eq!(gap(error).cause, GapCause::Deleted { first: span.start });
}

#[test]
fn a_deletion_that_is_cut_off_leaves_no_hole() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("cut-off");
    for first in (1000..1200).step_by(10) {
        let engine = open(dir.path(), LIMITS);
        engine.appender(&topic).unwrap().append(&numbered(first..first + 10)).unwrap();
    }
    let before = segments(dir.path(), &topic);
    // What cannot be deleted stands for a crash at that moment.
    fs::remove_file(&before[0]).unwrap();
    fs::create_dir(&before[0]).unwrap();
    let few = DirectoryLimits { retain_bytes: 1000, remembered_ids: 5, ..LIMITS };
    let appender = open(dir.path(), few).appender(&topic).unwrap();
    let failed =
        (1200..1300).step_by(10).find_map(|id| appender.append(&numbered(id..id + 10)).err());
    assert!(failed.is_some() && before.len() > 5);
    assert!(before.iter().all(|path| path.exists()), "{:?}", segments(dir.path(), &topic));
}

#[test]
fn a_folder_put_back_from_a_backup_is_told_to_readers_that_are_open() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("backup");
    let folder = dir.path().join(topic.name());
    let append = |ids| {
        // A process of its own, which releases the stream.
        let engine = open(dir.path(), LIMITS);
        engine.appender(&topic).unwrap().append(&numbered(ids)).unwrap();
    };
    append(1..11);
    let backup: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    append(11..21);
    let engine = open(dir.path(), LIMITS);
    let mut reader = engine.reader(&topic, 0).unwrap();
    let read = reader.next(100, LONG).unwrap();
    let place = StreamPlace::after(read.last().unwrap());
    assert!(reader.next(1, Duration::ZERO).unwrap().is_empty() && place.position == 20);
    fs::remove_dir_all(&folder).unwrap();
    let error = reader.next(1, LONG).unwrap_err();
    assert_eq!(gap(error).cause, GapCause::Cut { end: 0 });
    fs::create_dir(&folder).unwrap();
    backup.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    let error = reader.next(1, LONG).unwrap_err();
    assert_eq!(gap(error).cause, GapCause::Cut { end: 10 });
    append(100..125);
    let error = engine.resume(&topic, place).unwrap().next(1, LONG).unwrap_err();
    assert_eq!(gap(error).cause, GapCause::Changed { first: 0 });
}

#[test]
fn an_end_that_lags_behind_the_records_is_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    let topic = topic("lag");
    let engine = open(dir.path(), LIMITS);
    engine.appender(&topic).unwrap().append(&numbered(1..6)).unwrap();
    let end = dir.path().join(topic.name()).join("end");
    let earlier = fs::read(&end).unwrap();
    engine.appender(&topic).unwrap().append(&numbered(6..11)).unwrap();
    // As after a power cut, because the file is not synced.
    fs::write(&end, earlier).unwrap();
    let mut reader = engine.reader(&topic, 10).unwrap();
    assert!(reader.next(1, Duration::ZERO).unwrap().is_empty());
    engine.appender(&topic).unwrap().append(&numbered(11..12)).unwrap();
    assert_eq!(reader.next(1, LONG).unwrap()[0].payload, b"11");
}

/// A small file system that is unmounted at the end.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
            .arg(dir.path())
            .output();
        match mount {
            Ok(output) if output.status.success() => Some(Small(dir)),
            failed => {
                skip("full disk", &format!("only root can mount a small tmpfs: {failed:?}"));
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || thread::panicking());
    }
}

#[test]
fn a_full_disk_fails_the_append_and_takes_it_back() {
    let Some(small) = Small::mount() else { return };
    let topic = topic("full");
    let filler = small.0.path().join("filler");
    let engine = open(&small.0.path().join("streams"), ONE_SEGMENT);
    let appender = engine.appender(&topic).unwrap();
    appender.append(&numbered(1..11)).unwrap();
    fs::write(&filler, vec![0; 180 << 10]).unwrap();
    let large = |id| Record { id, payload: vec![b'x'; 30 << 10] };
    let group = [large(11), large(12), large(13), large(14)];
    for _ in 0..3 {
        let full = appender.append(&group).unwrap_err();
        let Error::Core(hypercast_core::Error::Io { source, .. }) = &full else { panic!("{full}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(engine.span(&topic).unwrap(), 0..10);
    }
    let small_ones = appender.append(&numbered(15..16)).unwrap();
    assert_eq!(small_ones, Appended { end: 11, repeated: 0 }, "there is room for a smaller record");
    fs::remove_file(&filler).unwrap();
    assert_eq!(appender.append(&group).unwrap(), Appended { end: 15, repeated: 0 });
    drop(appender);
    let appender = engine.appender(&topic).unwrap();
    assert_eq!(appender.append(&group).unwrap(), Appended { end: 15, repeated: 4 });
    assert_eq!(all(&engine, &topic, 0)[..11], [texts(1..11), texts(15..16)].concat());
}

/// In the child's environment: the directory of its stream.
const CHILD: &str = "HYPERCAST_ENGINE_CHILD";

/// Appends without end, and prints up to where its records are durable.
fn append_until_killed(dir: &Path) {
    let engine = open(dir, DirectoryLimits { segment_bytes: 20_000, ..LIMITS });
    let topic = topic("killed");
    let appender = engine.appender(&topic).unwrap();
    let end = engine.span(&topic).unwrap().end;
    thread::scope(|scope| {
        for of in 1..=3_u64 {
            let (appender, engine, topic) = (&appender, &engine, &topic);
            scope.spawn(move || {
                // Repeats some of the last ids that are stored.
                let last = all(engine, topic, 0)
                    .iter()
                    .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
                    .filter(|id| id >> 32 == of)
                    .count() as u64;
                let mut next = last.saturating_sub(50);
                loop {
                    let ids = next..next + 1 + next % 7;
                    let filled = |id| {
                        record(
                            of << 32 | id,
                            format!("{} {}", of << 32 | id, "x".repeat(id as usize * 37 % 500)),
                        )
                    };
                    appender.append(&ids.clone().map(filled).collect::<Vec<_>>()).unwrap();
                    println!("kept {of} {}", ids.end);
                    next = ids.end;
                }
            });
        }
    });
    panic!("appended from {end} on without being killed");
}

#[test]
fn a_writer_that_is_killed_loses_and_doubles_nothing() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return append_until_killed(Path::new(&dir));
    }
    let rounds = std::env::var("HYPERCAST_ENGINE_CRASH_ROUNDS").map_or(5, |rounds| {
        rounds.parse().expect("HYPERCAST_ENGINE_CRASH_ROUNDS must be a number")
    });
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), LIMITS);
    let topic = topic("killed");
    let mut reader = engine.reader(&topic, 0).unwrap();
    let mut next = [0_u64; 4];
    let mut kept = [0_u64; 4];
    for round in 0..rounds {
        let this = std::env::current_exe().unwrap();
        let (_, module) = module_path!().split_once("::").unwrap();
        let name = format!("{module}::a_writer_that_is_killed_loses_and_doubles_nothing");
        let mut child = Command::new(this)
            .args([&name, "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_millis(150 + 37 * (round % 10));
        let mut printed = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            if let Some(words) = line.unwrap().strip_prefix("kept ") {
                let (of, end) = words.split_once(' ').unwrap();
                let of: usize = of.parse().unwrap();
                kept[of] = kept[of].max(end.parse().unwrap());
                printed += 1;
            }
            if Instant::now() >= until && printed > 20 {
                child.kill().unwrap();
            }
        }
        assert!(!child.wait().unwrap().success());
        // The reader sees each thread's records once and in order, through every crash.
        let end = engine.span(&topic).unwrap().end;
        while reader.position() < end {
            for stored in reader.next(1000, LONG).unwrap() {
                let text = String::from_utf8(stored.payload).unwrap();
                let id: u64 = text.split(' ').next().unwrap().parse().unwrap();
                let of = (id >> 32) as usize;
                assert_eq!(id & 0xffff_ffff, next[of], "of thread {of} in round {round}");
                next[of] += 1;
            }
        }
        // Records that were written but not yet printed may be there, too.
        assert!((1..4).all(|of| next[of] >= kept[of]), "{next:?} are there, {kept:?} were kept");
    }
}

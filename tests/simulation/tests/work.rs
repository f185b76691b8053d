//! What work does not depend on.

use std::{path::Path, rc::Rc};

use hypercast_core::simulated;
use hypercast_simulation::host::{Machine, ProcessHost, SimulatedTime};
use hypercast_stream::streams::{DirectoryEngine, DirectoryLimits, Record, StreamEngine, Topic};

const LIMITS: DirectoryLimits =
    DirectoryLimits { fsync: true, segment_bytes: 2000, retain_bytes: 0, remembered_ids: 1000 };

/// The bytes that a new process reads of a stream of so many records without ids to append one, and
/// those to append one with an id.
fn read_to_append(records: u64) -> [u64; 2] {
    let (machine, timeline) = (Rc::<Machine>::default(), Rc::<SimulatedTime>::default());
    let appends = |name: &str, ids: &mut dyn Iterator<Item = u64>| {
        let host = Rc::new(ProcessHost::new(name, &machine, &timeline, 1));
        let entered = simulated::enter(host.clone());
        let engine = DirectoryEngine::with(Path::new("/streams"), LIMITS).unwrap();
        let appender = engine.appender(&Topic::joined()).unwrap();
        for id in ids {
            appender.append(&[Record { id, payload: vec![7; 100] }]).unwrap();
        }
        drop((appender, engine, entered));
        host.work.get().read_bytes
    };
    appends("first", &mut (0..records).map(|_| 0));
    [appends("next", &mut [0].into_iter()), appends("last", &mut [1].into_iter())]
}

#[test]
fn a_writer_reads_a_stream_for_ids_only_if_its_records_have_some() {
    let [short, long] = [100, 1000].map(read_to_append);
    assert!(long[0] <= LIMITS.segment_bytes + 200 && short[0] > 0, "{long:?}");
    assert!(long[1] > 5 * short[1], "{short:?} {long:?}");
}

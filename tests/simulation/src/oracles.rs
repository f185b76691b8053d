//! What must hold once all is at rest: acknowledged events are in one example each, labels are
//! those of a join without crashes, features follow the outcomes, and work was in proportion.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Debug,
    time::Duration,
};

use hypercast_data::features::{CandidateInput, FeatureState, RequestInput};
use hypercast_fm::example::Outcome;
use hypercast_stream::{
    dead_letters::{self, DeadLetter},
    events::{EventKind, EventRecord},
    join::{
        JoinedExample, JoinedRecord, Joiner, JoinerOutput, OutcomeRecord, StateUpdate, join_record,
    },
    streams::{StreamCursor, StreamPlace, StreamRead, StreamRecord, Topic},
};

use crate::{
    expert_trainer,
    installation::{config, dataset, engine},
    logging_tier,
    plan::Role,
    publications, trainer, versions, work,
    workload::{part_ids, request_id},
    world::Simulation,
};

/// An impression, as callers know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Shown {
    request: u64,
    item: u64,
}

/// What the streams tell of an impression.
#[derive(Debug, Default)]
struct Told {
    examples: usize,
    /// The actions in its example.
    label: u64,
    /// Those in its example and in corrections.
    corrected: u64,
}

/// The records of the streams.
struct Streams {
    events: Vec<StreamRecord>,
    /// Also those that the server lost inside.
    joined: Vec<StreamRecord>,
    /// Those that it lost at the end and that did not come again.
    cut: Vec<StreamRecord>,
    outcomes: Vec<StreamRecord>,
    versions: Vec<StreamRecord>,
    /// Of all readers.
    letters: Vec<DeadLetter>,
    /// The first position at which an event was lost at any time; else the end. What was made of
    /// events before is as if none had been lost.
    intact: u64,
}

impl Streams {
    /// The position after the last event.
    fn events_end(&self) -> u64 {
        self.events.last().map_or(0, |last| last.position + 1)
    }
}

/// Holds a run against every promise.
pub fn check(world: &Simulation) {
    // What was read of a broken stream says nothing more.
    let streams = match read(world) {
        Ok(streams) => streams,
        Err(error) => return world.violate("streams", error),
    };
    at_rest(world, &streams);
    offline_join(world, &streams);
    let told = told(world, &streams);
    examples(world, &streams, &told);
    labels(world, &streams, &told);
    features(world, &streams);
    set_aside(world, &streams);
    versions::check(world, &streams.versions);
    publications::check(world);
    work::check(world, (streams.events.len() + streams.outcomes.len()) as u64);
    trainer::check(world, &streams.joined, &streams.letters);
    logging_tier::check(world, &streams.joined);
    expert_trainer::check(world);
}

fn read(world: &Simulation) -> Result<Streams, String> {
    let may_lack = |topic: &Topic| {
        let ledger = world.ledger.borrow();
        let is_joined = *topic == Topic::joined();
        !ledger.lost(topic).is_empty() || (is_joined && !ledger.lost_joined.is_empty())
    };
    // The second joiner runs no more, and its machine is the others' or has a way to the server.
    let read = |topic: Topic| {
        world.observe(&world.processes[2].machine, || {
            let engine = engine(&world.plan, 2, None)?;
            let told = |error: hypercast_stream::Error| format!("{topic}: {error}");
            let end = engine.span(&topic).map_err(told)?.end;
            let place = StreamPlace::at(0);
            let mut cursor = StreamCursor::open(&*engine, &topic, place).map_err(told)?;
            let mut records = Vec::new();
            while cursor.place().position < end {
                let most = end as usize;
                match cursor.next(&*engine, most, Duration::ZERO).map_err(told)? {
                    StreamRead::Records(read) if read.is_empty() => {
                        return Err(format!("{topic} ends at {end}, but has {}", records.len()));
                    }
                    StreamRead::Records(read) => records.extend(read),
                    StreamRead::Gap(_) if may_lack(&topic) => {}
                    StreamRead::Gap(gap) => return Err(gap.to_string()),
                }
            }
            Ok::<_, String>(records)
        })
    };
    let letters = world.observe(&world.processes[2].machine, || {
        let engine = engine(&world.plan, 2, None)?;
        dead_letters::list(&*engine).map_err(|error| error.to_string())
    });
    let mut joined = read(Topic::joined())?;
    joined.extend(world.ledger.borrow().lost_joined.iter().cloned());
    joined.sort_by_key(|record| record.position);
    let mut cut = world.ledger.borrow().cut_joined.clone();
    cut.retain({
        let again: HashSet<&[u8]> = joined.iter().map(|record| &*record.payload).collect();
        move |record| !again.contains(&*record.payload)
    });
    Ok(Streams {
        events: read(Topic::events())?,
        joined,
        cut,
        outcomes: read(Topic::outcomes())?,
        versions: read(Topic::versions())?,
        letters: letters?.letters.into_iter().map(|letter| letter.letter).collect(),
        intact: world.ledger.borrow().intact(&Topic::events()),
    })
}

fn at_rest(world: &Simulation, streams: &Streams) {
    let acknowledged = &world.ledger.borrow().acknowledged.clone();
    let missing = acknowledged.iter().filter(|&&told| !told).count();
    if missing > 0 {
        world.violate("at rest", format!("{missing} calls were never acknowledged"));
    }
    for process in &world.processes {
        let life = process.life.borrow();
        let (end, role) = (streams.events_end(), process.role);
        match life.as_ref().and_then(|life| life.joined()) {
            Some(joined) if joined != end => {
                world.violate("at rest", format!("{role:?} joined {joined} of {end} events"));
            }
            _ => {}
        }
    }
}

/// The outputs are record by record what a joiner makes of the events that never stopped. If the
/// server lost events or outputs, this is so up to the first of them: what came after may be gone
/// from there.
fn offline_join<'a>(world: &Simulation, streams: &'a Streams) {
    let settings = config(&world.plan).joiner().expect("as the processes had it");
    let bare = dataset().without_content();
    let state = world.observe(&world.processes[0].machine, || {
        FeatureState::rebuild(&bare, settings.features, None).expect("the data set is whole")
    });
    let mut joiner = Joiner::new(state, settings.options.clone());
    let mut made = JoinerOutput::default();
    let intact = streams.events.iter().take_while(|record| record.position < streams.intact);
    let upgraded = world.ledger.borrow().upgraded.clone();
    for record in intact {
        if upgraded.contains(&record.position) {
            joiner.set_options(settings.options.clone());
        }
        if let Err(error) = join_record(&mut joiner, record, &mut made)
            && !is_of_later_version(record)
        {
            world.violate("streams", format!("event {}: {error}", record.position));
        }
    }
    let rest_follows = streams.intact < u64::MAX;
    let up_to = |stored: &'a [StreamRecord], made: usize| match rest_follows {
        true => &stored[..stored.len().min(made)],
        false => stored,
    };
    let first_cut = world.ledger.borrow().cut_joined.iter().map(|record| record.position).min();
    let (stored, made_joined) = (up_to(&streams.joined, made.joined.len()), &made.joined);
    match first_cut.map(|first| stored.partition_point(|record| record.position < first)) {
        Some(intact) => {
            let intact = intact.min(made_joined.len());
            compare(world, "joined", &stored[..intact], &made_joined[..intact]);
        }
        None => compare(world, "joined", stored, made_joined),
    }
    let departed = first_cut.is_some() && world.ledger.borrow().event_gaps_told > 0;
    if departed {
        // It made other records than were cut off, and outcomes again with them.
        return;
    }
    let intact = world.ledger.borrow().intact(&Topic::outcomes()) as usize;
    let stored = up_to(&streams.outcomes, made.outcomes.len());
    let made = &made.outcomes[..made.outcomes.len().min(intact)];
    compare(world, "outcomes", &stored[..stored.len().min(intact)], made);
}

/// Whether a fault appended it.
fn is_of_later_version(record: &StreamRecord) -> bool {
    record.payload[0] != 1
}

/// What the joiner cannot use is set aside once, and nothing else is.
fn set_aside(world: &Simulation, streams: &Streams) {
    let unusable = streams.events.iter().filter(|record| is_of_later_version(record));
    let is_intact = |&position: &u64| position < streams.intact;
    let expected: Vec<u64> = unusable.map(|record| record.position).filter(is_intact).collect();
    let joiners = streams.letters.iter().filter(|letter| letter.source == "events");
    let found = joiners.map(|letter| letter.position);
    let mut found: Vec<u64> = found.filter(is_intact).collect();
    found.sort_unstable();
    if found != expected {
        world.violate("set aside", format!("events {found:?} were, and {expected:?} should be"));
    }
}

fn compare<T: serde::Serialize + Debug>(
    world: &Simulation,
    stream: &str,
    stored: &[StreamRecord],
    made: &[T],
) {
    let encoded = |made: &T| postcard::to_allocvec(made).expect("plain data");
    let differs =
        stored.iter().zip(made).position(|(stored, made)| stored.payload != encoded(made));
    let (stored, made) = (stored.len(), made.len());
    match differs {
        Some(at) => world.violate("offline join", format!("{stream} {at} is another record")),
        None if stored != made => {
            world.violate("offline join", format!("{stream} has {stored} records, not {made}"));
        }
        None => {}
    }
}

fn told(world: &Simulation, streams: &Streams) -> HashMap<Shown, Told> {
    let requests: HashMap<u64, u64> = world
        .plan
        .requests
        .iter()
        .flat_map(|&number| part_ids(number).map(move |part| (part, request_id(number))))
        .collect();
    let mut told: HashMap<Shown, Told> = HashMap::new();
    for record in streams.joined.iter().chain(&streams.cut) {
        let joined = match JoinedRecord::decode(&record.payload) {
            Ok(joined) => joined,
            Err(error) => {
                world.violate("streams", format!("joined {}: {error}", record.position));
                continue;
            }
        };
        let Some(JoinedExample { example, .. }) = joined.joined() else { continue };
        let Some(&request) = requests.get(&example.request) else {
            let request = example.request;
            world.violate("examples", format!("there was no request {request}"));
            continue;
        };
        for target in &example.targets {
            let of = told.entry(Shown { request, item: target.item.id }).or_default();
            of.corrected |= target.outcome.actions;
            if let JoinedRecord::Example(_) = &joined {
                of.examples += 1;
                of.label |= target.outcome.actions;
            }
        }
    }
    told
}

/// Each impression is in one example, and one that was acknowledged surely is, unless the server
/// lost it. A joiner that told a gap may have made examples twice, but none may be missing.
fn examples(world: &Simulation, streams: &Streams, told: &HashMap<Shown, Told>) {
    let ledger = world.ledger.borrow();
    let (acknowledged, may_repeat) = (ledger.acknowledged.clone(), ledger.gaps_told > 0);
    let mut lost = all_shown(ledger.lost(&Topic::events()));
    lost.retain({
        let stored = all_shown(&streams.events);
        move |shown| !stored.contains(shown)
    });
    drop(ledger);
    for (call, acknowledged) in world.calls.iter().zip(acknowledged) {
        for event in &call.events {
            for shown in shown_in(&event.kind) {
                let examples = told.get(&shown).map_or(0, |told| told.examples);
                let is_missing = examples == 0 && acknowledged && !lost.contains(&shown);
                if is_missing || (examples > 1 && !may_repeat) {
                    world.violate("examples", format!("{shown:?} is in {examples} examples"));
                }
            }
        }
    }
}

/// The impressions of events.
fn all_shown(events: &[StreamRecord]) -> HashSet<Shown> {
    let decoded = events.iter().filter_map(|record| EventRecord::decode(&record.payload).ok());
    decoded.flat_map(|event| shown_in(&event.kind)).collect()
}

fn shown_in(kind: &EventKind) -> Vec<Shown> {
    match kind {
        EventKind::Impression(shown) => vec![Shown { request: shown.request, item: shown.item }],
        EventKind::CompleteRequest(rows) => {
            rows.iter().map(|row| Shown { request: row.request, item: row.item }).collect()
        }
        _ => Vec::new(),
    }
}

/// The actions that an impression waits for, by its surface: others come as corrections.
const AWAITED: [u64; 2] = [0b11, 0b01];

/// What an action must meet to be in the label.
struct OpenWindow {
    shown_ms: i64,
    awaited: u64,
}

/// When an event shows time to have come, by the slowest clock that it passed; computed here once
/// more, because the offline join would share a fault of the joiner's.
fn reached_ms(event: &EventRecord, stored_ms: Option<i64>) -> i64 {
    let stored_ms = stored_ms.unwrap_or(event.ingested_ms);
    let arrived_ms = event.ingested_ms.min(stored_ms);
    event.time_ms().map_or(i64::MIN, |time_ms| time_ms.min(arrived_ms))
}

/// Every action is in the label, or in a correction of it; in the label if it came before any clock
/// could have closed the shortest window.
fn labels(world: &Simulation, streams: &Streams, told: &HashMap<Shown, Told>) {
    let lost = all_shown(world.ledger.borrow().lost(&Topic::events()));
    let shortest_ms = world.plan.settings.min_window_s as i64 * 1000;
    let mut clock_ms = i64::MIN;
    let mut open: BTreeMap<Shown, OpenWindow> = BTreeMap::new();
    for record in &streams.events {
        let Ok(event) = EventRecord::decode(&record.payload) else { continue };
        if let EventKind::Action(action) = &event.kind {
            let shown = Shown { request: action.request, item: action.item };
            let actions = action.outcome.actions;
            // Who read an impression before it was lost may not know it any more.
            let of = told.get(&shown).filter(|_| !lost.contains(&shown));
            if of.is_some_and(|of| of.corrected & actions != actions) {
                world.violate(
                    "labels",
                    format!("{shown:?} lacks an action of event {}", record.position),
                );
            }
            // A lost event may have shown a later time.
            let is_sure = |window: &&OpenWindow| {
                record.position < streams.intact && clock_ms < window.shown_ms + shortest_ms
            };
            let window = open.get(&shown).filter(is_sure);
            let awaited = window.map_or(0, |window| window.awaited & actions);
            if of.is_some_and(|of| of.label & awaited != awaited) {
                let position = record.position;
                world.violate("labels", format!("{shown:?} was closed before event {position}"));
            }
        }
        if let EventKind::Impression(impression) = &event.kind {
            let latest_ms = event.ingested_ms.max(record.stored_ms.unwrap_or(i64::MIN));
            let [shown] = shown_in(&event.kind)[..] else { continue };
            let shown_ms = impression.time_ms.min(latest_ms);
            let awaited = AWAITED[usize::from(impression.surface)];
            open.entry(shown).or_insert(OpenWindow { shown_ms, awaited });
        }
        clock_ms = clock_ms.max(reached_ms(&event, record.stored_ms));
    }
}

/// The features that requests read are those of the outcomes, unless some of those were lost after
/// they were applied.
fn features(world: &Simulation, streams: &Streams) {
    if !world.ledger.borrow().lost(&Topic::outcomes()).is_empty() {
        return;
    }
    let settings = config(&world.plan).joiner().expect("as the processes had it");
    let mut expected = world.observe(&world.processes[0].machine, || {
        FeatureState::rebuild(dataset(), settings.features, None).expect("the data set is whole")
    });
    for record in &streams.outcomes {
        let Ok(OutcomeRecord { update, .. }) = OutcomeRecord::decode(&record.payload) else {
            world.violate("streams", format!("outcome {} is damaged", record.position));
            continue;
        };
        match update {
            StateUpdate::Outcome(row) => expected.apply(&row),
            StateUpdate::Corrected(row) => drop(expected.correct(&row)),
            StateUpdate::Item(item) => drop(expected.upsert_item(item)),
            StateUpdate::User(user) => drop(expected.upsert_user(user)),
        }
    }
    let life = world.processes[0].life.borrow();
    let Some(follower) = life.as_ref().and_then(|life| life.features()) else {
        return world.violate("at rest", format!("{:?} does not run", Role::Daemon));
    };
    let live = follower.live.state();
    for user in 1..=6 {
        let example = |state: &FeatureState| format!("{:?}", state.fetch(&question(user), 4));
        if example(&live) != example(&expected) {
            world.violate("features", format!("those of user {user} are not of the outcomes"));
        }
    }
}

fn question(user: u64) -> RequestInput {
    let candidate = |item| CandidateInput {
        item,
        features: None,
        context: Default::default(),
        outcome: Outcome::UNKNOWN,
        truth: Vec::new(),
    };
    RequestInput {
        request: 1,
        user,
        user_features: None,
        surface: 0,
        time_ms: crate::host::EPOCH_MS,
        candidates: (1..=9).map(candidate).collect(),
    }
}

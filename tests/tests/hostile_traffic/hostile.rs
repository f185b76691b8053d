//! The hostile users. What they say of what they saw is learned from: values of the corpus that a
//! search found, with extremes of every other field. Beside it they besiege the daemon with
//! requests that are the largest, the longest, repeated or refused.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use hypercast_core::clock::now_ms;
use hypercast_data::dataset::Impression;
use serde_json::{Value, json};

use super::{honest::HonestRequest, system::Door};

/// The number of hostile users.
pub const HOSTILE_USERS: u64 = 10;

/// Their ids, and those of their requests, begin here: no honest id is as high.
pub const FIRST_HOSTILE_ID: u64 = 1 << 40;

/// The values that hurt the FM's trainer most.
const CORPUS: &str = include_str!("../../../host/train/tests/hostile_values.json");

/// The actions of the simulated world, in the order of their bits.
const ACTIONS: [&str; 3] = ["click", "like", "finish"];

/// How often a user takes back what it did to an item.
const CONTRADICTIONS: i64 = 20;

/// The time between two requests of a besieging user.
const SIEGE_PAUSE: Duration = Duration::from_millis(1000);

/// The longest text of a category.
const LONG_TEXT: usize = 200_000;

/// The farthest time that events may have, milliseconds from the epoch.
const MOST_TIME_MS: i64 = 1 << 53;

/// A hostile user with its values of the corpus.
pub struct HostileUser {
    number: u64,
    values: Value,
}

/// What a hostile user says of a request: bodies of `POST /v1/events`, all of which are accepted.
pub struct HostileAnswer {
    pub bodies: Vec<String>,
}

/// Requests by route and status.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct HostileTally(BTreeMap<String, u64>);

/// A request that brings nothing to learn.
struct SiegeRequest {
    route: &'static str,
    body: String,
    /// The statuses of its answer.
    expected: &'static [u16],
}

impl fmt::Display for HostileTally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> =
            self.0.iter().map(|(what, times)| format!("{times} of {what}")).collect();
        f.write_str(&counts.join(", "))
    }
}

impl HostileTally {
    /// Counts one more answer, or several.
    pub fn count(&mut self, route: &str, status: u16, times: u64) {
        *self.0.entry(format!("{status} {route}")).or_default() += times;
    }

    /// The sum of two.
    pub fn and(mut self, other: HostileTally) -> HostileTally {
        other.0.into_iter().for_each(|(what, times)| *self.0.entry(what).or_default() += times);
        self
    }

    /// Those that were refused.
    pub fn refused(&self) -> HostileTally {
        let refused = self.0.iter().filter(|(what, _)| !what.starts_with('2'));
        HostileTally(refused.map(|(what, &times)| (what.clone(), times)).collect())
    }
}

/// The answers of a round. Hostile users see what honest ones see, one request in `every`, in turn.
pub fn answers(
    users: &[HostileUser],
    every: usize,
    round: usize,
    requests: &[HonestRequest],
) -> Vec<HostileAnswer> {
    let numbered = requests.iter().zip(round * requests.len()..);
    let seen = numbered.filter(|(_, number)| number.is_multiple_of(every));
    seen.map(|(request, number)| {
        let turn = number / every;
        users[turn % users.len()].answer(turn, request)
    })
    .collect()
}

impl HostileUser {
    /// User `number`, from 0 on.
    pub fn new(number: u64) -> HostileUser {
        let corpus: Vec<Value> = serde_json::from_str(CORPUS).expect("a list of values");
        HostileUser { number, values: corpus[number as usize % corpus.len()].clone() }
    }

    fn id(&self) -> u64 {
        FIRST_HOSTILE_ID + self.number
    }

    /// What the user says of what an honest user saw, with other extremes each turn, and in some
    /// none: a lie among plain values is the hardest to tell.
    fn answer(&self, turn: usize, seen: &[Impression]) -> HostileAnswer {
        let now_ms = now_ms();
        let is_plain = turn % 3 == 1;
        let times_ms =
            [now_ms, now_ms + 290_000, now_ms - 30 * 86_400_000, 0, -MOST_TIME_MS, now_ms];
        let time_ms = |at: usize| if is_plain { now_ms } else { times_ms[at % times_ms.len()] };
        let [shown_ms, acted_ms] = [turn, turn / 2].map(time_ms);
        let (request, user) = (FIRST_HOSTILE_ID + 1 + turn as u64, self.id());
        let device = match turn % 5 {
            _ if is_plain => json!(seen[0].context.ids[0]),
            4 => json!("x".repeat(LONG_TEXT)),
            _ => self.values["device"].clone(),
        };
        let battery = match is_plain {
            true => json!(seen[0].context.dense[0]),
            false => self.values["battery"].clone(),
        };
        let context = json!({ "device": device, "battery": battery });
        let surface = ["feed", "search"][usize::from(seen[0].surface)];
        let (mut impressions, mut actions, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for (at, row) in seen.iter().enumerate() {
            // Now and then an item that nobody knows.
            let item = if at == 0 && turn % 4 == 3 { u64::MAX - self.number } else { row.item };
            let (did, values) = (self.actions(row.outcome.actions), self.watched());
            let mut shown = json!({
                "request": request, "user": user, "item": item, "surface": surface,
                "time_ms": shown_ms, "context": context,
            });
            impressions.push(shown.clone());
            actions.push(json!({
                "request": request, "user": user, "item": item, "time_ms": acted_ms,
                "actions": did, "values": values, "complete": true,
            }));
            shown["outcome_ms"] = json!(acted_ms);
            (shown["actions"], shown["values"]) = (did, values);
            events.push(shown);
        }
        let user = json!({ "id": user, "features": { "age_group": self.values["age_group"] } });
        let first = match turn % 3 {
            2 => json!({ "users": [user], "events": events }),
            _ => json!({ "users": [user], "impressions": impressions, "actions": actions }),
        };
        let first = first.to_string();
        let contradictions = self.contradictions(&actions[0], now_ms);
        // What is sent again counts once.
        HostileAnswer { bodies: vec![first.clone(), first.clone(), contradictions, first] }
    }

    fn actions(&self, honest: u64) -> Value {
        let did = |bit: usize| match self.values["actions"].as_str() {
            Some("all") => true,
            Some("none") => false,
            _ => honest >> bit & 1 == 0,
        };
        ACTIONS.iter().enumerate().map(|(bit, name)| (name.to_string(), json!(did(bit)))).collect()
    }

    fn watched(&self) -> Value {
        match &self.values["watch"] {
            Value::Null => json!({}),
            watched => json!({ "watch": watched }),
        }
    }

    /// The user takes back what it did, again and again.
    fn contradictions(&self, action: &Value, now_ms: i64) -> String {
        let contradiction = |at: i64| {
            let did = at % 2 == 0;
            let mut action = action.clone();
            action["time_ms"] = json!(now_ms - CONTRADICTIONS + at);
            action["actions"] = ACTIONS.iter().map(|name| (name.to_string(), json!(did))).collect();
            action["values"] = json!({ "watch": if did { -3.4e38 } else { 3.4e38 } });
            action
        };
        let actions: Vec<Value> = (0..CONTRADICTIONS).map(contradiction).collect();
        json!({ "actions": actions }).to_string()
    }

    /// Sends requests that bring nothing to learn until `stop`.
    pub fn besiege(&self, door: &Door, stop: &AtomicBool) -> HostileTally {
        let requests: Vec<SiegeRequest> =
            self.rankings().into_iter().chain(self.events()).collect();
        let mut tally = HostileTally::default();
        // Each begins elsewhere, so that they are at different ones at a time.
        for request in requests.iter().cycle().skip(self.number as usize) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let (status, answer) = door.post(request.route, &request.body);
            let start: String = request.body.chars().take(200).collect();
            assert!(request.expected.contains(&status), "{status}: {answer} to {start}");
            tally.count(request.route, status, 1);
            std::thread::sleep(SIEGE_PAUSE);
        }
        tally
    }

    fn rankings(&self) -> Vec<SiegeRequest> {
        let user = self.id();
        let ranking = |candidates: Vec<Value>, more: Value, expected| {
            let mut body = json!({ "user": user, "surface": "feed", "candidates": candidates });
            let more = more.as_object().expect("fields").clone();
            body.as_object_mut().expect("fields").extend(more);
            SiegeRequest { route: "/v1/rank", body: body.to_string(), expected }
        };
        let ids = |ids: std::ops::Range<u64>| ids.map(|id| json!({ "id": id })).collect::<Vec<_>>();
        let unknown = |id: u64| {
            let features = json!({ "topic": u64::MAX, "creator": 0, "length": 3.4e38 });
            json!({ "id": u64::MAX - id, "features": features })
        };
        let context = json!({ "device": "x".repeat(LONG_TEXT), "battery": self.values["battery"] });
        let least = json!({ "user": u64::MAX, "time_ms": -MOST_TIME_MS, "limit": 0 });
        // What is large may find no room beside other requests.
        let large: &[u16] = &[200, 503];
        vec![
            ranking((0..1000).map(unknown).collect(), json!({ "context": context }), large),
            ranking(ids(0..1000), json!({ "explain": true }), large),
            ranking(ids(0..1001), json!({}), &[413]),
            ranking(vec![json!({ "id": 1 }); 1000], json!({}), &[200]),
            ranking(Vec::new(), json!({}), &[422]),
            ranking(ids(0..3), least, &[200]),
            ranking(ids(0..3), json!({ "surface": "x".repeat(LONG_TEXT) }), &[404]),
            ranking(ids(0..3), json!({ "time_ms": 1_650_844_800 }), &[400]),
            ranking(ids(0..3), json!({ "context": { "battery": 1e39 } }), &[400]),
            ranking(ids(0..3), json!({ "request": u64::MAX }), &[400]),
        ]
    }

    fn events(&self) -> Vec<SiegeRequest> {
        let user = self.id();
        let events = |body: Value, expected| SiegeRequest {
            route: "/v1/events",
            body: body.to_string(),
            expected,
        };
        // Of requests that never were.
        let orphan = |at: u64, time_ms: i64| {
            let request = (FIRST_HOSTILE_ID << 8) + (user << 4) + at;
            json!({
                "request": request, "item": u64::MAX, "time_ms": time_ms,
                "actions": { "click": true }, "complete": true,
            })
        };
        let repeated = {
            let mut orphan = orphan(0, 0);
            orphan["id"] = json!(user);
            orphan
        };
        let orphans = |most: u64| (0..most).map(|at| orphan(at, -MOST_TIME_MS)).collect::<Vec<_>>();
        let later = orphan(0, now_ms() + MOST_TIME_MS / 2);
        let changed = json!({ "id": user, "features": { "age_group": "x".repeat(LONG_TEXT) } });
        vec![
            events(json!({ "actions": vec![repeated; 1000] }), &[200]),
            events(json!({ "actions": orphans(1000) }), &[200]),
            events(json!({ "actions": orphans(10_001) }), &[413]),
            events(json!({ "actions": [later] }), &[400]),
            events(json!({ "users": [changed] }), &[200]),
            events(json!({ "clock_ms": now_ms() }), &[403]),
            events(json!({ "bought": [] }), &[400]),
        ]
    }
}

//! Honest users of the fuzzed schema: what they see and do is a function of numbers, so that a
//! model can learn it and every run sees the same.

use hypercast_core::hash::mix_parts;
use hypercast_data::schema::{Schema, ValueRange};
use hypercast_serve::api::{EventsRequest, RankRequest};
use serde_json::{Value, json};

use crate::world;

/// Ids of honest users, items and requests begin here: the fuzzer's own are smaller or extreme.
pub const FIRST_ID: u64 = 1000;

/// The items that are shown.
pub const ITEMS: u64 = 12;

const USERS: u64 = 40;

/// Items of a request.
pub const TARGETS: u64 = 3;

/// The fuzzed schema with a range for each number, as an operator should state.
pub fn schema() -> Schema {
    let range = |(name, high): (&str, f32)| ValueRange {
        name: name.into(),
        low: 0.0,
        high,
        ..ValueRange::default()
    };
    let ranges = [("seconds", 60.0), ("length", 100.0), ("age", 120.0), ("load", 1.0)];
    Schema { ranges: ranges.map(range).to_vec(), ..world::schema() }
}

/// More than all honest requests of a run.
const REQUESTS: u64 = 1 << 16;

/// A request of an honest user, by its number.
#[derive(Debug, Clone, Copy)]
pub struct HonestRequest(pub u64);

impl HonestRequest {
    /// The id that its events name.
    pub fn id(self) -> u64 {
        FIRST_ID + self.0
    }

    /// The number of the honest request with an id.
    pub fn of(id: u64) -> Option<HonestRequest> {
        (FIRST_ID..FIRST_ID + REQUESTS).contains(&id).then(|| HonestRequest(id - FIRST_ID))
    }

    fn user(self) -> u64 {
        FIRST_ID + mix_parts(&[1, self.0]) % USERS
    }

    /// The items that it shows.
    pub fn items(self) -> [u64; TARGETS as usize] {
        let first = mix_parts(&[2, self.0]);
        [0, 1, 2].map(|at| FIRST_ID + (first + at * 5) % ITEMS)
    }

    /// Whether the user clicks an item: some items are better, and each user likes some kinds more.
    pub fn clicks(self, item: u64) -> bool {
        let at = item - FIRST_ID;
        let likes = mix_parts(&[3, self.user(), at % 4]) % 40;
        mix_parts(&[4, self.0, at]) % 100 < 5 + at * 5 + likes
    }

    fn context(self) -> Value {
        json!({ "network": self.0 % 3, "load": (self.0 % 10) as f32 / 10.0 })
    }

    /// What the user saw at a time.
    pub fn impressions(self, time_ms: i64) -> Vec<Value> {
        let impression = |item: u64| {
            json!({
                "request": self.id(), "user": self.user(), "item": item, "surface": "feed",
                "time_ms": time_ms, "context": self.context(),
            })
        };
        self.items().map(impression).to_vec()
    }

    /// What the user did, completely.
    pub fn actions(self, time_ms: i64) -> Vec<Value> {
        let action = |item: u64| {
            json!({
                "request": self.id(), "item": item, "time_ms": time_ms, "complete": true,
                "actions": { "click": self.clicks(item) }, "values": { "seconds": item % 7 },
            })
        };
        self.items().map(action).to_vec()
    }

    /// The ranking that the user asks for.
    pub fn ranking(self, time_ms: i64) -> RankRequest {
        let candidates = self.items().map(|id| json!({ "id": id }));
        let body = json!({
            "user": self.user(), "surface": "feed", "candidates": candidates,
            "time_ms": time_ms, "context": self.context(),
        });
        serde_json::from_value(body).expect("honest callers send what the API takes")
    }
}

/// The items and users, as their owners tell of them.
pub fn entities() -> EventsRequest {
    let item = |at: u64| json!({ "id": FIRST_ID + at, "features": { "tag": at % 4, "length": at as f32 } });
    let user = |at: u64| json!({ "id": FIRST_ID + at, "features": { "age": 20 + at % 30 } });
    let (items, users): (Vec<_>, Vec<_>) =
        ((0..ITEMS).map(item).collect(), (0..USERS).map(user).collect());
    body(json!({ "items": items, "users": users }))
}

/// A body of `POST /v1/events`.
pub fn body(body: Value) -> EventsRequest {
    serde_json::from_value(body).expect("honest callers send what the API takes")
}

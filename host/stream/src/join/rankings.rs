//! What daemons ranked where, until the impressions come: an example says of each of its items the
//! place and the probability with which it was shown.
//!
//! A daemon's record of an answer and the impressions of it come by different ways, so that either
//! may be first. An impression whose ranking does not come before its example is written has none.

use std::collections::{HashMap, VecDeque};

use hypercast_core::hash::IdHashKey;
use hypercast_data::ranked_place::RankedPlace;
use serde::{Deserialize, Serialize};

use super::{
    Joiner,
    pending::{ImpressionSlot, PendingRequest, impression_key},
};
use crate::events::RankingEvent;

/// The most bytes of rankings that wait for impressions.
const MAX_BYTES: usize = 128 << 20;

/// The most different answers to one request id, such as pages, that are told apart.
const MAX_OF_REQUEST: usize = 8;

/// About what a ranking takes besides what it holds: its fields, those of its request in a hash
/// table and in a queue that are half empty, and what the allocator adds to four blocks.
const FIXED_BYTES: usize = size_of::<RankingEvent>()
    + 2 * size_of::<(u64, RequestRankings)>()
    + 2 * size_of::<(i64, u64)>()
    + 4 * 16;

/// The rankings whose impressions may still come. The oldest are dropped first.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct ServedRankings {
    by_request: HashMap<u64, RequestRankings, IdHashKey>,
    /// Each request once, and a time when one of its rankings came.
    order: VecDeque<(i64, u64)>,
    bytes: usize,
    /// Rankings that were dropped for want of room.
    dropped: u64,
}

/// The rankings of a request.
#[derive(Debug, Serialize, Deserialize)]
struct RequestRankings {
    /// When the newest came.
    newest_ms: i64,
    /// In the order they came. None once there were too many: callers use the id for all they ask.
    known: Vec<RankingEvent>,
}

/// What a joiner saves of rankings.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SavedRankings {
    served: ServedRankings,
    pending: Vec<SavedPlace>,
}

/// Where the item of a pending impression was ranked.
#[derive(Debug, Serialize, Deserialize)]
struct SavedPlace {
    request: u64,
    row: u16,
    place: RankedPlace,
}

impl ServedRankings {
    /// Adds a ranking. One that comes twice is kept once, and of more than [`MAX_OF_REQUEST`] of a
    /// request none is.
    fn insert(&mut self, ranking: RankingEvent, came_ms: i64, max_bytes: usize) {
        let request = ranking.request;
        let Some(of) = self.by_request.get_mut(&request) else {
            self.bytes += bytes(&ranking);
            self.order.push_back((came_ms, request));
            // Room for one, since most requests have no other.
            let of = RequestRankings { newest_ms: came_ms, known: vec![ranking] };
            self.by_request.insert(request, of);
            return self.make_room(max_bytes);
        };
        of.newest_ms = of.newest_ms.max(came_ms);
        if of.known.is_empty() || of.known.contains(&ranking) {
            return;
        }
        if of.known.len() < MAX_OF_REQUEST {
            self.bytes += bytes(&ranking);
            of.known.push(ranking);
        } else {
            self.bytes = self.bytes + FIXED_BYTES - held_bytes(of);
            of.known = Vec::new();
        }
        self.make_room(max_bytes);
    }

    /// Drops the requests whose newest ranking came before a time.
    pub(super) fn forget(&mut self, before_ms: i64) {
        while let Some(&(_, request)) = self.order.front().filter(|(at_ms, _)| *at_ms < before_ms) {
            let newest_ms = self.by_request.get(&request).map(|of| of.newest_ms);
            match newest_ms.filter(|newest_ms| *newest_ms >= before_ms) {
                Some(newest_ms) => {
                    self.order.pop_front();
                    self.order.push_back((newest_ms, request));
                }
                None => {
                    self.drop_oldest();
                }
            }
        }
    }

    fn make_room(&mut self, max_bytes: usize) {
        while self.bytes > max_bytes && self.order.len() > 1 {
            self.dropped += self.drop_oldest();
        }
    }

    /// Drops the request that was noted or renewed first. Returns how many rankings it had.
    fn drop_oldest(&mut self) -> u64 {
        let oldest = self.order.pop_front();
        let Some(of) = oldest.and_then(|(_, request)| self.by_request.remove(&request)) else {
            return 0;
        };
        self.bytes -= held_bytes(&of);
        of.known.len() as u64
    }

    /// Rankings that were dropped for want of room.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Where an item was ranked. Nobody knows if answers to one request id have it at different
    /// places: a caller used the id again, and which of them was shown is not said.
    pub(super) fn place(&self, request: u64, item: u64) -> Option<RankedPlace> {
        let known = &self.by_request.get(&request)?.known;
        let mut places = known.iter().filter_map(|own| own.place(item));
        let first = places.next()?;
        places.all(|other| other == first).then_some(first)
    }
}

/// About what a ranking takes in memory.
fn bytes(ranking: &RankingEvent) -> usize {
    let RankingEvent { arm, items, propensities, .. } = ranking;
    FIXED_BYTES + arm.len() + size_of_val(&items[..]) + size_of_val(&propensities[..])
}

/// What a request's rankings take; a request that had too many takes as much as an empty one.
fn held_bytes(of: &RequestRankings) -> usize {
    of.known.iter().map(bytes).sum::<usize>().max(FIXED_BYTES)
}

/// What a joiner does with rankings.
impl Joiner {
    /// Notes a ranking, for impressions that came before it too.
    pub(super) fn on_ranking(&mut self, ranking: RankingEvent, ingested_ms: i64) {
        let (request, came_ms) = (ranking.request, self.clock_ms.max(ingested_ms));
        let pending = self.requests.contains_key(&request);
        let items = if pending { ranking.items.clone() } else { Vec::new() };
        self.rankings.insert(ranking, came_ms, MAX_BYTES);
        for item in items {
            let Some(&slot) = self.slots.get(&impression_key(request, item)) else { continue };
            let place = self.rankings.place(request, item);
            let pending = self.pending.get_mut(&slot.request);
            let open = pending.filter(|pending| pending.joined_ms.is_none());
            open.into_iter()
                .for_each(|open| open.rows[usize::from(slot.row)].ranked = place.clone());
        }
    }

    /// Takes the rankings out to save them, beside copies of those of pending impressions.
    pub(super) fn saved_rankings(&mut self) -> SavedRankings {
        let places = |(&request, pending): (&u64, &PendingRequest)| {
            let rows = (0..).zip(pending.rows.clone());
            rows.filter_map(move |(row, of)| {
                of.ranked.map(|place| SavedPlace { request, row, place })
            })
        };
        let pending = self.pending.iter().flat_map(places).collect();
        SavedRankings { served: std::mem::take(&mut self.rankings), pending }
    }

    /// Puts back what was saved.
    pub(super) fn restore_rankings(&mut self, saved: SavedRankings) {
        self.rankings = saved.served;
        for SavedPlace { request, row, place } in saved.pending {
            let slot = ImpressionSlot { request, row };
            let pending = self.pending.get_mut(&slot.request);
            let row = pending.and_then(|pending| pending.rows.get_mut(usize::from(slot.row)));
            row.into_iter().for_each(|row| row.ranked = Some(place.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranking(request: u64, arm: &str, items: &[u64]) -> RankingEvent {
        let (arm, items) = (arm.to_owned(), items.to_vec());
        RankingEvent { request, arm, items, propensities: vec![Some(0.5)] }
    }

    #[test]
    fn a_place_is_known_unless_two_answers_differ() {
        let mut rankings = ServedRankings::default();
        rankings.insert(ranking(1, "a@1.0.0", &[7, 8]), 0, MAX_BYTES);
        let place = |position, propensity| {
            Some(RankedPlace { position, propensity, arm: "a@1.0.0".into() })
        };
        assert_eq!(rankings.place(1, 7), place(0, Some(0.5)));
        assert_eq!(rankings.place(1, 8), place(1, None));
        assert_eq!((rankings.place(1, 9), rankings.place(2, 7)), (None, None));
        rankings.insert(ranking(1, "a@1.0.0", &[7, 8]), 5, MAX_BYTES);
        assert_eq!(rankings.order.len(), 1, "the same answer again");
        // Another page, and one item elsewhere.
        rankings.insert(ranking(1, "a@1.0.0", &[9, 8, 7]), 9, MAX_BYTES);
        assert_eq!(rankings.place(1, 9), place(0, Some(0.5)));
        assert_eq!([7, 8].map(|item| rankings.place(1, item)), [None, place(1, None)]);
    }

    #[test]
    fn an_id_that_callers_use_for_all_they_ask_says_nothing_and_takes_no_room() {
        let mut rankings = ServedRankings::default();
        for at in 0..MAX_OF_REQUEST as u64 {
            rankings.insert(ranking(1, "a", &[7, 100 + at]), at as i64, MAX_BYTES);
        }
        assert_eq!(rankings.place(1, 7).map(|place| place.position), Some(0));
        for at in 0..1000 {
            rankings.insert(ranking(1, "a", &[7, 200 + at]), 100 + at as i64, MAX_BYTES);
        }
        assert_eq!([7, 100, 1199].map(|item| rankings.place(1, item)), [None, None, None]);
        assert_eq!((rankings.bytes, rankings.order.len()), (FIXED_BYTES, 1));
        // It is known to be used so until it has not been for long.
        rankings.forget(1000);
        rankings.insert(ranking(1, "a", &[7]), 1200, MAX_BYTES);
        assert_eq!(rankings.place(1, 7), None);
        rankings.forget(1201);
        rankings.insert(ranking(1, "a", &[7]), 1300, MAX_BYTES);
        assert!(rankings.place(1, 7).is_some());
    }

    #[test]
    fn what_is_old_or_too_much_is_dropped() {
        let mut rankings = ServedRankings::default();
        let one = bytes(&ranking(1, "a", &[7, 8]));
        for request in 0..10 {
            rankings.insert(ranking(request, "a", &[7, 8]), request as i64, 4 * one);
        }
        assert!(rankings.place(5, 7).is_none() && rankings.place(6, 7).is_some());
        assert_eq!(rankings.dropped(), 6);
        rankings.forget(8);
        assert!(rankings.place(7, 7).is_none() && rankings.place(8, 7).is_some());
        rankings.forget(i64::MAX);
        assert!(rankings.by_request.is_empty() && rankings.order.is_empty());
        assert_eq!(rankings.bytes, 0);
    }
}

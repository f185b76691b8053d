//! What callers send: requests with impressions, and the actions on them. All of it is a function
//! of the plan's seed and the number of the request.

use hypercast_core::hash::mix64;
use hypercast_data::dataset::{ContextFeatures, Impression};
use hypercast_fm::example::{Item, MAX_VALUES, Outcome};
use hypercast_stream::events::{ActionEvent, EventKind, ImpressionEvent, NewEvent};

use crate::{
    host::EPOCH_MS,
    plan::{Draw, Plan},
};

/// The actions of the schema, as bits.
const ACTIONS: u64 = 0b11;

/// A call of the daemon: events that are acknowledged together.
#[derive(Debug, Clone)]
pub struct IngestCall {
    /// When the caller makes it first, since the beginning.
    pub at_ms: u64,
    /// What is in it.
    pub events: Vec<NewEvent>,
    /// The latest time in it.
    pub latest_ms: i64,
    /// Whether the caller sends it again although it was acknowledged, and how much later.
    pub again_after_ms: Option<u64>,
}

/// The calls of a plan, in no particular order but for the last one.
pub fn calls(plan: &Plan) -> Vec<IngestCall> {
    let mut calls: Vec<IngestCall> =
        plan.requests.iter().flat_map(|&number| of_request(plan, number)).collect();
    calls.push(update(u64::MAX, &mut Draw::new(plan.seed, 999)));
    calls
}

/// New features of an item.
fn update(at_ms: u64, draw: &mut Draw) -> IngestCall {
    let kind = EventKind::Item(Item {
        id: draw.below(9) + 1,
        ids: vec![draw.below(5)],
        ..Item::default()
    });
    let events = vec![NewEvent { id: None, kind }];
    IngestCall { at_ms, events, latest_ms: i64::MIN, again_after_ms: None }
}

/// The id of a request, which is that of its first part.
pub fn request_id(number: u32) -> u64 {
    u64::from(number) + 1
}

/// The ids that examples of a request have: each further part has one of its own.
pub fn part_ids(number: u32) -> impl Iterator<Item = u64> {
    let request = request_id(number);
    let part = move |part: u64| if part == 0 { request } else { mix64(request ^ mix64(part)) };
    (0..16).map(part)
}

fn of_request(plan: &Plan, number: u32) -> Vec<IngestCall> {
    let mut draw = Draw::new(plan.seed, 1000 + u64::from(number));
    let settings = &plan.settings;
    let at_ms = draw.below(settings.duration_s * 1000);
    let skew_ms = draw.around(settings.callers_ahead_ms);
    let time_ms = |since_ms: u64| EPOCH_MS + since_ms as i64 + skew_ms;
    let (user, surface) = (draw.below(6) + 1, draw.below(2) as u16);
    let first = draw.below(9);
    let items: Vec<u64> = (0..draw.below(6) + 1).map(|at| (first + at) % 9 + 1).collect();
    let again = |draw: &mut Draw| draw.percent(15).then(|| draw.below(60_000));
    let request = request_id(number);
    if draw.percent(10) {
        let rows = items.iter().map(|&item| whole(request, user, item, time_ms(at_ms))).collect();
        let events = vec![NewEvent { id: None, kind: EventKind::CompleteRequest(rows) }];
        let (latest_ms, again_after_ms) = (time_ms(at_ms), again(&mut draw));
        return vec![IngestCall { at_ms, events, latest_ms, again_after_ms }];
    }
    let mut calls = Vec::new();
    if draw.percent(10) {
        calls.push(update(at_ms, &mut draw));
    }
    let shown = |&item: &u64| {
        let context = ContextFeatures { ids: vec![request % 2], dense: vec![] };
        let time_ms = time_ms(at_ms);
        let kind = EventKind::Impression(ImpressionEvent {
            request,
            user,
            item,
            surface,
            time_ms,
            context,
        });
        NewEvent { id: None, kind }
    };
    let events = items.iter().map(shown).collect();
    let latest_ms = time_ms(at_ms);
    calls.push(IngestCall { at_ms, events, latest_ms, again_after_ms: again(&mut draw) });
    for &item in &items {
        for _ in 0..draw.below(3) {
            let longest = draw.one_of(&[settings.min_window_s, settings.max_window_s, 600]);
            let acted_ms = at_ms + draw.below(longest * 1000);
            let actions = (draw.below(3) + 1) & ACTIONS;
            let outcome = Outcome { actions, known: actions, values: [f32::NAN; MAX_VALUES] };
            let time_ms = time_ms(acted_ms);
            let complete = false;
            let kind = EventKind::Action(ActionEvent { request, item, time_ms, outcome, complete });
            let events = vec![NewEvent { id: None, kind }];
            // An action may arrive before its impression.
            let at_ms = acted_ms.saturating_sub(draw.below(300));
            let again_after_ms = again(&mut draw);
            calls.push(IngestCall { at_ms, events, latest_ms: time_ms, again_after_ms });
        }
    }
    calls
}

fn whole(request: u64, user: u64, item: u64, time_ms: i64) -> Impression {
    Impression {
        request,
        time_ms,
        outcome_ms: time_ms,
        user,
        item,
        surface: 0,
        outcome: Outcome { actions: 1, known: ACTIONS, values: [f32::NAN; MAX_VALUES] },
        context: ContextFeatures::default(),
        truth: vec![],
        history_only: false,
    }
}

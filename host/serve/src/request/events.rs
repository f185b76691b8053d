//! Converts bodies of `POST /v1/events` into records of the events stream. Refusals name the list
//! and the index of the wrong element.

use std::sync::Arc;

use hypercast_config::Config;
use hypercast_data::{
    dataset::{Impression, entity_id::EntityId},
    schema::Schema,
};
use hypercast_fm::example::{Item, User};
use hypercast_fm::training_only::ReadFor;
use hypercast_stream::{
    events::{
        ActionEvent, AppendReceipt, EventKind, EventWriter, ImpressionEvent, NewEvent, content_id,
    },
    streams::StreamEngine,
};

use crate::{
    metrics::Metrics,
    request::{
        api::{
            ActionBody, EntityBody, EventBody, EventsRequest, ImpressionBody, Refusal,
            RequestResult,
        },
        caller_ids::CallerIds,
        convert::{Converter, check_sent_time},
    },
};

/// Checks the bodies of `POST /v1/events`, converts them, counts them and appends them to the
/// stream.
pub struct EventIntake {
    /// Appends to the stream.
    pub(crate) writer: Arc<EventWriter>,
    /// The ids that callers have sent.
    pub(crate) ids: Arc<CallerIds>,
    converter: Converter,
    max_events: usize,
    metrics: Arc<Metrics>,
}

impl EventIntake {
    /// Converts with `converter`. Becomes the stream's writer with its first event, or with
    /// [`EventWriter::open`].
    pub fn new(
        engine: Arc<dyn StreamEngine>,
        converter: Converter,
        ids: CallerIds,
        config: &Config,
        metrics: Arc<Metrics>,
    ) -> EventIntake {
        EventIntake {
            writer: Arc::new(EventWriter::new(engine, &config.join)),
            ids: Arc::new(ids),
            converter: converter.counting_in(&metrics),
            max_events: config.server.max_events,
            metrics,
        }
    }

    /// The same writer and ids for events of another schema, with content vectors of this width.
    pub fn under(&self, schema: Arc<Schema>, content_width: usize) -> EventIntake {
        let Self { writer, ids, max_events, metrics, .. } = self;
        EventIntake {
            writer: writer.clone(),
            ids: ids.clone(),
            converter: self.converter.under(schema, content_width),
            max_events: *max_events,
            metrics: metrics.clone(),
        }
    }

    /// Appends the events of a body, all or none. They are durable when it returns.
    ///
    /// # Errors
    /// An event does not fit the schema or is too far in the future, an id has another's key, there
    /// are too many, or the stream fails.
    pub fn take(&self, request: &EventsRequest) -> RequestResult<AppendReceipt> {
        let given = request.len();
        if given > self.max_events {
            return Err(Refusal::TooMany { given, what: "events", most: self.max_events });
        }
        let events = self.converter.new_events(request, self.writer.latest_ms())?;
        self.ids.store_durably(request.text_ids())?;
        let impressions: Vec<(u16, u64)> =
            events.iter().filter_map(NewEvent::impressions).collect();
        let taken = self.writer.append(events, given);
        let taken = taken.map_err(|error| Refusal::of_stream(&error))?;
        for (surface, count) in impressions {
            let surface = &self.converter.schema.surfaces[usize::from(surface)];
            self.metrics.events.with_label_values(&[surface]).inc_by(count);
        }
        Ok(taken)
    }
}

/// Bound of ids in requests, because JSON numbers are exact below it.
const MOST_ID: u64 = 1 << 53;

impl Converter {
    /// Converts a body into events in the order in which they are joined: items and users,
    /// impressions, outcomes. Times after `latest_ms` are refused.
    ///
    /// # Errors
    /// An event that does not fit the schema, with its list and index.
    pub fn new_events(
        &self,
        request: &EventsRequest,
        latest_ms: i64,
    ) -> RequestResult<Vec<NewEvent>> {
        let mut new_events = Vec::with_capacity(request.len() + 1);
        new_events.extend(each("items", &request.items, |body| self.item_event(body))?);
        new_events.extend(each("users", &request.users, |body| self.user_event(body))?);
        new_events.extend(each("impressions", &request.impressions, |body| {
            in_time(body.time_ms, latest_ms)?;
            self.shown(body)
        })?);
        let wholes = each("events", &request.events, |body| {
            in_time(body.time_ms, latest_ms)?;
            in_time(body.outcome_ms.unwrap_or(body.time_ms), latest_ms)?;
            self.whole(body)
        })?;
        for (id, whole) in request.events.iter().map(|body| body.id).zip(wholes) {
            match new_events.last_mut() {
                Some(NewEvent { id: None, kind: EventKind::CompleteRequest(rows) })
                    if id.is_none() && same_request(&rows[0], &whole) =>
                {
                    rows.push(whole);
                }
                _ => {
                    new_events.push(NewEvent { id, kind: EventKind::CompleteRequest(vec![whole]) });
                }
            }
        }
        new_events.extend(each("actions", &request.actions, |body| {
            in_time(body.time_ms, latest_ms)?;
            self.reaction(body)
        })?);
        if let Some(time_ms) = request.clock_ms {
            in_time(time_ms, latest_ms).map_err(|refusal| refusal.at("clock_ms"))?;
            new_events.push(NewEvent { id: None, kind: EventKind::Tick { time_ms } });
        }
        Ok(new_events)
    }

    fn shown(&self, body: &ImpressionBody) -> RequestResult<NewEvent> {
        let surface = self.surface(&body.surface)?;
        let context = self.context_of(&body.context, ReadFor::Learning)?;
        let (user, item) = (self.user_of(&body.user)?, self.item_of(&body.item)?);
        let ImpressionBody { id, request, time_ms, .. } = *body;
        let mut shown = ImpressionEvent { request, user, item, surface, time_ms, context };
        shown.request = request_of(request, id, &shown)?;
        Ok(NewEvent { id, kind: EventKind::Impression(shown) })
    }

    fn whole(&self, body: &EventBody) -> RequestResult<Impression> {
        let mut impression = Impression {
            request: body.request,
            time_ms: body.time_ms,
            outcome_ms: body.outcome_ms.unwrap_or(body.time_ms),
            user: self.user_of(&body.user)?,
            item: self.item_of(&body.item)?,
            surface: self.surface(&body.surface)?,
            outcome: self.outcome(&body.actions, &body.values)?,
            context: self.context_of(&body.context, ReadFor::Learning)?,
            truth: Vec::new(),
            history_only: false,
        };
        impression.request = request_of(body.request, body.id, &impression)?;
        Ok(impression)
    }

    fn reaction(&self, body: &ActionBody) -> RequestResult<NewEvent> {
        if body.request == 0 {
            let what = "`request` is missing: send that of the impression, or the impression's `id` if it was sent without a request";
            return Err(Refusal::BadRequest(what.into()));
        }
        let outcome = self.outcome(&body.actions, &body.values)?;
        body.user.as_ref().map(|user| self.user_of(user)).transpose()?;
        let item = self.item_of(&body.item)?;
        let ActionBody { id, request, time_ms, complete, .. } = *body;
        Ok(NewEvent {
            id,
            kind: EventKind::Action(ActionEvent { request, item, time_ms, outcome, complete }),
        })
    }

    fn user_of(&self, id: &EntityId) -> RequestResult<u64> {
        self.user(id).map_err(|refusal| refusal.at("user"))
    }

    fn item_of(&self, id: &EntityId) -> RequestResult<u64> {
        self.item(id).map_err(|refusal| refusal.at("item"))
    }

    fn item_event(&self, body: &EntityBody) -> RequestResult<NewEvent> {
        let (ids, dense) = self.entity_columns(&self.schema.item_features, &body.features)?;
        let id = self.item(&body.id).map_err(|refusal| refusal.at("id"))?;
        let content = self.content(body.content.as_deref())?;
        let item = Item { id, ids, dense, content };
        Ok(NewEvent { id: update_id(body)?, kind: EventKind::Item(item) })
    }

    fn user_event(&self, body: &EntityBody) -> RequestResult<NewEvent> {
        let (ids, dense) = self.entity_columns(&self.schema.user_features, &body.features)?;
        let id = self.user(&body.id).map_err(|refusal| refusal.at("id"))?;
        if body.content.is_some() {
            let why = "content: a user has no content vector; items have".to_owned();
            return Err(Refusal::BadRequest(why));
        }
        let user = User { id, ids, dense };
        Ok(NewEvent { id: update_id(body)?, kind: EventKind::User(user) })
    }
}

/// The id of an update of an item or user, if the caller gave it one.
fn update_id(body: &EntityBody) -> RequestResult<Option<u64>> {
    let id = |update: u64| content_id(&[body.id.key(), update]).map_err(Refusal::internal);
    body.update.map(id).transpose()
}

/// The request of an impression: the given one, else the impression's own id.
fn request_of(
    request: u64,
    id: Option<u64>,
    content: &impl serde::Serialize,
) -> RequestResult<u64> {
    match Some(request).filter(|&request| request != 0).or(id) {
        Some(given) => Ok(given),
        None => content_id(content).map_err(Refusal::internal),
    }
}

/// Whether two impressions were shown together and make one example.
fn same_request(first: &Impression, next: &Impression) -> bool {
    let of = |row: &Impression| (row.request, row.user, row.surface, row.time_ms);
    of(first) == of(next)
}

fn in_time(time_ms: i64, latest_ms: i64) -> RequestResult<()> {
    check_sent_time(time_ms)?;
    if time_ms <= latest_ms {
        return Ok(());
    }
    Err(Refusal::BadRequest(format!(
        "time {time_ms} is further ahead of this machine's clock than join.max_future_s; times are milliseconds since the epoch"
    )))
}

/// Converts the elements of a list; a refusal names the list and the index.
fn each<B, T>(
    list: &str,
    bodies: &[B],
    convert: impl Fn(&B) -> RequestResult<T>,
) -> RequestResult<Vec<T>> {
    let placed = |at: usize, made: RequestResult<T>| {
        made.map_err(|refusal| refusal.at(&format!("{list}[{at}]")))
    };
    bodies.iter().enumerate().map(|(at, body)| placed(at, convert(body))).collect()
}

/// Refuses a request id that JSON would round.
pub(crate) fn check_request(request: Option<u64>) -> RequestResult<()> {
    match request {
        Some(id) if id == 0 || id >= MOST_ID => Err(Refusal::BadRequest(format!(
            "`request` is {id}; an id of a request is above 0 and below 2^53"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;

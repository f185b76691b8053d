//! The HTTP bodies: requests, answers, and every kind of refusal.

use std::collections::BTreeMap;

use hypercast_core::error::ErrorKind;
use hypercast_data::dataset::entity_id::{EntityId, TextId};
use serde::{Deserialize, Serialize};

use crate::request::named_features::unique_keys;
pub use crate::request::{
    candidates::{BodyForm, Candidates, RankCandidate},
    named_features::{FeatureValue, NamedFeatures},
    ranking::RankedPlaces,
};

/// The header with the milliseconds that are left, from a caller or from one tier to the next.
pub const DEADLINE_HEADER: &str = "hypercast-deadline-ms";

/// The header with the FM version that a caller of an FM tier wants; without it, the newest active
/// version answers.
pub const FM_VERSION_HEADER: &str = "hypercast-fm-version";

/// The body of `POST /v1/rank`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RankRequest {
    /// The user to rank for. A user never seen before is served as new.
    pub user: EntityId,
    /// The surface's name in the schema.
    pub surface: String,
    /// The candidates to rank.
    pub candidates: Candidates,
    /// An id above 0 and below 2^53 that joins the request with its events; by default the daemon
    /// assigns one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
    /// The request's time, milliseconds since the epoch; now if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_ms: Option<i64>,
    /// How many candidates to return; all if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Context features of the whole request, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique_keys")]
    pub context: NamedFeatures,
    /// Whether to return the FM's and the shadows' predictions and the stage times, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub explain: bool,
}

impl RankRequest {
    /// Its ids that are texts.
    pub(crate) fn text_ids(&self) -> impl Iterator<Item = &TextId> + Clone {
        std::iter::once(&self.user).chain(self.candidates.ids()).filter_map(EntityId::as_text)
    }
}

/// The answer to `POST /v1/rank`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RankAnswer {
    /// The request's id, to be sent back with its impressions and actions.
    pub request: u64,
    /// The ranking, best first.
    pub ranking: RankedPlaces,
    /// The version of the FM that was asked.
    pub fm_version: String,
    /// The expert that answered.
    pub expert: Option<AnsweringExpert>,
    /// Whether the FM's own ranking replaces the expert's, or the expert ranked without the FM's
    /// embedding.
    pub degraded: bool,
    /// Why it is degraded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the user had no history.
    pub new_user: bool,
    /// Candidates that the data set does not have; they were scored from the features in the
    /// request.
    pub unknown_items: Vec<EntityId>,
    /// Features in the request that were not read, because the schema has them for training only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored_features: Vec<String>,
    /// Present if the request asked for it with `explain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explain: Option<Explanation>,
}

/// The expert version that answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnsweringExpert {
    /// The expert's name in the registry or the configuration.
    pub name: String,
    /// The plugin's name.
    pub plugin: String,
    /// The version in the registry; the plugin's version for a configured expert.
    pub version: String,
    /// `NAME@VERSION`, as in metrics.
    #[serde(default)]
    pub arm: String,
}

/// What `explain` adds. Lists are in the order of the request's candidates.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Explanation {
    /// The expert's predictions by task.
    pub expert: BTreeMap<String, Vec<f32>>,
    /// The FM's own predictions of the main tasks.
    pub fm: BTreeMap<String, Vec<f32>>,
    /// Predictions of shadow experts, by name and task.
    pub shadows: BTreeMap<String, BTreeMap<String, Vec<f32>>>,
    /// Microseconds by stage: `features`, `fm`, `expert`, `wasm`, `total`.
    pub stages_us: BTreeMap<String, f64>,
}

/// The body of `POST /v1/events`: impressions and their outcomes, at most `server.max_events` over
/// all lists.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct EventsRequest {
    /// Impressions with their complete outcomes, oldest first; they are joined at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<EventBody>,
    /// Impressions whose outcomes will come as `actions`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub impressions: Vec<ImpressionBody>,
    /// Outcomes of impressions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub actions: Vec<ActionBody>,
    /// Items that are new or changed, with all their features.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<EntityBody>,
    /// Users that are new or changed, with all their features.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<EntityBody>,
    /// Watermark: no earlier event will arrive. It closes attribution windows that end before it,
    /// which a replay of the past needs. The caller needs the right to set the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_ms: Option<i64>,
}

impl EventsRequest {
    /// Number of events in all lists.
    pub fn len(&self) -> usize {
        let EventsRequest { events, impressions, actions, items, users, clock_ms: _ } = self;
        events.len() + impressions.len() + actions.len() + items.len() + users.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids of users in all lists.
    pub fn user_ids(&self) -> impl Iterator<Item = &EntityId> + Clone {
        let EventsRequest { events, impressions, actions, users, .. } = self;
        let of_actions = actions.iter().filter_map(|action| action.user.as_ref());
        let shown = events.iter().map(|event| &event.user);
        let shown = shown.chain(impressions.iter().map(|impression| &impression.user));
        shown.chain(of_actions).chain(users.iter().map(|user| &user.id))
    }

    /// The ids of items in all lists.
    pub fn item_ids(&self) -> impl Iterator<Item = &EntityId> + Clone {
        let EventsRequest { events, impressions, actions, items, .. } = self;
        let shown = events.iter().map(|event| &event.item);
        let shown = shown.chain(impressions.iter().map(|impression| &impression.item));
        let of_actions = actions.iter().map(|action| &action.item);
        shown.chain(of_actions).chain(items.iter().map(|item| &item.id))
    }

    /// Its ids that are texts.
    pub(crate) fn text_ids(&self) -> impl Iterator<Item = &TextId> + Clone {
        self.user_ids().chain(self.item_ids()).filter_map(EntityId::as_text)
    }
}

/// An impression whose outcome is not known yet.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ImpressionBody {
    /// Deduplication id, so that the event can be sent again; by default a hash of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The request that showed the item ([`RankAnswer::request`]); by default the impression's own
    /// id.
    #[serde(default)]
    pub request: u64,
    /// The user who saw the item.
    pub user: EntityId,
    /// The item that was shown.
    pub item: EntityId,
    /// The surface's name.
    pub surface: String,
    /// When the item was shown, milliseconds since the epoch.
    pub time_ms: i64,
    /// Context features that the request had, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique_keys")]
    pub context: NamedFeatures,
}

/// The outcome of an impression, or a part of it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ActionBody {
    /// Deduplication id; by default a hash of the content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The impression's request, or its `id` if it was sent without a request.
    pub request: u64,
    /// The impression's item.
    pub item: EntityId,
    /// The user who acted; optional, because the impression has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<EntityId>,
    /// When it happened, milliseconds since the epoch.
    pub time_ms: i64,
    /// Actions whose outcome is known now, by name.
    #[serde(default, deserialize_with = "unique_keys")]
    pub actions: BTreeMap<String, bool>,
    /// Real-valued outcomes that are known now, by name.
    #[serde(default, deserialize_with = "unique_keys")]
    pub values: BTreeMap<String, f32>,
    /// Whether the outcome is complete: actions that were not reported did not happen.
    #[serde(default)]
    pub complete: bool,
}

/// An item or a user.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EntityBody {
    /// The item's or user's id.
    pub id: EntityId,
    /// Deduplication id among this item's or user's updates, so that one can be sent again. Updates
    /// without one are all taken, in the order in which they arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<u64>,
    /// All its features, by name.
    #[serde(deserialize_with = "unique_keys")]
    pub features: NamedFeatures,
    /// An item's content vector, as in `content.parquet`: of any norm, as wide as the data set's.
    /// Without it the item keeps the one that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Vec<f32>>,
}

/// An impression with its outcome.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EventBody {
    /// Deduplication id, so that the event can be sent again; by default a hash of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The request that showed the item ([`RankAnswer::request`]); 0 if there was none.
    #[serde(default)]
    pub request: u64,
    /// The user who saw the item.
    pub user: EntityId,
    /// The item that was shown.
    pub item: EntityId,
    /// The surface's name.
    pub surface: String,
    /// When it was shown, milliseconds since the epoch.
    pub time_ms: i64,
    /// Actions whose outcome is known, by name.
    #[serde(default, deserialize_with = "unique_keys")]
    pub actions: BTreeMap<String, bool>,
    /// Real-valued outcomes that are known, by name.
    #[serde(default, deserialize_with = "unique_keys")]
    pub values: BTreeMap<String, f32>,
    /// Context features that the request had, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique_keys")]
    pub context: NamedFeatures,
    /// When the outcome became known; `time_ms` if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_ms: Option<i64>,
}

/// The answer to `POST /v1/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsAnswer {
    /// New events, which are durable now.
    pub accepted: usize,
    /// Events that were stored before; they are ignored.
    pub repeated: usize,
    /// Whether rankings use these events already; if not, they soon will.
    pub applied: bool,
}

/// The result of a part of a request: a value, or why the request is not answered.
pub type RequestResult<T> = Result<T, Refusal>;

/// Why a request is not answered, and what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The body is not valid for the route.
    #[error("{0}")]
    BadRequest(String),
    /// The schema has no such surface.
    #[error("unknown surface {given:?}; this host serves {known:?}")]
    UnknownSurface {
        /// The value in the request.
        given: String,
        /// The known values.
        known: Vec<String>,
    },
    /// A rank request without candidates.
    #[error("`candidates` is empty; send at least one")]
    NoCandidates,
    /// More elements than one request may have.
    #[error("{given} {what}; at most {most} fit one request, split it")]
    TooMany {
        /// Number in the request.
        given: usize,
        /// What was counted.
        what: &'static str,
        /// The most that one request may have.
        most: usize,
    },
    /// The caller set the time without the right to.
    #[error(
        "clock_ms: {caller:?} may not set the time; use an admin token, or one whose line in the file of \
         server.tokens ends with the word `replay`"
    )]
    MayNotReplay {
        /// The name of the caller's token.
        caller: String,
    },
    /// Models are still being loaded.
    #[error("starting: models are being loaded; try again when /readyz says so")]
    Starting,
    /// The tier has no such version of the FM.
    #[error("this tier has no FM {given:?}; it has {known:?}")]
    NoVersion {
        /// The value in the request.
        given: String,
        /// The known values.
        known: Vec<String>,
    },
    /// The daemon is overloaded.
    #[error("overloaded: it could not be answered in time; try again after {retry_after_ms} ms")]
    Overloaded {
        /// When to try again.
        retry_after_ms: u64,
    },
    /// The bodies of other requests fill the memory for them.
    #[error(
        "the bodies of other requests fill server.max_inflight_body_mib; try again after {retry_after_ms} ms"
    )]
    BodiesFull {
        /// When to try again.
        retry_after_ms: u64,
    },
    /// The deadline passed.
    #[error("no answer in time (server.deadline_ms, or the caller's {DEADLINE_HEADER})")]
    Deadline,
    /// A file that the FM reads while it serves was cut; the message names it.
    #[error("{0}")]
    FileLost(String),
    /// Another tier or the stream engine does not answer, or another process has the stream.
    #[error("{0}")]
    Unreachable(String),
    /// A failure of the host.
    #[error("{0}")]
    Internal(String),
}

impl Refusal {
    /// The code of [`Refusal::FileLost`].
    pub(crate) const FILE_LOST: &str = "file_lost";

    /// A failure of the FM in this process.
    pub(crate) fn of_fm(error: &hypercast_fm::Error) -> Self {
        match error.kind() {
            ErrorKind::Unavailable => Refusal::FileLost(error.to_string()),
            _ => Refusal::internal(error),
        }
    }

    /// A failure of a stream.
    pub(crate) fn of_stream(error: &hypercast_stream::Error) -> Self {
        match error.kind() {
            ErrorKind::Unavailable => Refusal::Unreachable(error.to_string()),
            _ => Refusal::internal(error),
        }
    }

    /// A failure of the host.
    pub(crate) fn internal(error: impl std::fmt::Display) -> Self {
        Refusal::Internal(error.to_string())
    }

    /// Puts the place in the body in front of what is wrong with it.
    pub(crate) fn at(self, place: &str) -> Self {
        match self {
            Refusal::BadRequest(why) => Refusal::BadRequest(format!("{place}: {why}")),
            other => other,
        }
    }

    /// The HTTP status and the code for programs.
    pub fn code(&self) -> (u16, &'static str) {
        match self {
            Refusal::BadRequest(_) => (400, "bad_request"),
            Refusal::UnknownSurface { .. } => (404, "unknown_surface"),
            Refusal::NoCandidates => (422, "no_candidates"),
            Refusal::TooMany { .. } => (413, "too_many"),
            Refusal::MayNotReplay { .. } => (403, "forbidden"),
            Refusal::NoVersion { .. } => (404, "no_version"),
            Refusal::Starting => (503, "starting"),
            Refusal::Overloaded { .. } | Refusal::BodiesFull { .. } => (503, "overloaded"),
            Refusal::FileLost(_) => (503, Refusal::FILE_LOST),
            Refusal::Deadline => (504, "deadline"),
            Refusal::Unreachable(_) => (502, "unreachable"),
            Refusal::Internal(_) => (500, "internal"),
        }
    }
}

/// The body of every refusal: `{"error": {"code", "message"}}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefusalBody {
    /// Code and message of the refusal.
    pub error: RefusalText,
}

/// A refusal as code and message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefusalText {
    /// The code for programs.
    pub code: String,
    /// What was wrong and what to do.
    pub message: String,
}

//! The HTTP bodies: what a caller sends, what it gets, and every way of being
//! refused. Shapes only; nothing here computes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::request::convert::NamedFeatures;

/// The header by which a caller, or one tier to the next, says how many milliseconds are left.
pub const DEADLINE_HEADER: &str = "hypercast-deadline-ms";

/// The header by which a caller of an FM's tier says which version it wants; without it, the newest active one answers.
pub const FM_VERSION_HEADER: &str = "hypercast-fm-version";

/// `POST /v1/rank`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RankRequest {
    /// Whose candidates these are. A user never seen before is served as new.
    pub user: u64,
    /// The surface's name in the schema.
    pub surface: String,
    /// What to rank.
    pub candidates: Vec<RankCandidate>,
    /// An id for the request, above 0 and below 2^53, by which its events are joined; the answer has one otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
    /// The request's time, milliseconds since the epoch; now if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_ms: Option<i64>,
    /// How many to return; all if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Context features of the whole request, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub context: NamedFeatures,
    /// Also return the FM's and the shadows' predictions and the stage times.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub explain: bool,
}

/// One candidate.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RankCandidate {
    /// The item's id.
    pub id: u64,
    /// Item or context features by name; needed for an item the host does not know.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub features: NamedFeatures,
}

/// The answer to `POST /v1/rank`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RankAnswer {
    /// The request's id, to be sent back with its impressions and actions.
    pub request: u64,
    /// Best first.
    pub ranking: Vec<Ranked>,
    /// The version of the FM that was asked.
    pub fm_version: String,
    /// The expert that answered.
    pub expert: Option<AnsweringExpert>,
    /// Whether the FM's own ranking stands in for the expert's, or the expert had to do without the FM's embedding.
    pub degraded: bool,
    /// Why it is degraded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the user had no history.
    pub new_user: bool,
    /// Candidates that the data set does not know; they were scored from the features sent.
    pub unknown_items: Vec<u64>,
    /// Asked for by `explain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explain: Option<Explanation>,
}

/// A ranked candidate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ranked {
    /// The item.
    pub id: u64,
    /// The value that it was ranked by.
    pub score: f32,
    /// A prediction a task: probabilities of binary tasks, values of regressions.
    pub predictions: BTreeMap<String, f32>,
}

/// Which expert answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnsweringExpert {
    /// Its name in the registry or the configuration.
    pub name: String,
    /// Its plugin.
    pub plugin: String,
    /// Its version in the registry; the plugin's where the configuration has it.
    pub version: String,
    /// Name and version, as metrics have them.
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
    /// Predictions of shadow experts: name, then task.
    pub shadows: BTreeMap<String, BTreeMap<String, Vec<f32>>>,
    /// Microseconds by stage: `features`, `fm`, `expert`, `wasm`, `total`.
    pub stages_us: BTreeMap<String, f64>,
}

/// `POST /v1/events`: what was shown and what came of it, at most `server.max_events` over all lists.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct EventsRequest {
    /// Impressions with all that will be known of them, oldest first: they are joined at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<EventBody>,
    /// Impressions whose outcomes will come as `actions`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub impressions: Vec<ImpressionBody>,
    /// What came of impressions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub actions: Vec<ActionBody>,
    /// Items that are new or changed, with all their features.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<EntityBody>,
    /// Users that are new or changed, with all their features.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<EntityBody>,
    /// Nothing older will come: windows that end before it are closed, which a replay of the past needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_ms: Option<i64>,
}

impl EventsRequest {
    /// Events in all lists.
    pub fn len(&self) -> usize {
        let EventsRequest { events, impressions, actions, items, users, clock_ms: _ } = self;
        events.len() + impressions.len() + actions.len() + items.len() + users.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An impression whose outcome is not known yet.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ImpressionBody {
    /// What tells it from others, so that it can be sent again; by default what it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The request that showed it ([`RankAnswer::request`]); its own id if there was none.
    #[serde(default)]
    pub request: u64,
    /// Who saw it.
    pub user: u64,
    /// What was shown.
    pub item: u64,
    /// Where.
    pub surface: String,
    /// When, milliseconds since the epoch.
    pub time_ms: i64,
    /// Context features that the request had, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub context: NamedFeatures,
}

/// What came of an impression, or a part of it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ActionBody {
    /// What tells it from others; by default what it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The impression's request, or its `id` if it was sent without a request.
    pub request: u64,
    /// The impression's item.
    pub item: u64,
    /// Who acted. The impression says it, so it may be missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u64>,
    /// When it happened, milliseconds since the epoch.
    pub time_ms: i64,
    /// Actions whose outcome is known now, by name.
    #[serde(default)]
    pub actions: BTreeMap<String, bool>,
    /// Real-valued outcomes that are known now, by name.
    #[serde(default)]
    pub values: BTreeMap<String, f32>,
    /// Nothing more will come of the impression: actions that were not told of did not happen.
    #[serde(default)]
    pub complete: bool,
}

/// An item or a user.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EntityBody {
    /// Its id.
    pub id: u64,
    /// All its features, by name.
    pub features: NamedFeatures,
}

/// One impression and what came of it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EventBody {
    /// What tells it from others, so that it can be sent again; by default what it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The request that showed it ([`RankAnswer::request`]); 0 if there was none.
    #[serde(default)]
    pub request: u64,
    /// Who saw it.
    pub user: u64,
    /// What was shown.
    pub item: u64,
    /// Where.
    pub surface: String,
    /// When it was shown, milliseconds since the epoch.
    pub time_ms: i64,
    /// Actions whose outcome is known, by name.
    #[serde(default)]
    pub actions: BTreeMap<String, bool>,
    /// Real-valued outcomes that are known, by name.
    #[serde(default)]
    pub values: BTreeMap<String, f32>,
    /// Context features that the request had, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub context: NamedFeatures,
    /// When the outcome became known; `time_ms` if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_ms: Option<i64>,
}

/// The answer to `POST /v1/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsAnswer {
    /// Events that are new; they are durable now.
    pub accepted: usize,
    /// Events that were there already, which changes nothing.
    pub repeated: usize,
    /// Whether rankings see what they led to; if not yet, they will soon.
    pub applied: bool,
}

/// The result of a part of a request: a value, or why the request is not answered.
pub type RequestResult<T> = Result<T, Refusal>;

/// Why a request is not answered, and what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The body is not what the route takes.
    #[error("{0}")]
    BadRequest(String),
    /// The schema has no such surface.
    #[error("unknown surface {given:?}; this host serves {known:?}")]
    UnknownSurface {
        /// What was asked for.
        given: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Nothing to rank.
    #[error("`candidates` is empty; send at least one")]
    NoCandidates,
    /// Too much to rank.
    #[error("{given} {what}; at most {most} fit one request, split it")]
    TooMany {
        /// How many came.
        given: usize,
        /// Of what.
        what: &'static str,
        /// How many may come.
        most: usize,
    },
    /// Models are still being loaded.
    #[error("starting: models are being loaded; try again when /readyz says so")]
    Starting,
    /// The tier has no such version of the FM.
    #[error("this tier has no FM {given:?}; it has {known:?}")]
    NoVersion {
        /// What was asked for.
        given: String,
        /// What there is.
        known: Vec<String>,
    },
    /// It could not be answered in time.
    #[error("overloaded: it could not be answered in time; try again after {retry_after_ms} ms")]
    Overloaded {
        /// When it may be worth another try.
        retry_after_ms: u64,
    },
    /// The deadline passed.
    #[error("no answer in time (server.deadline_ms, or the caller's {DEADLINE_HEADER})")]
    Deadline,
    /// Another tier does not answer.
    #[error("{0}")]
    Unreachable(String),
    /// Something failed that is not the caller's doing.
    #[error("{0}")]
    Internal(String),
}

impl Refusal {
    /// HTTP status and a word for programs.
    pub fn code(&self) -> (u16, &'static str) {
        match self {
            Refusal::BadRequest(_) => (400, "bad_request"),
            Refusal::UnknownSurface { .. } => (404, "unknown_surface"),
            Refusal::NoCandidates => (422, "no_candidates"),
            Refusal::TooMany { .. } => (413, "too_many"),
            Refusal::NoVersion { .. } => (404, "no_version"),
            Refusal::Starting => (503, "starting"),
            Refusal::Overloaded { .. } => (503, "overloaded"),
            Refusal::Deadline => (504, "deadline"),
            Refusal::Unreachable(_) => (502, "unreachable"),
            Refusal::Internal(_) => (500, "internal"),
        }
    }
}

/// The body of every refusal: `{"error": {"code", "message"}}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefusalBody {
    /// The refusal.
    pub error: RefusalText,
}

/// Code and message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefusalText {
    /// A word for programs.
    pub code: String,
    /// What was wrong and what to do.
    pub message: String,
}

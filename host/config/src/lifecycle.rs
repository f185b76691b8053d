//! Streams and the life cycle of data in them: where streams are, how long impressions wait for
//! their outcomes, and which weights are published when.

use std::{collections::BTreeMap, path::PathBuf};

use hypercast_data::features::FeatureConfig;
use serde::{Deserialize, Serialize};

use crate::check;
use crate::redacted_url::RedactedUrl;

/// The streams that carry events, examples, weights and versions: `[engine]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSettings {
    /// "directory" (one machine) or "nats" (NATS JetStream, across machines).
    pub kind: EngineKind,
    /// The folder of the streams, with kind = "directory".
    pub dir: PathBuf,
    /// What a reader does when records that it should find are missing.
    pub on_gap: OnGap,
    /// The URL of the NATS server, with kind = "nats". Several are separated by commas. "tls://"
    /// refuses a server without TLS.
    pub nats_url: RedactedUrl,
    /// The user that NATS knows, with the password in the file `nats_password`. "" sends none.
    pub nats_user: String,
    /// File of that user's password. Only its owner and group may be able to read the file.
    pub nats_password: PathBuf,
    /// File with a user's token and key, as `nsc` writes it (.creds), in place of user and
    /// password.
    pub nats_credentials: PathBuf,
    /// File of an nkey's seed, in place of user and password.
    pub nats_nkey: PathBuf,
    /// File of certificates (PEM), one of which is that of the server or of its authority. "" uses
    /// those that the machine trusts. A file refuses a server without TLS.
    pub nats_ca: PathBuf,
    /// Certificates (PEM) that this client shows to the server, with `nats_key`.
    pub nats_certificate: PathBuf,
    /// The private key of `nats_certificate`, in PEM.
    pub nats_key: PathBuf,
    /// How many servers of a NATS cluster store a stream, from 1 to 5. A stream that has more keeps
    /// them.
    pub nats_replicas: usize,
    /// Prefix of the stream names in NATS, so that several systems can share a server.
    pub nats_prefix: String,
    /// Whether an append to the directory waits until it is on the disk. NATS has its own setting
    /// (`sync_interval`).
    pub fsync: bool,
    /// Size at which a stream starts a new file, in MiB.
    pub segment_mib: u64,
    /// The most that a stream keeps, in MiB. The oldest records are removed first. 0 keeps all.
    pub retain_mib: u64,
    /// Ids of the newest records that a stream remembers, so that a record that is sent again is
    /// not stored twice.
    pub remembered_ids: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            kind: EngineKind::Directory,
            dir: "runs/streams".into(),
            on_gap: OnGap::Stop,
            nats_url: "nats://127.0.0.1:4222".into(),
            nats_user: String::new(),
            nats_password: PathBuf::new(),
            nats_credentials: PathBuf::new(),
            nats_nkey: PathBuf::new(),
            nats_ca: PathBuf::new(),
            nats_certificate: PathBuf::new(),
            nats_key: PathBuf::new(),
            nats_replicas: 1,
            nats_prefix: "hypercast".into(),
            fsync: true,
            segment_mib: 64,
            retain_mib: 0,
            remembered_ids: 1_000_000,
        }
    }
}

impl EngineSettings {
    /// The files that they name.
    pub(super) fn files(&mut self) -> [&mut PathBuf; 7] {
        [
            &mut self.dir,
            &mut self.nats_password,
            &mut self.nats_credentials,
            &mut self.nats_nkey,
            &mut self.nats_ca,
            &mut self.nats_certificate,
            &mut self.nats_key,
        ]
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        self.nats_url.validate("engine.nats_url")?;
        if self.nats_user.is_empty() == given(&self.nats_password) {
            return Err("one of engine.nats_user and engine.nats_password is set without the \
                        other; set both or neither"
                .into());
        }
        if given(&self.nats_certificate) != given(&self.nats_key) {
            return Err("one of engine.nats_certificate and engine.nats_key is set without the \
                        other; set both or neither"
                .into());
        }
        let ways = [
            self.nats_url.login().is_some(),
            given(&self.nats_password),
            given(&self.nats_credentials),
            given(&self.nats_nkey),
        ];
        if ways.into_iter().filter(|way| *way).count() > 1 {
            return Err("more than one of engine.nats_user, engine.nats_credentials, \
                        engine.nats_nkey and a user in engine.nats_url is set; keep one"
                .into());
        }
        let replicas = self.nats_replicas;
        check((1..=5).contains(&replicas), "engine.nats_replicas", replicas, "from 1 to 5")
    }
}

/// What a reader does when records that it should find are missing: they were deleted before it
/// read them, or the stream is shorter or another one than it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnGap {
    /// The joiner and trainers stop with an error until an operator decides.
    #[default]
    Stop,
    /// They say what is missing and go on with the records that are there.
    Continue,
}

/// The storage behind the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Files on this machine.
    #[default]
    Directory,
    /// NATS JetStream, across machines.
    Nats,
}

/// How long impressions wait for their outcomes: `[join]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JoinSettings {
    /// Whether the daemon runs the joiner. Otherwise run `hypercast join` as a separate process.
    pub in_daemon: bool,
    /// A surface's window is this quantile of the delays of its outcomes so far.
    pub quantile: f64,
    /// The shortest window, in seconds.
    pub min_window_s: u64,
    /// The longest window, in seconds.
    pub max_window_s: u64,
    /// The window until enough delays are known, in seconds.
    pub first_window_s: u64,
    /// Time after an example in which a late outcome still becomes a correction, in seconds.
    pub correction_s: u64,
    /// The most that an event's time may be ahead of the machine's clock, in seconds; a later one
    /// is refused. What is ahead counts as the time of arrival, so that a fast clock closes
    /// nobody's windows. 0 accepts any time and believes it, as a replay of the future needs.
    pub max_future_s: u64,
    /// The most impressions that wait or can still be corrected. The oldest are released first.
    pub max_impressions: usize,
    /// Time without events after which the machine's clock closes windows, in milliseconds. With 0
    /// only the times of events close them, as a replay of the past needs.
    pub tick_ms: u64,
    /// Events between two saves of the joiner's state, from which a restart continues.
    pub save_every_events: u64,
}

impl Default for JoinSettings {
    fn default() -> Self {
        Self {
            in_daemon: true,
            quantile: 0.99,
            min_window_s: 5,
            max_window_s: 3600,
            first_window_s: 600,
            correction_s: 86_400,
            max_future_s: 300,
            max_impressions: 1_000_000,
            tick_ms: 1000,
            save_every_events: 1_000_000,
        }
    }
}

/// Everything that a joiner needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct JoinerSettings {
    /// The folder for its saved state.
    pub state_dir: PathBuf,
    /// What is saved with that state.
    pub options: JoinerOptions,
    /// The settings of `[features]`.
    pub features: FeatureConfig,
    /// The end of the past from which features start, in milliseconds since the epoch; none for the
    /// whole data set.
    pub until_ms: Option<i64>,
    /// What to do when events are missing.
    pub on_gap: OnGap,
}

/// What determines the output besides the events. They are saved with the state: a joiner that
/// repeats records uses the options of the first time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinerOptions {
    /// The settings of `[join]`.
    pub settings: JoinSettings,
    /// The most history events of an example.
    pub history_len: usize,
    /// The most targets of an example; a larger request becomes several examples.
    pub max_targets: usize,
}

/// The weights that trainers publish while they follow the stream: `[publish]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// The share of the weights in a delta: those that changed most.
    pub share: f64,
    /// Publications after which a weight that changed is sent, however little it changed.
    pub starve_after: u32,
    /// Seconds between publications.
    pub every_s: u64,
    /// Deltas between two snapshots, which is also the most that a new follower applies.
    pub snapshot_every: u32,
    /// Compression level of zstd.
    pub zstd_level: i32,
}

impl Default for PublishSettings {
    fn default() -> Self {
        Self { share: 0.3, starve_after: 5, every_s: 60, snapshot_every: 100, zstd_level: 3 }
    }
}

/// The conditions under which what the FM's trainer learned is published: `[fm_gate]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FmGateSettings {
    /// The newest rows, each predicted before it was learned from, on which a publication is
    /// compared with the FM that serves. 0 publishes everything.
    pub rows: usize,
    /// How far the NE of a task may exceed that of the FM that serves, as a fraction of the latter.
    pub max_ne_increase: f64,
    /// The largest distance of a version's TAEs from those that it serves, relative to their size.
    pub max_tae_drift: f64,
    /// The most standard deviations by which the mean of a numeric feature may move.
    pub max_feature_drift: f64,
}

impl Default for FmGateSettings {
    fn default() -> Self {
        Self { rows: 2048, max_ne_increase: 0.05, max_tae_drift: 1.0, max_feature_drift: 3.0 }
    }
}

/// The limits of NE that trained weights must keep to be published.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NeLimits {
    /// The highest NE by task; of a regression, the highest squared error over that of the mean.
    pub max: BTreeMap<String, f64>,
    /// How far the NE of any binary task may exceed that of what serves, as a fraction of it.
    pub max_increase: Option<f64>,
}

impl FmGateSettings {
    /// The limit of NE, in the form that experts' limits have.
    pub fn ne_limits(&self) -> NeLimits {
        NeLimits { max: BTreeMap::new(), max_increase: Some(self.max_ne_increase) }
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        check_limit("fm_gate.max_ne_increase", self.max_ne_increase)?;
        check_limit("fm_gate.max_tae_drift", self.max_tae_drift)?;
        check_limit("fm_gate.max_feature_drift", self.max_feature_drift)
    }
}

impl NeLimits {
    pub(super) fn validate(&self) -> Result<(), String> {
        self.max.iter().try_for_each(|(task, &ne)| check_limit(&format!("max.{task}"), ne))?;
        self.max_increase.map_or(Ok(()), |increase| check_limit("max_increase", increase))
    }
}

fn check_limit(key: &str, limit: f64) -> Result<(), String> {
    check(limit.is_finite() && limit >= 0.0, key, limit, "a number of at least 0")
}

impl JoinSettings {
    pub(super) fn validate(&self) -> Result<(), String> {
        let fits = (0.5..=1.0).contains(&self.quantile);
        check(fits, "join.quantile", self.quantile, "from 0.5 to 1")?;
        if self.min_window_s > self.max_window_s {
            return Err(format!(
                "join.min_window_s is {}, above join.max_window_s {}",
                self.min_window_s, self.max_window_s
            ));
        }
        Ok(())
    }
}

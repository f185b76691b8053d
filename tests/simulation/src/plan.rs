//! What happens in a simulation: settings, requests and faults with their times. A seed expands to
//! a plan, and only plans are run. A plan that shows a fault is kept as a file, because unlike its
//! seed it means the same when the code that draws plans changes.

use hypercast_core::hash::mix_parts;
use hypercast_stream::streams::Topic;
use serde::{Deserialize, Serialize};

use crate::{
    disk::NameOrder,
    host::{DiskFault, DiskUse},
    publications,
    pushes::{daemon_of, expert_of},
};

/// A run from its first request to its rest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Chance during the run is a function of it.
    pub seed: u64,
    /// Where streams are.
    pub layout: Layout,
    /// The numbers of the requests that callers send; what is in one depends on the seed.
    pub requests: Vec<u32>,
    /// The numbers of the pushes that teams send to the daemons with experts; as with requests.
    #[serde(default)]
    pub pushes: Vec<u32>,
    /// How the host is configured.
    pub settings: PlanSettings,
    /// What breaks.
    #[serde(default)]
    pub faults: Vec<PlannedFault>,
}

/// Where streams are, and with that how many machines there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// In a directory of one machine, on which all processes run.
    Directory,
    /// On a server; each process has a machine of its own.
    Server,
}

/// The configuration of the processes and of those who call them. The limits are small, so that a
/// run meets each of them often.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSettings {
    /// How long callers send requests.
    pub duration_s: u64,
    /// Whether the daemon joins; else a process of its own does.
    pub join_in_daemon: bool,
    /// The size of a segment.
    pub segment_bytes: u64,
    /// Record ids that a stream remembers.
    pub remembered_ids: usize,
    /// The shortest window of the joiner.
    pub min_window_s: u64,
    /// The longest window of the joiner.
    pub max_window_s: u64,
    /// The time between two ticks.
    pub tick_ms: u64,
    /// Events between two saves of a state.
    pub save_every_events: u64,
    /// Whether joiners stop where events are missing, until the operator decides.
    #[serde(default)]
    pub stops_at_gaps: bool,
    /// How far callers' clocks are ahead at most; they are behind as far.
    pub callers_ahead_ms: i64,
    /// How far the clocks of the daemon's machine, the joiner's and the server's are ahead.
    pub machines_ahead_ms: [i64; 3],
    /// How the trainer and the logging tier are configured.
    #[serde(default)]
    pub tiers: TierSettings,
}

/// The configuration of those who follow `joined`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierSettings {
    /// Requests that the trainer learns from together.
    pub batch_requests: usize,
    /// Requests between two saves of the trainer.
    pub save_every_requests: u64,
    /// The time between two publications.
    pub publish_every_s: u64,
    /// Rows by which publications are judged; 0 publishes everything.
    pub gate_rows: usize,
    /// Rows of a file of the logs.
    pub rows_per_file: usize,
    /// The time after which a file of the logs ends.
    pub file_seconds: u64,
}

impl Default for TierSettings {
    fn default() -> TierSettings {
        TierSettings {
            batch_requests: 4,
            save_every_requests: 10,
            publish_every_s: 10,
            gate_rows: 0,
            rows_per_file: 20,
            file_seconds: 30,
        }
    }
}

impl TierSettings {
    fn of(seed: u64) -> TierSettings {
        let mut draw = Draw::new(seed, 3);
        TierSettings {
            batch_requests: draw.one_of(&[1, 4, 16]),
            save_every_requests: draw.one_of(&[5, 20, 60]),
            publish_every_s: draw.one_of(&[5, 20, 60]),
            gate_rows: draw.one_of(&[0, 30]),
            rows_per_file: draw.one_of(&[10, 40, 1000]),
            file_seconds: draw.one_of(&[10, 60, 300]),
        }
    }
}

/// Something that breaks, where and when.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedFault {
    /// Since the beginning.
    pub at_ms: u64,
    /// The process that it hits.
    pub on: Role,
    /// What happens to it.
    pub kind: FaultKind,
}

/// A process of the installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Receives events and follows outcomes; it joins too if the settings say so.
    Daemon,
    /// `hypercast join`.
    Joiner,
    /// A second joiner that somebody starts by mistake.
    SecondJoiner,
    /// `hypercast train fm --follow`.
    Trainer,
    /// `hypercast materialise --follow`.
    LoggingTier,
    /// A daemon with experts; it runs if something is pushed to it.
    ExpertDaemon,
    /// Another one with other experts.
    SecondExpertDaemon,
    /// `hypercast train expert --follow`, on the machine of the logging tier.
    ExpertTrainer,
}

/// All processes, in the order of their numbers.
pub const ROLES: [Role; 8] = [
    Role::Daemon,
    Role::Joiner,
    Role::SecondJoiner,
    Role::Trainer,
    Role::LoggingTier,
    Role::ExpertDaemon,
    Role::SecondExpertDaemon,
    Role::ExpertTrainer,
];

/// What a fault does.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Something on the disk, after some operations.
    Disk {
        /// What happens to the operation.
        fault: DiskFault,
        /// The operations that it spares.
        spared: u32,
        /// The operations that it hits.
        hits: u32,
    },
    /// The process is stopped in order, and started again.
    Stop,
    /// The wall clock of its machine jumps.
    ClockJump {
        /// Negative for back.
        by_ms: i64,
    },
    /// The server cannot be reached.
    Partition {
        /// How long.
        for_ms: u64,
    },
    /// Requests to the server are lost on the way there.
    LostRequests {
        /// How many.
        count: u32,
    },
    /// Appends are stored, but the answers are lost.
    LostAnswers {
        /// How many.
        count: u32,
    },
    /// The server restarts without the last records of a stream: it had not synced them.
    LostTail {
        /// Of which stream.
        #[serde(default)]
        of: LosingStream,
        /// How many.
        count: u32,
    },
    /// The server loses records inside of a stream.
    LostInside {
        /// Of which stream.
        #[serde(default)]
        of: LosingStream,
        /// How many, one behind the other.
        count: u32,
    },
    /// A bit of a file flips while the process is down. An operator does what the error says.
    BitRot {
        /// Which file.
        file: RottenFile,
    },
    /// The process's state is put back to what it was before, as from a backup.
    RestoredState {
        /// How long before.
        age_ms: u64,
    },
    /// An event comes that only a later version of the host knows.
    LaterEvent,
    /// A decision about versions comes that only a later version of the host knows.
    LaterDecision,
    /// An earlier version of the host decides about versions.
    EarlierDecision,
    /// The process is stopped in order, and its states are those of an earlier version: it is
    /// installed anew.
    EarlierRelease,
    /// A second joiner runs beside the first.
    SecondJoiner {
        /// How long.
        for_ms: u64,
    },
}

impl FaultKind {
    /// Its name, for the report.
    pub fn name(&self) -> &'static str {
        match self {
            FaultKind::Disk { fault: DiskFault::Kill, .. } => "kill",
            FaultKind::Disk { fault: DiskFault::PowerCut(NameOrder::Journal), .. } => {
                "power cut, journal"
            }
            FaultKind::Disk { fault: DiskFault::PowerCut(NameOrder::Any), .. } => {
                "power cut, names lost"
            }
            FaultKind::Disk { fault: DiskFault::Bad(DiskUse::Read), .. } => "bad read",
            FaultKind::Disk { fault: DiskFault::Bad(DiskUse::Write), .. } => "bad write",
            FaultKind::Disk { fault: DiskFault::Bad(DiskUse::Sync), .. } => "bad sync",
            FaultKind::Disk { fault: DiskFault::Bad(DiskUse::Other), .. } => "bad folder",
            FaultKind::Disk { fault: DiskFault::Full, .. } => "full disk",
            FaultKind::Stop => "stop",
            FaultKind::ClockJump { .. } => "clock jump",
            FaultKind::Partition { .. } => "partition",
            FaultKind::LostRequests { .. } => "lost requests",
            FaultKind::LostAnswers { .. } => "lost answers",
            FaultKind::LostTail { of: LosingStream::Events, .. } => "lost tail, events",
            FaultKind::LostTail { of: LosingStream::Joined, .. } => "lost tail, joined",
            FaultKind::LostTail { of: LosingStream::Outcomes, .. } => "lost tail, outcomes",
            FaultKind::LostTail { of: LosingStream::Weights, .. } => "lost tail, weights",
            FaultKind::LostTail { of: LosingStream::Versions, .. } => "lost tail, versions",
            FaultKind::LostInside { of: LosingStream::Versions, .. } => "lost inside, versions",
            FaultKind::LostInside { of: LosingStream::Events, .. } => "lost inside, events",
            FaultKind::LostInside { of: LosingStream::Joined, .. } => "lost inside, joined",
            FaultKind::LostInside { of: LosingStream::Outcomes, .. } => "lost inside, outcomes",
            FaultKind::LostInside { of: LosingStream::Weights, .. } => "lost inside, weights",
            FaultKind::BitRot { file: RottenFile::JoinState } => "bit rot, joiner",
            FaultKind::BitRot { file: RottenFile::FeatureState } => "bit rot, features",
            FaultKind::BitRot { file: RottenFile::EventsEnd } => "bit rot, end",
            FaultKind::BitRot { file: RottenFile::EventsSegment } => "bit rot, segment",
            FaultKind::BitRot { file: RottenFile::NewestEvents } => "bit rot, newest",
            FaultKind::BitRot { file: RottenFile::Joined } => "bit rot, joined",
            FaultKind::BitRot { file: RottenFile::Outcomes } => "bit rot, outcomes",
            FaultKind::BitRot { file: RottenFile::Versions } => "bit rot, versions",
            FaultKind::BitRot { file: RottenFile::Weights } => "bit rot, weights",
            FaultKind::RestoredState { .. } => "restored state",
            FaultKind::LaterEvent => "later event",
            FaultKind::LaterDecision => "later decision",
            FaultKind::EarlierDecision => "earlier decision",
            FaultKind::EarlierRelease => "earlier release",
            FaultKind::SecondJoiner { .. } => "second joiner",
        }
    }
}

/// A stream of which the server can lose records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LosingStream {
    /// Events.
    #[default]
    Events,
    /// Joined examples.
    Joined,
    /// Outcomes.
    Outcomes,
    /// Published weights.
    Weights,
    /// Decisions about versions, until they are restored.
    Versions,
}

impl LosingStream {
    /// The stream as the engine names it.
    pub fn topic(self) -> Topic {
        match self {
            LosingStream::Events => Topic::events(),
            LosingStream::Joined => Topic::joined(),
            LosingStream::Outcomes => Topic::outcomes(),
            LosingStream::Weights => publications::topic(),
            LosingStream::Versions => Topic::versions(),
        }
    }
}

/// A file whose damage is told. But for segments, a process can do without it if it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RottenFile {
    /// The joiner's state.
    JoinState,
    /// The state of the daemon's features.
    FeatureState,
    /// The end of the stream of events in a directory.
    EventsEnd,
    /// A segment of it that is full. As all that follow it is restored from a copy instead.
    EventsSegment,
    /// The segment of events that is written to.
    NewestEvents,
    /// Any segment of the joined examples in a directory.
    Joined,
    /// The same of outcomes.
    Outcomes,
    /// The same of decisions about versions.
    Versions,
    /// The same of published weights.
    Weights,
}

/// Numbers drawn one after the other from a seed.
#[derive(Debug, Clone)]
pub struct Draw {
    seed: u64,
    drawn: u64,
}

impl Draw {
    /// The numbers of a seed and a purpose.
    pub fn new(seed: u64, purpose: u64) -> Draw {
        Draw { seed: mix_parts(&[seed, purpose]), drawn: 0 }
    }

    /// The next number below a bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        mix_parts(&[self.seed, self.drawn]) % bound.max(1)
    }

    /// True in so many of 100 cases.
    pub fn percent(&mut self, cases: u64) -> bool {
        self.below(100) < cases
    }

    /// One of some values.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// A number as far from 0 as `most`, with either sign.
    pub fn around(&mut self, most: i64) -> i64 {
        self.below(2 * most.unsigned_abs() + 1) as i64 - most
    }
}

/// The stream that loses records: mostly the events, of which all else is made.
fn losing(draw: &mut Draw) -> LosingStream {
    let of = draw.one_of(&[
        LosingStream::Events,
        LosingStream::Events,
        LosingStream::Events,
        LosingStream::Joined,
        LosingStream::Outcomes,
        LosingStream::Weights,
    ]);
    if of == LosingStream::Weights && draw.percent(60) { LosingStream::Versions } else { of }
}

/// A day, by which clocks jump at most.
const DAY_MS: i64 = 86_400_000;

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Plan {
        let mut draw = Draw::new(seed, 1);
        let layout = draw.one_of(&[Layout::Directory, Layout::Server]);
        let ahead = draw.one_of(&[0, 0, 500, 5000, 60_000]);
        let settings = PlanSettings {
            duration_s: draw.one_of(&[60, 300, 900]),
            join_in_daemon: draw.percent(50),
            segment_bytes: draw.one_of(&[500, 3000, 20_000]),
            remembered_ids: draw.one_of(&[20, 100, 1000]),
            min_window_s: draw.one_of(&[1, 5, 20]),
            max_window_s: draw.one_of(&[30, 120, 300]),
            tick_ms: draw.one_of(&[500, 1000, 5000]),
            save_every_events: draw.one_of(&[10, 50, 200]),
            stops_at_gaps: draw.percent(50),
            callers_ahead_ms: draw.one_of(&[0, 1000, 30_000]),
            machines_ahead_ms: [(); 3].map(|()| draw.around(ahead)),
            tiers: TierSettings::of(seed),
        };
        let requests = (0..draw.one_of(&[20, 60, 150])).collect();
        let mut pushed = Draw::new(seed, 7);
        let pushes = (0..pushed.one_of(&[0, 2, 4, 6])).collect();
        let mut plan = Plan { seed, layout, requests, pushes, settings, faults: Vec::new() };
        // Each run has some kinds of faults: with all of them at once few would come far.
        let kinds: Vec<u64> = (0..1 + draw.below(3)).map(|_| draw.below(21)).collect();
        for _ in 0..draw.one_of(&[0, 2, 5, 9]) {
            let kind = draw.one_of(&kinds);
            plan.faults.extend(plan.fault(kind, &mut draw));
        }
        plan.faults.sort_by_key(|fault| fault.at_ms);
        // A state of an earlier version says neither by which record to know a stream again, nor
        // by which rules later records were joined: it is as good as it was when it was left. And
        // the events alone do not tell when a later version took it over, and set windows anew.
        let goes_back = |fault: &PlannedFault| {
            matches!(
                fault.kind,
                FaultKind::LostTail { .. }
                    | FaultKind::LostInside { .. }
                    | FaultKind::RestoredState { .. }
                    | FaultKind::SecondJoiner { .. }
                    | FaultKind::BitRot { file: RottenFile::JoinState }
            )
        };
        if plan.faults.iter().any(goes_back) {
            plan.faults.retain(|fault| !matches!(fault.kind, FaultKind::EarlierRelease));
        }
        plan
    }

    fn fault(&self, kind: u64, draw: &mut Draw) -> Option<PlannedFault> {
        let at_ms = draw.below(self.settings.duration_s * 1000);
        let apart = !self.settings.join_in_daemon;
        let on = match draw.below(10) {
            0 | 1 => Role::Trainer,
            2 => Role::LoggingTier,
            3 => Role::ExpertTrainer,
            4..=6 if apart => Role::Joiner,
            _ => Role::Daemon,
        };
        let on = match self.pushes.is_empty() || draw.percent(65) {
            true => on,
            false => daemon_of(draw.one_of(&self.pushes)),
        };
        // Daemons with experts touch their disks seldom.
        let spared = draw.below(if expert_of(on).is_some() { 12 } else { 60 }) as u32;
        let disk = |fault, hits| FaultKind::Disk { fault, spared, hits };
        let is_server = self.layout == Layout::Server;
        let kind = match kind {
            0 | 1 => disk(DiskFault::Kill, 1),
            2 => disk(DiskFault::PowerCut(NameOrder::Journal), 1),
            3 => disk(DiskFault::PowerCut(NameOrder::Any), 1),
            4 => {
                let kinds = [DiskUse::Read, DiskUse::Write, DiskUse::Sync, DiskUse::Other];
                disk(DiskFault::Bad(draw.one_of(&kinds)), 1 + draw.below(3) as u32)
            }
            5 => disk(DiskFault::Full, 1 + draw.below(20) as u32),
            6 => FaultKind::Stop,
            7 => {
                let most = draw.one_of(&[2000, 60_000, 3_600_000, DAY_MS]);
                FaultKind::ClockJump { by_ms: draw.around(most) }
            }
            8 if is_server => FaultKind::Partition { for_ms: draw.below(90_000) },
            9 if is_server => FaultKind::LostRequests { count: 1 + draw.below(4) as u32 },
            10 if is_server => FaultKind::LostAnswers { count: 1 + draw.below(4) as u32 },
            12 => {
                let files = [
                    RottenFile::JoinState,
                    RottenFile::FeatureState,
                    RottenFile::EventsEnd,
                    RottenFile::EventsSegment,
                ];
                FaultKind::BitRot { file: draw.one_of(&files) }
            }
            13 => FaultKind::RestoredState { age_ms: 1 + draw.below(120_000) },
            14 => FaultKind::LaterEvent,
            15 => FaultKind::LaterDecision,
            16 if is_server => {
                FaultKind::LostTail { of: losing(draw), count: 1 + draw.below(8) as u32 }
            }
            17 if is_server => {
                FaultKind::LostInside { of: losing(draw), count: 1 + draw.below(4) as u32 }
            }
            18 if !is_server => {
                let files = [
                    RottenFile::EventsSegment,
                    RottenFile::NewestEvents,
                    RottenFile::Joined,
                    RottenFile::Outcomes,
                    RottenFile::Versions,
                    RottenFile::Weights,
                ];
                FaultKind::BitRot { file: draw.one_of(&files) }
            }
            19 => FaultKind::EarlierRelease,
            20 => FaultKind::EarlierDecision,
            11 if apart => FaultKind::SecondJoiner { for_ms: draw.below(60_000) },
            _ => return None,
        };
        let on = match kind {
            FaultKind::SecondJoiner { .. } => Role::SecondJoiner,
            FaultKind::BitRot { file: RottenFile::JoinState | RottenFile::Joined } if apart => {
                Role::Joiner
            }
            FaultKind::BitRot { file: RottenFile::Weights } => Role::Trainer,
            FaultKind::EarlierRelease if on == Role::Trainer => Role::Daemon,
            // Who reads them is down then, and may have read some without a save.
            FaultKind::LostTail { of: LosingStream::Joined, .. }
            | FaultKind::LostInside { of: LosingStream::Joined, .. } => {
                draw.one_of(&[Role::Trainer, Role::LoggingTier])
            }
            FaultKind::LostTail { .. } | FaultKind::LostInside { .. } if apart => Role::Joiner,
            FaultKind::LostTail { .. } | FaultKind::LostInside { .. } => Role::Daemon,
            FaultKind::BitRot { .. } => Role::Daemon,
            _ => on,
        };
        Some(PlannedFault { at_ms, on, kind })
    }
}

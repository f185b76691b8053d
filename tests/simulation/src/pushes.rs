//! Pushes of experts' versions: what a team signs and sends, and how good the version turns out.
//! All of it is a function of the plan's seed and the number of the push.

use std::sync::OnceLock;

use hypercast_config::{StopAfter, sha256};
use hypercast_core::hash::mix_parts;
use hypercast_expert::wasm::contract;
use hypercast_serve::rollout::{PolicyOverrides, Push, PushManifest, SecretKey};

use crate::{
    host::EPOCH_MS,
    plan::{Draw, Plan, Role},
};

/// How a version turns out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushedKind {
    /// It does what it should.
    Good,
    /// It cannot be loaded.
    Unloadable,
    /// It faults for every second request from its first one on.
    Faulty,
    /// It does so only where users see its answers.
    FaultyAsCanary,
    /// It does so only once it answers all users.
    FaultyForAll,
    /// Its own `evaluate` is against it.
    Judged,
    /// Its own `evaluate` holds it for a while.
    Held,
}

/// A push, as its team sends it.
#[derive(Debug, Clone)]
pub struct PushCall {
    /// When it is sent first, since the beginning.
    pub at_ms: u64,
    /// The daemon that it is sent to.
    pub to: Role,
    /// The expert.
    pub name: &'static str,
    /// Its version.
    pub version: String,
    /// When it was signed, by the team's clock.
    pub created_ms: i64,
    /// The body of the request.
    pub body: Vec<u8>,
    /// Whether the team sends it again although it was accepted, and how much later.
    pub again_after_ms: Option<u64>,
}

/// The key of all teams.
pub fn key() -> &'static SecretKey {
    static KEY: OnceLock<SecretKey> = OnceLock::new();
    KEY.get_or_init(|| SecretKey::generate().expect("the system gives random bytes"))
}

/// The expert that a daemon rolls out; its surface has the same name.
pub fn expert_of(role: Role) -> Option<&'static str> {
    match role {
        Role::ExpertDaemon => Some("feed"),
        Role::SecondExpertDaemon => Some("search"),
        _ => None,
    }
}

/// The daemon that a push is sent to.
pub fn daemon_of(number: u32) -> Role {
    if number.is_multiple_of(2) { Role::ExpertDaemon } else { Role::SecondExpertDaemon }
}

/// How a version of an expert turns out.
pub fn kind_of(seed: u64, name: &str, version: &str) -> PushedKind {
    let name = name.bytes().chain(version.bytes());
    let choice = name.fold(seed, |hash, byte| mix_parts(&[hash, byte.into()]));
    match choice % 12 {
        0 => PushedKind::Unloadable,
        1 => PushedKind::Faulty,
        2 => PushedKind::FaultyAsCanary,
        3 => PushedKind::FaultyForAll,
        4 => PushedKind::Judged,
        5 => PushedKind::Held,
        _ => PushedKind::Good,
    }
}

/// The pushes of a plan.
pub fn calls(plan: &Plan) -> Vec<PushCall> {
    plan.pushes.iter().map(|&number| call(plan, number)).collect()
}

fn call(plan: &Plan, number: u32) -> PushCall {
    let mut draw = Draw::new(plan.seed, 2_000_000 + u64::from(number));
    let at_ms = draw.below(plan.settings.duration_s * 800);
    let (to, version) = (daemon_of(number), format!("{}.0.0", number + 1));
    let name = expert_of(to).expect("it is a daemon with experts");
    let created_ms = EPOCH_MS + at_ms as i64 + draw.around(plan.settings.callers_ahead_ms);
    let component = format!("the plugin of {name} {version}").into_bytes();
    let parameters = format!("the parameters of {name} {version}").into_bytes();
    let waits = draw.percent(20).then(|| draw.one_of(&[StopAfter::Shadow, StopAfter::Canary]));
    let manifest = PushManifest {
        name: name.to_owned(),
        version: version.clone(),
        contract: contract::VERSION.to_owned(),
        surfaces: vec![name.to_owned()],
        fm: None,
        component: sha256(&component),
        parameters: Some(sha256(&parameters)),
        created_ms,
        audience: None,
        expires_ms: draw.percent(20).then(|| created_ms + draw.below(600_000) as i64),
        policy: PolicyOverrides { stop_after: waits, ..PolicyOverrides::default() },
    };
    let push = Push {
        signed: key().sign(&manifest),
        wishes: PolicyOverrides::default(),
        component: &component,
        parameters: Some(&parameters),
    };
    let again_after_ms = draw.percent(30).then(|| draw.below(60_000));
    PushCall { at_ms, to, name, version, created_ms, body: push.encode(), again_after_ms }
}

//! The registry under random decisions and two writers, and the split of users.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use hypercast_config::Config;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

use super::*;
use crate::error::{Error, Result};
use crate::streams::tests::holes::holed;
use crate::streams::{MemoryEngine, Record, StreamEngine, Topic};

fn fm(version: &str, tae_dim: usize) -> FmVersion {
    FmVersion {
        version: version.into(),
        state: VersionState::Training,
        parent: None,
        from_checkpoint: None,
        schema: "a".into(),
        earlier_schemas: Vec::new(),
        columns: Vec::new(),
        tae_dim,
        one_stage_flops: None,
        created_ms: 1,
        trained_ms: 0,
        weights: WeightsLocation::Published,
    }
}

fn expert(name: &str, version: &str, fm: &str, surfaces: &[&str]) -> ExpertVersion {
    ExpertVersion {
        name: name.into(),
        version: version.into(),
        state: VersionState::Training,
        parent: None,
        plugin: "plugin.wasm".into(),
        plugin_hash: "1".into(),
        sha256: None,
        plugin_version: "0.1.0".into(),
        accepts_fm: ">=1, <3".into(),
        fm: fm.into(),
        schema: "a".into(),
        earlier_schemas: Vec::new(),
        columns: None,
        tae_dim: 32,
        flops: None,
        without_tae: false,
        surfaces: surfaces.iter().map(|surface| surface.to_string()).collect(),
        created_ms: 1,
        trained_ms: 0,
        weights: WeightsLocation::Published,
    }
}

fn register_fm(engine: &dyn StreamEngine, fm: &FmVersion) -> Result<()> {
    RegistryClient::new(engine).decide(|registry| registry.register_fm(fm)).map(drop)
}

fn register_expert(engine: &dyn StreamEngine, expert: &ExpertVersion) -> Result<()> {
    RegistryClient::new(engine).decide(|registry| registry.register_expert(expert)).map(drop)
}

fn promotion(name: &str, version: &str, share: f64) -> Promotion {
    Promotion { name: name.into(), version: version.into(), share, replace: false }
}

/// A registry in memory.
#[derive(Default)]
struct Desk {
    engine: Arc<MemoryEngine>,
}

impl Desk {
    /// The number of decisions so far.
    fn decisions(&self) -> u64 {
        self.engine.span(&Topic::versions()).unwrap().end
    }

    fn wish(&self, wish: impl Fn(&Registry) -> Result<Vec<Change>>) -> Result<Registry> {
        RegistryClient::new(&*self.engine).decide(wish)
    }

    fn well(&self, wish: impl Fn(&Registry) -> Result<Vec<Change>>) -> Registry {
        self.wish(wish).unwrap()
    }

    fn refused(&self, word: &str, wish: impl Fn(&Registry) -> Result<Vec<Change>>) {
        let before = self.decisions();
        let error = self.wish(wish).unwrap_err().to_string();
        assert!(error.starts_with("refused: ") && error.contains(word), "{error}");
        assert_eq!(self.decisions(), before, "nothing was appended");
    }

    /// FM 1.0.0 active, and expert feed 1.0.0 and 2.0.0 on it, the first of which answers.
    fn with_feed() -> Self {
        let desk = Self::default();
        register_fm(&*desk.engine, &fm("1.0.0", 32)).unwrap();
        desk.well(|r| r.promote_fm("1.0.0"));
        for version in ["1.0.0", "2.0.0"] {
            register_expert(&*desk.engine, &expert("feed", version, "1.0.0", &["feed"])).unwrap();
        }
        desk.well(|r| r.promote_expert(&promotion("feed", "1.0.0", 1.0)));
        desk
    }
}

#[test]
fn registering_again_changes_nothing_and_other_properties_need_another_version() {
    let desk = Desk::default();
    register_fm(&*desk.engine, &fm("1.0.0", 32)).unwrap();
    register_fm(&*desk.engine, &FmVersion { created_ms: 99, ..fm("1.0.0", 32) }).unwrap();
    assert_eq!(desk.decisions(), 1);
    desk.refused("TAE width", |r| r.register_fm(&fm("1.0.0", 64)));
    desk.refused("semver", |r| r.register_fm(&fm("one", 32)));
    let mut changed = expert("feed", "1.0.0", "1.0.0", &["feed"]);
    register_expert(&*desk.engine, &changed).unwrap();
    register_expert(&*desk.engine, &changed).unwrap();
    assert_eq!(desk.decisions(), 2);
    changed.plugin_hash = "2".into();
    desk.refused("plugin", |r| r.register_expert(&changed));
    desk.refused("no surface", |r| r.register_expert(&expert("x", "1.0.0", "1.0.0", &[])));
}

#[test]
fn a_new_version_stays_within_its_share_of_flops() {
    let desk = Desk::default();
    let of_size = |size| FmVersion { one_stage_flops: size, ..fm("1.0.0", 32) };
    let registry = desk.well(|r| r.register_fm(&of_size(Some(1000))));
    let mut config = Config::default();
    let costs = |version: &str, flops| ExpertVersion {
        flops: Some(flops),
        ..expert("feed", version, "1.0.0", &["feed"])
    };
    registry.check_flops_share(&costs("1.0.0", 400), &config).unwrap();
    let more = costs("1.0.0", 401);
    let said = registry.check_flops_share(&more, &config).unwrap_err().to_string();
    for part in [
        "expert `feed`: its network takes 401 FLOPs",
        "40.1 % of the 1000",
        "max_flops_share",
        "author",
        "operators",
    ] {
        assert!(said.contains(part), "{said} lacks {part}");
    }
    config.plugin_limits.surface_flops_share.insert("feed".into(), 0.5);
    registry.check_flops_share(&more, &config).unwrap();
    // Whatever a later configuration says.
    let registry = desk.well(|r| r.register_expert(&more));
    registry.check_flops_share(&more, &Config::default()).unwrap();
    assert_eq!(registry.flops_share(&more).unwrap().share(), 0.401);
    let other = |plugin_hash: &str, surfaces: &[&str]| ExpertVersion {
        flops: Some(401),
        plugin_hash: plugin_hash.into(),
        ..expert("feed", "1.1.0", "1.0.0", surfaces)
    };
    // Its component comes with other parameters, and nothing else does.
    registry.check_flops_share(&other("1", &["feed"]), &Config::default()).unwrap();
    for new in [other("2", &["feed"]), other("1", &["feed", "search"])] {
        assert!(registry.check_flops_share(&new, &Config::default()).is_err());
    }
    let registry = desk.well(|r| r.retire_expert("feed", "1.0.0", false));
    assert!(registry.check_flops_share(&other("1", &["feed"]), &Config::default()).is_err());
    // Those of before have no figures.
    let unnoted = ExpertVersion { flops: None, ..costs("2.0.0", 0) };
    registry.check_flops_share(&unnoted, &Config::default()).unwrap();
    assert_eq!(registry.flops_share(&unnoted), None);
    let desk = Desk::default();
    let registry = desk.well(|r| r.register_fm(&of_size(None)));
    registry.check_flops_share(&more, &Config::default()).unwrap();
}

#[test]
fn what_the_configuration_serves_is_registered_whatever_it_costs() {
    let desk = Desk::default();
    let of_size = FmVersion { one_stage_flops: Some(1000), ..fm("1.0.0", 32) };
    let registry = desk.well(|r| r.register_fm(&of_size));
    let dir = tempfile::tempdir().unwrap();
    let plugin = dir.path().join("plugin.wasm");
    std::fs::write(&plugin, "a component").unwrap();
    let mut config = Config::default();
    config.paths.experts = dir.path().into();
    let text = format!("name = 'feed'\nplugin = {plugin:?}\nsurfaces = ['feed']");
    config.experts = vec![toml::from_str(&text).unwrap()];
    let costs = |plugin_hash: String, surfaces: &[&str]| ExpertVersion {
        flops: Some(401),
        plugin_hash,
        ..expert("feed", "1.0.0", "1.0.0", surfaces)
    };
    let own = costs(content_hash(b"a component"), &["feed"]);
    assert!(registry.check_flops_share(&own, &config).is_err(), "it is not trained yet");
    let parameters = config.parameters(&config.experts[0]);
    std::fs::create_dir(parameters.parent().unwrap()).unwrap();
    std::fs::write(parameters, "").unwrap();
    registry.check_flops_share(&own, &config).unwrap();
    for other in [costs("1".into(), &["feed"]), costs(own.plugin_hash.clone(), &["search"])] {
        assert!(registry.check_flops_share(&other, &config).is_err());
    }
    // From then on the registry says what it is.
    let registry = desk.well(|r| r.register_expert(&expert("feed", "0.1.0", "1.0.0", &["feed"])));
    assert!(registry.check_flops_share(&own, &config).is_err());
}

#[test]
fn the_files_that_a_version_keeps_are_those_that_were_described() {
    let dir = tempfile::tempdir().unwrap();
    let (built, experts) = (dir.path().join("built.wasm"), dir.path().join("experts"));
    let of = |component: &str| {
        std::fs::write(&built, component).unwrap();
        let component = hypercast_config::sha256(component.as_bytes());
        let sha256 = Some(FileHashes { component, parameters: None });
        ExpertVersion {
            plugin: built.clone(),
            sha256,
            ..expert("feed", "1.0.0", "1.0.0", &["feed"])
        }
    };
    let (first, second) = (of("first"), of("second"));
    assert!(first.keep_files(&experts).is_err(), "it was built again since");
    let kept = second.clone().keep_files(&experts).unwrap();
    assert!(kept.plugin.ends_with("experts/feed/1.0.0/plugin.wasm"), "{:?}", kept.plugin);
    assert_eq!(std::fs::read(&kept.plugin).unwrap(), b"second");
    assert_eq!(second.keep_files(&experts).unwrap(), kept, "once more");
    let said = of("third").keep_files(&experts).unwrap_err().to_string();
    assert!(said.contains("has another plugin.wasm already"), "{said}");
    assert_eq!(std::fs::read(&kept.plugin).unwrap(), b"second");
}

#[test]
fn promotion_is_refused_where_the_pinned_fm_does_not_carry_it() {
    let desk = Desk::default();
    register_expert(&*desk.engine, &expert("feed", "1.0.0", "1.0.0", &["feed"])).unwrap();
    let promote = |r: &Registry| r.promote_expert(&promotion("feed", "1.0.0", 1.0));
    desk.refused("not registered", promote);
    register_fm(&*desk.engine, &fm("1.0.0", 32)).unwrap();
    desk.refused("training; promote that FM first", promote);
    desk.well(|r| r.shadow_fm("1.0.0"));
    desk.refused("shadow; promote that FM first", promote);
    desk.well(|r| r.promote_fm("1.0.0"));
    let registry = desk.well(promote);
    assert_eq!(registry.serving("feed"), Some("feed"));
    // Each other thing that does not fit.
    for (fm, word) in [
        (fm("3.0.0", 32), "accepts FM versions"),
        (fm("2.0.0", 64), "have 64"),
        (FmVersion { schema: "b".into(), ..fm("2.1.0", 32) }, "schemas"),
    ] {
        register_fm(&*desk.engine, &fm).unwrap();
        let expert = expert("feed", "2.0.0", &fm.version, &["feed"]);
        desk.refused(word, |r| r.register_expert(&expert));
    }
    // What was registered before its FM is judged when it is promoted.
    register_expert(&*desk.engine, &expert("feed", "4.0.0", "2.5.0", &["feed"])).unwrap();
    register_fm(&*desk.engine, &fm("2.5.0", 64)).unwrap();
    desk.well(|r| r.promote_fm("2.5.0"));
    desk.refused("have 64", |r| r.promote_expert(&promotion("feed", "4.0.0", 1.0)));
}

#[test]
fn an_expert_fits_an_fm_of_another_schema_that_has_the_columns_it_reads() {
    let desk = Desk::default();
    let columns = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    let has = columns(&["feature `price`", "id `brand`"]);
    register_fm(&*desk.engine, &FmVersion { columns: has, ..fm("1.0.0", 32) }).unwrap();
    let reads = |version: &str, names: &[&str]| ExpertVersion {
        schema: "b".into(),
        columns: Some(columns(names)),
        ..expert("feed", version, "1.0.0", &["feed"])
    };
    register_expert(&*desk.engine, &reads("1.0.0", &[])).unwrap();
    register_expert(&*desk.engine, &reads("1.1.0", &["id `brand`"])).unwrap();
    let much = reads("1.2.0", &["feature `price`", "feature `age`", "id `tag`"]);
    desk.refused("does not have: feature `age`, id `tag`. Its author", |r| {
        r.register_expert(&much)
    });
    let unknown = ExpertVersion { columns: None, ..reads("1.3.0", &[]) };
    desk.refused("different schemas (b and a)", |r| r.register_expert(&unknown));
    let text = serde_json::to_string(&expert("feed", "1.0.0", "1.0.0", &[])).unwrap();
    assert!(!text.contains("columns"), "{text}");
}

#[test]
fn an_fm_is_kept_as_long_as_anything_pins_it() {
    let desk = Desk::with_feed();
    desk.refused("expert feed 1.0.0 (active), expert feed 2.0.0 (training)", |r| {
        r.retire_fm("1.0.0")
    });
    desk.refused("expert feed 1.0.0 (active); retire", |r| r.shadow_fm("1.0.0"));
    register_fm(&*desk.engine, &fm("2.0.0", 32)).unwrap();
    desk.well(|r| r.promote_fm("2.0.0"));
    desk.well(|r| r.pin("feed", "2.0.0", "2.0.0"));
    desk.refused("is active", |r| r.pin("feed", "1.0.0", "2.0.0"));
    desk.well(|r| r.promote_expert(&promotion("feed", "2.0.0", 1.0)));
    desk.refused("expert feed 1.0.0", |r| r.retire_fm("1.0.0"));
    desk.refused("answers 100 %", |r| r.retire_expert("feed", "2.0.0", false));
    desk.well(|r| r.retire_expert("feed", "1.0.0", false));
    let registry = desk.well(|r| r.retire_fm("1.0.0"));
    assert_eq!(registry.live_fms().len(), 1);
    desk.refused("is retired", |r| r.promote_fm("1.0.0"));
    desk.refused("no earlier version", |r| r.roll_back("feed"));
    desk.well(|r| r.retire_expert("feed", "2.0.0", true));
    desk.refused("only active one", |r| r.retire_fm("2.0.0"));
}

#[test]
fn rolling_back_goes_the_way_of_promotions_backwards() {
    let desk = Desk::with_feed();
    desk.well(|r| r.promote_expert(&promotion("feed", "2.0.0", 0.25)));
    let registry = desk.well(|r| r.promote_expert(&promotion("feed", "2.0.0", 1.0)));
    assert_eq!(registry.expert("feed").unwrap().share("2.0.0"), 1.0);
    let shares = |registry: &Registry| {
        let expert = registry.expert("feed").unwrap();
        (expert.share("1.0.0"), expert.share("2.0.0"))
    };
    assert_eq!(shares(&desk.well(|r| r.roll_back("feed"))), (0.75, 0.25));
    assert_eq!(shares(&desk.well(|r| r.roll_back("feed"))), (1.0, 0.0));
    desk.refused("no earlier version", |r| r.roll_back("feed"));
}

#[test]
fn a_surface_has_one_expert_and_another_replaces_it_only_on_request() {
    let desk = Desk::with_feed();
    register_expert(&*desk.engine, &expert("all", "1.0.0", "1.0.0", &["feed", "search"])).unwrap();
    desk.refused("served by expert feed", |r| r.promote_expert(&promotion("all", "1.0.0", 1.0)));
    let taking = Promotion { replace: true, ..promotion("all", "1.0.0", 1.0) };
    let registry = desk.well(|r| r.promote_expert(&taking));
    assert_eq!((registry.serving("feed"), registry.serving("search")), (Some("all"), Some("all")));
    desk.refused("served by expert all", |r| r.roll_back("feed"));
    let back = Promotion { replace: true, ..promotion("feed", "1.0.0", 1.0) };
    desk.refused("also serves surface \"search\"", |r| r.promote_expert(&back));
    desk.refused("must take all users", |r| r.promote_expert(&promotion("feed", "2.0.0", 0.1)));
}

/// Checks the registry's invariants.
fn check(registry: &Registry) {
    let mut surfaces: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, expert) in registry.experts() {
        let sum: f64 = expert.shares.values().sum();
        assert!(expert.shares.is_empty() || (sum - 1.0).abs() < 1e-9, "{name}: {sum}");
        let loaded: BTreeSet<&String> =
            expert.earlier.iter().flat_map(Shares::keys).chain(expert.shares.keys()).collect();
        for version in loaded.into_iter().map(|version| &expert.versions[version]) {
            assert_eq!(version.state, VersionState::Active, "{version:?}");
        }
        for version in expert.versions.values() {
            let fm = registry.fm(&version.fm);
            let alive = |fm: &FmVersion| fm.state != VersionState::Retired && fm.tae_dim == 32;
            match version.state {
                VersionState::Active => {
                    assert!(fm.is_some_and(|fm| alive(fm) && fm.state == VersionState::Active));
                }
                VersionState::Shadow => assert!(fm.is_some_and(alive)),
                VersionState::Training | VersionState::Retired => {}
            }
        }
        for surface in expert.shares.keys().flat_map(|at| &expert.versions[at].surfaces) {
            let other = surfaces.insert(surface, name);
            assert!(other.is_none_or(|other| other == name), "{surface}: {other:?} and {name}");
        }
    }
}

/// A decision on the registry's state.
type Wish = Box<dyn Fn(&Registry) -> Result<Vec<Change>>>;

/// A random decision; most are refused in most states.
fn random_wish(rng: &mut SmallRng) -> Wish {
    let version = *["1.0.0", "1.1.0", "2.0.0", "3.0.0"].choose(rng).unwrap();
    let other = *["1.0.0", "1.1.0", "2.0.0", "3.0.0"].choose(rng).unwrap();
    let name = *["a", "b", "c"].choose(rng).unwrap();
    let places: &[&[&str]] = &[&["feed"], &["search"], &["feed", "search"]];
    let surfaces = *places.choose(rng).unwrap();
    let share = *[0.1, 0.5, 1.0, 1.0, 1.5].choose(rng).unwrap();
    let replace = rng.random_bool(0.5);
    match rng.random_range(0..11) {
        0 => Box::new(move |r| r.register_fm(&fm(version, 32))),
        1 => Box::new(move |r| r.register_fm(&fm(version, 64))),
        2 | 3 => Box::new(move |r| r.register_expert(&expert(name, version, other, surfaces))),
        4 => Box::new(move |r| r.promote_fm(version)),
        5 => Box::new(move |r| r.shadow_fm(version)),
        6 => Box::new(move |r| r.retire_fm(version)),
        7 => Box::new(move |r| r.shadow_expert(name, version)),
        8 => Box::new(move |r| r.retire_expert(name, version, replace)),
        9 => Box::new(move |r| r.roll_back(name)),
        _ => Box::new(move |r| {
            r.promote_expert(&Promotion { replace, ..promotion(name, version, share) })
        }),
    }
}

#[test]
fn no_sequence_of_decisions_breaks_an_invariant_and_the_stream_has_all_of_them() {
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let desk = Desk::default();
        for _ in 0..150 {
            match desk.wish(random_wish(&mut rng)) {
                Ok(registry) => {
                    check(&registry);
                    assert_eq!(RegistryClient::new(&*desk.engine).read().unwrap(), registry);
                    accepted += 1;
                }
                Err(error) if error.kind() == hypercast_core::error::ErrorKind::Refused => {
                    refused += 1
                }
                Err(other) => panic!("seed {seed}: {other}"),
            }
        }
    }
    assert!(accepted > 500 && refused > 500, "{accepted} accepted, {refused} refused");
}

#[test]
fn the_second_of_two_writers_decides_again() {
    let desk = Desk::with_feed();
    let rival = RegistryClient::new(&*desk.engine);
    let interfered = Mutex::new(false);
    // Between its read and its append another writer promotes 2.0.0; then 1.0.0 may go.
    desk.refused("answers 100 %", |r| r.retire_expert("feed", "1.0.0", false));
    let seen = Mutex::new(Vec::new());
    let result = desk.wish(|registry| {
        let expert = registry.expert("feed").unwrap();
        seen.lock().unwrap().push(expert.share("2.0.0"));
        if seen.lock().unwrap().len() == 1
            && !std::mem::replace(&mut *interfered.lock().unwrap(), true)
        {
            rival.decide(|r| r.promote_expert(&promotion("feed", "2.0.0", 0.5))).unwrap();
        }
        registry.retire_expert("feed", "2.0.0", false)
    });
    assert!(result.unwrap_err().to_string().contains("answers 50 %"));
    assert_eq!(*seen.lock().unwrap(), [0.0, 0.5]);
}

#[test]
fn many_writers_at_once_lose_nothing() {
    let desk = Desk::default();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let engine = &*desk.engine;
            scope.spawn(move || {
                for at in 0..25 {
                    register_fm(engine, &fm(&format!("{writer}.{at}.0"), 32)).unwrap();
                }
            });
        }
    });
    let registry = RegistryClient::new(&*desk.engine).read().unwrap();
    assert_eq!(registry.fms().len(), 100);
    assert_eq!(desk.decisions(), 100);
}

#[test]
fn users_keep_their_version_and_are_split_by_share() {
    let shares: Shares = [("1.0.0".to_owned(), 0.7), ("2.0.0".to_owned(), 0.3)].into();
    let of = |user: u64, shares: &Shares| {
        choose_version(shares, user_bucket(user, "feed")).unwrap().to_owned()
    };
    let second = (0..20_000).filter(|user| of(*user, &shares) == "2.0.0").count();
    // Four standard deviations are 260.
    assert!((5_740..=6_260).contains(&second), "{second}");
    let grown: Shares = [("1.0.0".to_owned(), 0.4), ("2.0.0".to_owned(), 0.6)].into();
    for user in 0..2_000 {
        assert_eq!(of(user, &shares), of(user, &shares));
        if of(user, &shares) == "2.0.0" {
            assert_eq!(
                of(user, &grown),
                "2.0.0",
                "users of the newer version keep it as its share grows"
            );
        }
    }
    let elsewhere =
        |user: &u64| choose_version(&shares, user_bucket(*user, "search")).unwrap() == "2.0.0";
    let both = (0..20_000).filter(|user| of(*user, &shares) == "2.0.0" && elsewhere(user)).count();
    assert!((1_600..=2_000).contains(&both), "two tests are independent: {both}");
    assert_eq!(choose_version(&Shares::new(), 0.5), None);
}

/// Appends a record that another version of hypercast may have written.
fn append_record(engine: &dyn StreamEngine, record: &str) {
    let payload = record.as_bytes().to_vec();
    engine.appender(&Topic::versions()).unwrap().append(&[Record { id: 0, payload }]).unwrap();
}

#[test]
fn what_a_newer_version_decided_is_left_out_and_named() {
    let desk = Desk::with_feed();
    let before = desk.decisions();
    append_record(
        &*desk.engine,
        r#"{"at_ms":1,"made_by":"9.1.0","changes":[{"change":"sold","name":"feed"}]}"#,
    );
    // Of a decision with an unknown change, the known ones do not apply either.
    let mixed = r#"{"change":"fm-registered","fm":{}},{"change":"fm-state","version":"1.0.0","state":"retired"}"#;
    append_record(&*desk.engine, &format!(r#"{{"at_ms":1,"changes":[{mixed}]}}"#));
    let known = r#"{"change":"expert-state","name":"feed","version":"2.0.0","state":"active"}"#;
    append_record(&*desk.engine, &format!(r#"{{"at_ms":1,"changes":[{known}]}}"#));
    let registry = RegistryClient::new(&*desk.engine).read().unwrap();
    let unapplied = registry.unapplied().unwrap();
    assert_eq!(unapplied.count, 2);
    let record = format!("record {before}");
    for word in [&record, "sold", "hypercast 9.1.0 wrote it", "install 9.1.0"] {
        assert!(unapplied.first.contains(word), "{word}: {}", unapplied.first);
    }
    assert_eq!(registry.expert_version("feed", "2.0.0").unwrap().state, VersionState::Active);
    assert_eq!(registry.fm("1.0.0").unwrap().state, VersionState::Active);
    // Even a decision that would change nothing is refused, because that may be wrong, too.
    desk.refused("9.1.0", |r| r.promote_expert(&promotion("feed", "2.0.0", 1.0)));
    desk.refused("decides nothing", |_| Ok(Vec::new()));
}

#[test]
fn decisions_that_follow_from_an_unknown_one_and_damaged_records_end_nothing() {
    let desk = Desk::with_feed();
    append_record(&*desk.engine, "{\"at_ms\":1,\"chan");
    let unknown = r#"{"change":"fm-state","version":"7.0.0","state":"active"}"#;
    append_record(&*desk.engine, &format!(r#"{{"at_ms":1,"changes":[{unknown}]}}"#));
    let mut follower = RegistryFollower::new(&*desk.engine).unwrap();
    follower.catch_up(&*desk.engine).unwrap();
    assert_eq!(follower.position(), desk.decisions());
    let unapplied = follower.registry().unapplied().unwrap();
    assert!(unapplied.count == 2 && unapplied.first.contains("damaged"), "{unapplied:?}");
    assert_eq!(follower.registry().serving("feed"), Some("feed"));
}

#[test]
fn decisions_that_the_stream_lost_are_named_and_those_behind_them_apply() {
    let desk = Desk::with_feed();
    desk.well(|r| r.promote_expert(&promotion("feed", "2.0.0", 1.0)));
    let (end, whole) = (desk.decisions(), RegistryClient::new(&*desk.engine).read().unwrap());
    // In the middle, at the beginning and at the end.
    for (hole, promoted) in [(1..2, true), (0..2, true), (end - 1..end, false)] {
        let engine = holed(&desk.engine, &Topic::versions(), std::slice::from_ref(&hole));
        let mut follower = RegistryFollower::new(&engine).unwrap();
        for _ in 0..2 {
            follower.catch_up(&engine).unwrap();
            assert_eq!(follower.position(), end, "{hole:?}");
        }
        let registry = follower.registry();
        let unapplied = registry.unapplied().unwrap();
        assert_eq!(unapplied.count, hole.end - hole.start, "{hole:?}");
        let named = format!("stream versions: the record at position {}", hole.start);
        assert!(unapplied.first.contains(&named), "{}", unapplied.first);
        let share = registry.expert("feed").map_or(0.0, |expert| expert.share("2.0.0"));
        assert_eq!(share == whole.expert("feed").unwrap().share("2.0.0"), promoted, "{hole:?}");
        let refused = RegistryClient::new(&engine).decide(|_| Ok::<_, Error>(Vec::new()));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.starts_with("refused: ") && refused.contains(&named), "{refused}");
        assert!(!follower.poll(&engine, Duration::ZERO).unwrap(), "{hole:?}");
    }
    assert_eq!(desk.decisions(), end, "nothing was appended");
}

#[test]
fn ranges_change_no_hash_of_a_schema() {
    let schema = hypercast_data::simulate::schema(2);
    assert!(!schema.ranges.is_empty());
    assert_eq!(schema_hash(&schema), schema_hash(&schema.layout()));
    let other = hypercast_data::simulate::schema(3);
    assert_ne!(schema_hash(&schema), schema_hash(&other));
}

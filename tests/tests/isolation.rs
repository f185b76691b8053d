//! Guests in the host's own runtime, without a daemon: modules that no compiler would produce,
//! damaged files, usage counters, and resources that plugins share.

use std::{path::Path, sync::OnceLock};

use hypercast_data::schema::Schema;
use hypercast_data::simulate;
use hypercast_expert::{
    Blueprint, CacheConfig, Engine, EngineConfig, Fault, Limits, LoadOptions, Plugin,
    wasm::{Call, LogRate, contract},
};
use hypercast_tests::{
    BuiltGuests, built_guests,
    guests::{Imports, TextGuest, component},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Returns a description that is all zeros: a valid value of the type, but one that breaks the
/// rules.
const ZEROS: &str = "(i32.const 1024)";

/// A description whose name is four bytes at 2048.
const NAMED: &str = "(data (i32.const 1024) \"\\00\\08\\00\\00\\04\\00\\00\\00\")";

/// Names and texts of guests, with a part of the expected error.
fn odd_guests() -> Vec<(&'static str, TextGuest<'static>, &'static str)> {
    let loops = "(func $start (loop $again (br $again))) (start $start)";
    let grows_memory = "(func $start (loop $again (br_if $again (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable) (start $start)";
    let grows_table = "(func $start (loop $again (br_if $again (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1)))) unreachable) (start $start)";
    let recurses = "(func $start (call $start) (call $start)) (start $start)";
    let table = "(memory (export \"memory\") 32) (table $t 1 funcref)";
    let more = |more| TextGuest { more, ..TextGuest::default() };
    let fields = |fields| TextGuest { fields, ..TextGuest::default() };
    let export = |export| TextGuest { export, ..TextGuest::default() };
    vec![
        ("start_spins", more(loops), "`describe` ran past its deadline"),
        ("start_takes_memory", more(grows_memory), "MiB of memory"),
        (
            "start_grows_a_table",
            TextGuest { fields: table, ..more(grows_table) },
            "entries of a table",
        ),
        ("start_recurses", more(recurses), "call stack"),
        ("start_traps", more("(func $start unreachable) (start $start)"), "trapped"),
        (
            "allocator_spins",
            TextGuest { realloc: "(loop $a (br $a)) (i32.const 0)", ..TextGuest::default() },
            "deadline",
        ),
        (
            "allocator_lies",
            TextGuest { realloc: "(i32.const -16)", ..TextGuest::default() },
            "bad output",
        ),
        ("exports_trap", export("unreachable"), "trapped"),
        ("result_beyond_memory", export("(i32.const -256)"), "bad output"),
        ("result_not_aligned", export("(i32.const 1025)"), "bad output"),
        ("nameless", export(ZEROS), "name or version is empty"),
        (
            "text_is_no_text",
            TextGuest {
                more: "(data (i32.const 1024) \"\\00\\08\\00\\00\\04\\00\\00\\00\") (data (i32.const 2048) \"\\ff\\fe\\fd\\fc\")",
                ..export(ZEROS)
            },
            "bad output",
        ),
        (
            "text_without_end",
            TextGuest {
                more: "(data (i32.const 1024) \"\\00\\08\\00\\00\\ff\\ff\\ff\\7f\")",
                ..export(ZEROS)
            },
            "bad output",
        ),
        ("no_task", TextGuest { more: NAMED, ..export(ZEROS) }, "it declares 0 tasks"),
        ("born_too_big", fields("(memory (export \"memory\") 60000)"), "refused"),
        (
            "born_with_a_big_table",
            fields("(memory (export \"memory\") 32) (table 100000000 funcref)"),
            "refused",
        ),
        (
            "many_memories",
            fields("(memory (export \"memory\") 32) (memory 1) (memory 1)"),
            "refused",
        ),
    ]
}

const WASI: Imports<'static> = Imports {
    package: "package wasi:random@0.2.0;\ninterface random { get-random-u64: func() -> u64; }",
    interface: "wasi:random/random@0.2.0",
    import: "(import \"wasi:random/random@0.2.0\" \"get-random-u64\" (func (result i64)))",
};

const UNKNOWN: Imports<'static> = Imports {
    package: "package nobody:knows;\ninterface it { ask: func() -> u32; }",
    interface: "nobody:knows/it",
    import: "(import \"nobody:knows/it\" \"ask\" (func (result i32)))",
};

fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        Engine::new(EngineConfig { instances: 16, ..EngineConfig::default() }).unwrap()
    })
}

fn schema() -> &'static Schema {
    static SCHEMA: OnceLock<Schema> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("data");
        let options = simulate::SimulateOptions {
            into: into.clone(),
            users: 10,
            items: 20,
            requests: 20,
            surfaces: 2,
            seed: 1,
        };
        simulate::simulate(&options).unwrap();
        Schema::load(&into.join("schema.toml")).unwrap()
    })
}

fn options() -> LoadOptions {
    let limits = Limits {
        hook_deadline_ms: 300,
        deadline_ms: 300,
        deadline_max_ms: 300,
        ..Limits::default()
    };
    LoadOptions { limits, tae_dim: 8, fm_version: None, ..LoadOptions::default() }
}

fn load(name: &str, bytes: &[u8]) -> Result<Blueprint, hypercast_expert::Error> {
    Blueprint::new(
        Plugin::from_bytes(engine(), name, bytes, &options().limits)?,
        schema(),
        &options(),
    )
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(format!("{name}.wasm"))).unwrap()
}

/// Ranks ten candidates by fixed predictions, without running the network. Returns the candidates
/// with the bits of their scores.
fn rank(blueprint: &Blueprint) -> Result<Vec<(u32, u32)>, hypercast_expert::ExpertFault> {
    let values: Vec<f32> = (0..10).map(|at| (at * 7 % 10) as f32 / 10.0).collect();
    let predict = |task: &contract::Task| contract::Prediction {
        task: task.name.clone(),
        values: values.clone(),
    };
    let predictions: Vec<_> = blueprint.description.tasks.iter().map(predict).collect();
    let request = contract::RankRequest {
        surface: schema().surfaces[0].clone(),
        user: 1,
        time_ms: 0,
        request: 1,
        seed: 1,
        candidates: (0..10).collect(),
        limit: 10,
    };
    let ranked = blueprint.plugin.rank(&request, &predictions, &[])?;
    Ok(ranked.iter().map(|entry| (entry.candidate, entry.score.to_bits())).collect())
}

#[test]
fn malformed_guests_are_refused_by_name_and_cause() {
    for (name, guest, word) in odd_guests() {
        let error =
            load(name, &component(guest)).err().unwrap_or_else(|| panic!("{name} was accepted"));
        let error = error.to_string();
        assert!(error.contains(word) && error.contains(name), "{name}: `{error}` lacks `{word}`");
    }
}

#[test]
fn imports_beyond_the_contract_are_refused_by_name() {
    for (name, imports) in [("wasi", WASI), ("unknown", UNKNOWN)] {
        let guest = TextGuest { imports: Some(imports), ..TextGuest::default() };
        // Call the import, because an unused one is not part of the component.
        let guest = TextGuest { export: "(drop (call 0)) unreachable", ..guest };
        let error = load(name, &component(guest)).err().unwrap().to_string();
        assert!(
            error.contains(imports.interface) && error.contains("nothing but `log`"),
            "{error}"
        );
    }
}

#[test]
fn damaged_files_do_not_affect_the_host() {
    let Some(BuiltGuests { hostile, .. }) = built_guests("damage") else { return };
    let whole = read(&hostile, "bomb_describe");
    let good = load("good", &read(&hostile, "unsorted")).unwrap();
    let before = rank(&good).unwrap();
    let mut random = SmallRng::seed_from_u64(6);
    for _ in 0..100 {
        let length = random.random_range(0..whole.len());
        assert!(load("truncated", &whole[..length]).is_err(), "{length} bytes of {}", whole.len());
    }
    // A flipped bit may leave a valid component, which is then loaded like any other.
    for at in 0..200 {
        let mut damaged = whole.clone();
        // The first bytes contain the structure, the rest is code. Damage both equally often.
        let place = if at < 100 {
            random.random_range(0..512)
        } else {
            random.random_range(0..whole.len())
        };
        damaged[place] ^= 1 << random.random_range(0..8);
        if let Err(error) = load("flipped", &damaged) {
            assert!(!error.to_string().is_empty(), "byte {place}");
        }
    }
    assert_eq!(rank(&good).unwrap(), before);
}

#[test]
fn a_guest_that_counts_its_calls_always_sees_its_first_call() {
    let Some(BuiltGuests { hostile, .. }) = built_guests("state") else { return };
    let stateful = load("stateful", &read(&hostile, "stateful")).unwrap();
    let first = rank(&stateful).unwrap();
    for _ in 0..20 {
        stateful.plugin.prepare();
        assert_eq!(rank(&stateful).unwrap(), first);
    }
    let again = load("stateful", &read(&hostile, "stateful")).unwrap();
    assert_eq!(rank(&again).unwrap(), first);
}

#[test]
fn the_backtrace_of_a_trap_names_functions() {
    let Some(BuiltGuests { hostile, .. }) = built_guests("backtraces") else { return };
    for guest in ["trap", "spin", "overflow", "bomb"] {
        let fault = rank(&load(guest, &read(&hostile, guest)).unwrap()).unwrap_err();
        let text = fault.backtrace();
        assert!(
            text.contains("hypercast_sdk::") || text.contains(&format!("{guest}::")),
            "{guest}: {text}"
        );
        assert!(!text.contains("_ZN") && !text.contains("17h"), "names are demangled: {text}");
        assert!(!fault.to_string().contains("    in "), "the message has no backtrace");
    }
}

#[test]
fn one_plugin_cannot_use_up_the_instances_of_others() {
    let Some(BuiltGuests { hostile, .. }) = built_guests("instances") else { return };
    let of = |name: &str, instances| {
        let mut options = options();
        options.limits.instances = instances;
        let plugin =
            Plugin::from_bytes(engine(), name, &read(&hostile, "unsorted"), &options.limits)
                .unwrap();
        Blueprint::new(plugin, schema(), &options).unwrap()
    };
    let (one, other) = (of("one", 2), of("other", 2));
    let held: Vec<_> = (0..2).map(|_| one.plugin.instance(Call::Rank).unwrap()).collect();
    let fault = rank(&one).unwrap_err();
    assert!(matches!(fault.cause, Fault::Busy(_)), "{fault}");
    assert!(fault.to_string().contains("all of its 2 instances"), "{fault}");
    assert!(rank(&other).is_ok());
    drop(held);
    for _ in 0..5 {
        assert!(rank(&one).is_ok(), "released instances can be used again");
    }
    one.plugin.prepare();
    assert!(rank(&one).is_ok() && rank(&one).is_ok() && rank(&one).is_ok());
}

#[test]
fn calls_memory_and_log_lines_of_a_plugin_are_counted() {
    let Some(BuiltGuests { hostile, .. }) = built_guests("usage") else { return };
    let mut options = options();
    options.limits.log = LogRate { lines_per_s: 5, bytes_per_s: 1 << 20 };
    let plugin =
        Plugin::from_bytes(engine(), "flood", &read(&hostile, "log_flood"), &options.limits)
            .unwrap();
    let flood = Blueprint::new(plugin, schema(), &options).unwrap();
    assert!(rank(&flood).is_ok());
    let usage = flood.plugin.usage();
    assert_eq!(usage.log_lines + usage.log_lines_dropped, 1000);
    assert!(usage.log_lines <= 10 && usage.log_bytes_dropped > 400_000, "{usage:?}");
    assert_eq!(usage.calls[&Call::Rank].calls, 1);
    assert_eq!(usage.calls[&Call::Describe].calls, 2, "the host compares two instances");
    let bomb = load("bomb", &read(&hostile, "bomb")).unwrap();
    rank(&bomb).unwrap_err();
    // Clearing the instance records its memory.
    bomb.plugin.prepare();
    let high = bomb.plugin.usage().memory_bytes;
    assert!((32 << 20..=64 << 20).contains(&high), "{high}");
}

#[test]
fn compiled_components_are_cached_and_damaged_ones_recompiled() {
    let Some(BuiltGuests { hostile, .. }) = built_guests("the cache") else { return };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("compiled");
    let cache = CacheConfig { folder: folder.clone(), bytes: 64 << 20 };
    let load = || {
        let config =
            EngineConfig { instances: 4, cache: Some(cache.clone()), ..Default::default() };
        let plugin = Plugin::load(
            &Engine::new(config).unwrap(),
            &hostile.join("unsorted.wasm"),
            &options().limits,
        );
        rank(&Blueprint::new(plugin.unwrap(), schema(), &options()).unwrap()).unwrap()
    };
    let kept = || {
        let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|e| e == "cwasm")).collect::<Vec<_>>()
    };
    let first = load();
    let [file] = &kept()[..] else { panic!("one file: {:?}", kept()) };
    let whole = std::fs::read(file).unwrap();
    assert_eq!(load(), first);
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(file, damaged).unwrap();
    assert_eq!(load(), first);
    let repaired = std::fs::read(file).unwrap().len() == whole.len() && kept().len() == 1;
    assert!(repaired, "the file is written again");
}

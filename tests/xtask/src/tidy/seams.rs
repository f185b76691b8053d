//! Code that a simulator runs reaches time, chance and files through `hypercast-core` alone: else a
//! simulated process would read the clock and the disk of the machine that simulates it, and its
//! runs would not repeat.

use anyhow::Result;
use syn::{Item, UseTree};

use super::TidyFinding;
use crate::{
    scan::scan,
    sources::{RustFile, Sources, line, test_lines},
};

/// What runs in `tests/simulation`: files, and folders with `/` at the end.
const SIMULATED: [&str; 47] = [
    "host/core/src/atomic_dir.rs",
    "host/core/src/atomic_file.rs",
    "host/core/src/dir_lock.rs",
    "host/core/src/hash.rs",
    "host/data/src/dataset/",
    "host/data/src/features/",
    "host/data/src/logs/",
    "host/data/src/schema.rs",
    "host/serve/src/request/feature_state.rs",
    "host/serve/src/rollout/accept.rs",
    "host/serve/src/rollout/controller.rs",
    "host/serve/src/rollout/controller/",
    "host/serve/src/rollout/evaluation.rs",
    "host/serve/src/rollout/frame.rs",
    "host/serve/src/rollout/mod.rs",
    "host/serve/src/rollout/policy.rs",
    "host/serve/src/rollout/repository.rs",
    "host/serve/src/rollout/service.rs",
    "host/serve/src/rollout/state.rs",
    "host/serve/src/rollout/stats.rs",
    "host/serve/src/rollout/transitions.rs",
    "host/stream/src/dead_letters/",
    "host/stream/src/events/",
    "host/stream/src/join/",
    "host/stream/src/publish/",
    "host/stream/src/registry/client.rs",
    "host/stream/src/registry/mod.rs",
    "host/stream/src/registry/rules.rs",
    "host/stream/src/registry/state.rs",
    "host/stream/src/streams/cursor.rs",
    "host/stream/src/streams/directory/",
    "host/stream/src/streams/follow.rs",
    "host/stream/src/streams/group_commit.rs",
    "host/stream/src/streams/ids.rs",
    "host/stream/src/streams/mod.rs",
    "host/stream/src/streams/place.rs",
    "host/train/src/eval_window.rs",
    "host/train/src/follow_expert.rs",
    "host/train/src/follow_expert/",
    "host/train/src/follow_fm.rs",
    "host/train/src/follow_fm/",
    "host/train/src/holds.rs",
    "host/train/src/joined_reader.rs",
    "host/train/src/logging.rs",
    "host/train/src/logging/",
    "host/train/src/progress_log.rs",
    "tests/simulation/src/",
];

/// What would reach around a seam.
const REFUSED: [&str; 9] = [
    "Instant::now",
    ".elapsed()",
    "SystemTime",
    "thread::sleep",
    "RandomState",
    "std::fs",
    ".exists()",
    ".is_dir()",
    ".is_file()",
];

/// Only an error, which `disk` returns too.
const ALLOWED: &str = "std::fs::TryLockError";

const REMEDY: &str = "use clock, entropy or disk of hypercast-core";

/// Time, chance and files that simulated code reaches by itself.
pub fn bypassed(_: &Sources, files: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let is_simulated = |path: &str| {
        SIMULATED.into_iter().any(|place| match place.ends_with('/') {
            true => path.starts_with(place),
            false => path == place,
        })
    };
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| !file.is_test || file.path.contains("/simulation/src/"))
    {
        if !is_simulated(file.path) {
            continue;
        }
        let of_tests = test_lines(&file.syntax);
        let mut add = |number: usize, what: &str| {
            if !of_tests.contains(&number) {
                findings.push(TidyFinding {
                    path: file.path.to_owned(),
                    line: number,
                    problem: format!("`{what}` is not simulated"),
                    remedy: REMEDY,
                });
            }
        };
        for (code, number) in scan(file.text).into_iter().zip(1..) {
            let code = code.code.replace(ALLOWED, "");
            if let Some(what) = REFUSED.iter().find(|what| code.contains(**what)) {
                add(number, what);
            }
        }
        for (path, number) in grouped_uses(&file.syntax) {
            let is_refused = path.starts_with("std::fs") && path != ALLOWED;
            if is_refused {
                add(number, &path);
            }
        }
    }
    Ok(findings)
}

/// The full paths of uses within braces, which no line has as a whole.
fn grouped_uses(file: &syn::File) -> Vec<(String, usize)> {
    let mut paths = Vec::new();
    for item in &file.items {
        if let Item::Use(item) = item {
            flatten(&item.tree, String::new(), line(item.use_token.span), false, &mut paths);
        }
    }
    paths
}

fn flatten(
    tree: &UseTree,
    before: String,
    number: usize,
    grouped: bool,
    paths: &mut Vec<(String, usize)>,
) {
    match tree {
        UseTree::Path(path) => {
            flatten(&path.tree, format!("{before}{}::", path.ident), number, grouped, paths);
        }
        UseTree::Group(group) => {
            group.items.iter().for_each(|inner| flatten(inner, before.clone(), number, true, paths))
        }
        UseTree::Name(name) if grouped => paths.push((format!("{before}{}", name.ident), number)),
        UseTree::Rename(name) if grouped => {
            paths.push((format!("{before}{}", name.ident), number));
        }
        UseTree::Glob(_) if grouped => paths.push((before, number)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::places;

    #[test]
    fn ways_around_the_seams_are_found() {
        let code = "use std::{\n    fs::{self, TryLockError},\n    time::Instant,\n};\n\
                    use std::fs::TryLockError;\n\
                    fn f(at: Instant) {\n    at.elapsed();\n    std::fs::read(a); // thread::sleep\n    \
                    std::thread::sleep(b);\n}\n#[cfg(test)]\nmod tests {\n    fn t() {\n        \
                    Instant::now();\n    }\n}\n";
        let files = [
            ("host/stream/src/join/a.rs", code),
            ("host/stream/src/join/tests/a.rs", code),
            ("host/serve/src/a.rs", code),
        ];
        let expected = [1, 7, 8, 9].map(|line| ("host/stream/src/join/a.rs".to_owned(), line));
        assert_eq!(places(bypassed, &files), expected);
    }
}

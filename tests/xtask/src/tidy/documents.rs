//! What documents promise: an explanation of every configuration key, a test of every invariant.

use anyhow::Result;

use super::TidyFinding;
use crate::sources::{RustFile, Sources};

/// The configuration with every key. That it has them all is a test of the configuration's crate.
const CONFIG: &str = "hypercast.toml";

/// The document with the invariants, and their heading.
const ARCHITECTURE: &str = "ARCHITECTURE.md";
const INVARIANTS: &str = "## Invariants";

/// Keys of `hypercast.toml` without a comment on the line before. One comment for several keys
/// would leave it open which it explains.
pub fn config_keys(sources: &Sources, _: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let Some(text) = sources.text(CONFIG) else { return Ok(vec![missing(CONFIG)]) };
    let mut findings = Vec::new();
    let mut is_explained = false;
    for (at, line) in text.lines().enumerate() {
        if let Some(key) = key(line).filter(|_| !is_explained) {
            findings.push(TidyFinding {
                path: CONFIG.to_owned(),
                line: at + 1,
                problem: format!("`{key}` has no explanation"),
                remedy: "write a comment on the line before it",
            });
        }
        is_explained = line.starts_with('#');
    }
    Ok(findings)
}

/// A document, or its section, that is gone: every check of it would pass.
fn missing(path: &str) -> TidyFinding {
    TidyFinding {
        path: path.to_owned(),
        line: 1,
        problem: "there is nothing to check".to_owned(),
        remedy: "write the file, or tell tests/xtask/src/tidy/documents.rs where it is now",
    }
}

/// The key that a line sets.
fn key(line: &str) -> Option<&str> {
    let (key, _) = line.split_once('=')?;
    let is_key = |char: char| char.is_alphanumeric() || matches!(char, '_' | '-' | '.');
    Some(key.trim_end()).filter(|key| !key.is_empty() && key.chars().all(is_key))
}

/// Invariants that name no test, or one that does not exist.
pub fn invariants(sources: &Sources, _: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let text = sources.text(ARCHITECTURE).unwrap_or_default();
    let bullets = bullets(text);
    if bullets.is_empty() {
        return Ok(vec![missing(ARCHITECTURE)]);
    }
    let mut findings = Vec::new();
    for bullet in bullets {
        let named: Vec<(&str, &str)> = tests_named(&bullet.text).collect();
        let mut add = |problem: String, remedy| {
            findings.push(TidyFinding {
                path: ARCHITECTURE.to_owned(),
                line: bullet.line,
                problem,
                remedy,
            });
        };
        if named.is_empty() {
            add(
                "an invariant without a test".to_owned(),
                "name one as `path/to/file.rs::test_name`",
            );
        }
        for (path, test) in named {
            let Some(text) = sources.text(path) else {
                add(format!("`{path}` does not exist"), "name the file that has the test now");
                continue;
            };
            if !has_function(text, test) {
                add(
                    format!("`{path}` has no test `{test}`"),
                    "name the test that holds the invariant",
                );
            }
        }
    }
    Ok(findings)
}

/// An item of a list, with the lines that continue it.
struct Bullet {
    line: usize,
    text: String,
}

/// The items of the section on invariants.
fn bullets(text: &str) -> Vec<Bullet> {
    let mut bullets: Vec<Bullet> = Vec::new();
    let lines = text.lines().enumerate().skip_while(|(_, line)| line.trim_end() != INVARIANTS);
    for (at, line) in lines.skip(1).take_while(|(_, line)| !line.starts_with("## ")) {
        if let Some(first) = line.strip_prefix("- ") {
            bullets.push(Bullet { line: at + 1, text: first.to_owned() });
        } else if let Some(bullet) = bullets.last_mut().filter(|_| line.starts_with(' ')) {
            bullet.text.push(' ');
            bullet.text.push_str(line.trim_start());
        }
    }
    bullets
}

/// Files and functions that a text names as `` `file.rs::function` ``.
fn tests_named(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter_map(|name| name.split_once("::")).filter(|(path, _)| path.ends_with(".rs"))
}

/// Whether a source defines a function, the last part of a path with modules.
fn has_function(text: &str, name: &str) -> bool {
    let name = name.rsplit("::").next().unwrap_or(name);
    text.match_indices("fn ").any(|(at, word)| {
        let rest = &text[at + word.len()..];
        rest.strip_prefix(name).is_some_and(|rest| rest.starts_with(['(', '<']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::places;

    #[test]
    fn keys_without_a_comment_are_found() {
        let bad =
            "# Where models run.\ndevice = \"cpu\"\nseed = 1\n\n# Paths.\n[paths]\nlogs = \"a\"\n";
        let found = places(config_keys, &[("hypercast.toml", bad)]);
        assert_eq!(found, [3, 7].map(|line| ("hypercast.toml".to_owned(), line)));
        let good =
            "# Where.\n# device = 1\ndevice = \"cpu\"\n[a]\n# Users.\nusers = [\n  \"a=b\",\n]\n";
        assert_eq!(places(config_keys, &[("hypercast.toml", good)]), []);
        assert_eq!(places(config_keys, &[]), [("hypercast.toml".to_owned(), 1)]);
    }

    #[test]
    fn invariants_whose_test_is_gone_are_found() {
        let text = "# A\n## Invariants\n\n- **One.** Always\n  (`a/src/b.rs::one_holds`).\n- **Two.**\n\
                    - **Three** `a/src/b.rs::two`, `a/src/c.rs::three`.\n## Glossary\n- Word.\n";
        let source = "#[test]\nfn one_holds() {}\nfn two_more() {}\n";
        let found = places(invariants, &[("ARCHITECTURE.md", text), ("a/src/b.rs", source)]);
        assert_eq!(found, [6, 7, 7].map(|line| ("ARCHITECTURE.md".to_owned(), line)));
        let good = "## Invariants\n- One `b.rs::tests::one_holds`\n";
        assert_eq!(places(invariants, &[("ARCHITECTURE.md", good), ("b.rs", source)]), []);
        let renamed = [("ARCHITECTURE.md", "## Promises\n- One\n")];
        assert_eq!(places(invariants, &renamed), [("ARCHITECTURE.md".to_owned(), 1)]);
    }
}

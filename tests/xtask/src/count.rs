//! `cargo xtask count`: lines of Rust code by folder, so that two revisions can be compared.
//!
//! Counted are lines with code on them. Not counted are blank lines, comments, items under
//! `#[cfg(test)]`, files and folders of tests and benches, and the fuzz targets.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::{
    options::Options,
    process::repository_root,
    scan::scan,
    sources::{RustFile, Sources, test_lines},
};

/// A comment in the first lines of a file that was written by a program.
const GENERATED: &str = "@generated";

/// Lines of one folder.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    files: usize,
    code: usize,
}

/// Prints the counts of the working tree, or of `--rev`.
pub fn run(options: Options) -> Result<bool> {
    let root = repository_root()?;
    let sources = match options.value("rev") {
        Some(revision) => Sources::of_revision(&root, revision)?,
        None => Sources::of_working_tree(&root)?,
    };
    let mut total = Counts::default();
    for (folder, counts) in count(&sources)? {
        println!("{:>7} lines {:>5} files  {folder}", counts.code, counts.files);
        total.code += counts.code;
        total.files += counts.files;
    }
    println!("{:>7} lines {:>5} files  in all", total.code, total.files);
    Ok(true)
}

/// The counts by package and module: the first folder below `src`, or below the package.
fn count(sources: &Sources) -> Result<BTreeMap<String, Counts>> {
    let mut folders: BTreeMap<String, Counts> = BTreeMap::new();
    for file in sources.rust()? {
        let is_generated = file.text.lines().take(5).any(|line| line.contains(GENERATED));
        if !file.is_test && !is_generated {
            let counts = folders.entry(folder(sources, file.path)).or_default();
            counts.files += 1;
            counts.code += code_lines(&file);
        }
    }
    Ok(folders)
}

fn code_lines(file: &RustFile<'_>) -> usize {
    let tests = test_lines(&file.syntax);
    let lines = scan(file.text).into_iter().enumerate();
    lines.filter(|(at, line)| line.has_code && !tests.contains(&(at + 1))).count()
}

/// Where a file is counted: its package, and there `src/NAME` if its source has folders.
fn folder(sources: &Sources, path: &str) -> String {
    let parents = || path.match_indices('/').map(|(at, _)| &path[..at]);
    let has_manifest = |folder: &&str| sources.text(&format!("{folder}/Cargo.toml")).is_some();
    let package = parents().rfind(has_manifest).unwrap_or("");
    let inner = path[package.len()..].trim_start_matches('/');
    let depth = if inner.starts_with("src/") { 2 } else { 1 };
    let parts: Vec<&str> = inner.split('/').collect();
    let kept = &parts[..depth.min(parts.len() - 1)];
    [package, &kept.join("/")]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_alone_is_counted() {
        let text = "//! Docs.\n\nuse a::b; // why\n/* c */\nconst A: &str = \"\n// text\n\n\";\n\
                    #[cfg(test)]\nmod tests {\n    fn d() {}\n}\n";
        let sources = Sources::of(&[
            ("host/Cargo.toml", ""),
            ("host/core/Cargo.toml", ""),
            ("host/core/src/lib.rs", text),
            ("host/core/src/a/b/c.rs", "fn a() {\n}\n"),
            ("host/src/main.rs", "fn main() {}\n"),
            ("host/core/tests/a.rs", "fn a() {}\n"),
            ("host/core/src/tests.rs", "fn a() {}\n"),
            ("tests/src/lib.rs", "fn a() {}\n"),
            ("host/core/src/made.rs", "// @generated\nfn a() {}\n"),
        ]);
        let counts = count(&sources).unwrap();
        let lines: Vec<_> = counts.iter().map(|(name, c)| (name.as_str(), c.code)).collect();
        assert_eq!(lines, [("host/core/src", 4), ("host/core/src/a", 2), ("host/src", 1)]);
    }
}

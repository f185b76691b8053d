//! The text files of the repository, from the working tree or from a revision, and Rust syntax.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context, Result, anyhow, ensure};
use proc_macro2::Span;
use syn::{Attribute, Item, Meta, Token, punctuated::Punctuated, spanned::Spanned, visit::Visit};

use crate::process::git;

/// Endings of the files that are read.
const READ: [&str; 3] = [".rs", ".toml", ".md"];

/// Text files by their path from the root.
#[derive(Debug, Default)]
pub struct Sources(BTreeMap<String, String>);

impl Sources {
    /// The files of the working tree that git knows or would add.
    pub fn of_working_tree(root: &Path) -> Result<Self> {
        let args = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        let listed = String::from_utf8(git(root, &args, "")?)?;
        let mut files = BTreeMap::new();
        for path in listed.split('\0').filter(|path| is_read(path)) {
            let file = root.join(path);
            // Git also lists files that were deleted and are not staged.
            if file.is_file() {
                let text = std::fs::read_to_string(&file)
                    .with_context(|| format!("cannot read {}", file.display()))?;
                files.insert(path.to_owned(), text);
            }
        }
        Ok(Self(files))
    }

    /// The files of a revision.
    pub fn of_revision(root: &Path, revision: &str) -> Result<Self> {
        let args = ["ls-tree", "-r", "-z", "--name-only", "--full-tree", revision];
        let listed = String::from_utf8(git(root, &args, "")?)?;
        let paths: Vec<&str> = listed.split('\0').filter(|path| is_read(path)).collect();
        let asked: String = paths.iter().map(|path| format!("{revision}:{path}\n")).collect();
        let answers = git(root, &["cat-file", "--batch"], &asked)?;
        let mut rest = answers.as_slice();
        let mut files = BTreeMap::new();
        for path in paths {
            // A header `HASH blob SIZE`, the file, a line feed.
            let end = rest.iter().position(|byte| *byte == b'\n').context("git's answer is cut")?;
            let header = std::str::from_utf8(&rest[..end])?;
            let size = header.rsplit(' ').next().and_then(|size| size.parse::<usize>().ok());
            let size = size.with_context(|| format!("{revision}:{path}: {header}"))?;
            ensure!(rest.len() > end + 1 + size, "git's answer is cut at {path}");
            let text = std::str::from_utf8(&rest[end + 1..end + 1 + size])
                .with_context(|| format!("{revision}:{path}"))?;
            files.insert(path.to_owned(), text.to_owned());
            rest = &rest[end + size + 2..];
        }
        Ok(Self(files))
    }

    /// Files made up for a test.
    #[cfg(test)]
    pub fn of(files: &[(&str, &str)]) -> Self {
        Self(files.iter().map(|(path, text)| (path.to_string(), text.to_string())).collect())
    }

    /// How many files were read.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The text of one file.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.0.get(path).map(String::as_str)
    }

    /// Paths and texts of the files whose names end so, in the order of their paths.
    pub fn ending<'a>(&'a self, end: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let files = self.0.iter().map(|(path, text)| (path.as_str(), text.as_str()));
        files.filter(move |(path, _)| path.ends_with(end))
    }

    /// All Rust files, parsed. The error names the file that is not Rust.
    pub fn rust(&self) -> Result<Vec<RustFile<'_>>> {
        let parse = |(path, text)| {
            let syntax = syn::parse_file(text).map_err(|error: syn::Error| {
                anyhow!("{path}:{}: not valid Rust: {error}", error.span().start().line)
            })?;
            let is_test = is_test_path(path) || is_test_only(&syntax.attrs);
            Ok(RustFile { path, text, syntax, is_test })
        };
        let mut files = self.ending(".rs").map(parse).collect::<Result<Vec<_>>>()?;
        mark_test_modules(&mut files);
        Ok(files)
    }
}

fn is_read(path: &str) -> bool {
    READ.iter().any(|end| path.ends_with(end))
}

/// A parsed Rust file.
pub struct RustFile<'a> {
    /// From the root.
    pub path: &'a str,
    /// As it is on disk.
    pub text: &'a str,
    /// With lines in its spans.
    pub syntax: syn::File,
    /// Whether the whole file is for tests: by its place, or because its module is declared under
    /// `#[cfg(test)]`.
    pub is_test: bool,
}

/// Whether a path is a test's by its place. The fuzz targets count as tests.
pub fn is_test_path(path: &str) -> bool {
    let mut parts = path.split('/');
    let file = parts.next_back();
    file == Some("tests.rs") || parts.any(|part| matches!(part, "tests" | "benches" | "fuzz"))
}

/// Whether one of the attributes compiles its item for tests only.
pub fn is_test_only(attrs: &[Attribute]) -> bool {
    let is_cfg = |attr: &&Attribute| attr.path().is_ident("cfg");
    attrs
        .iter()
        .filter(is_cfg)
        .any(|attr| attr.parse_args::<Meta>().is_ok_and(|predicate| requires_test(&predicate)))
}

/// Whether a `cfg` predicate is `test`, or `all(..)` with `test` in it.
fn requires_test(predicate: &Meta) -> bool {
    match predicate {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("all") => list
            .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
            .is_ok_and(|all| all.iter().any(requires_test)),
        _ => false,
    }
}

/// Marks the files of modules that are declared under `#[cfg(test)]`, and the files below them.
fn mark_test_modules(files: &mut [RustFile<'_>]) {
    let mut stems = Vec::new();
    for file in files.iter() {
        for item in &file.syntax.items {
            let Item::Mod(module) = item else { continue };
            if module.content.is_none() && is_test_only(&module.attrs) {
                stems.push(module_stem(file.path, &module.ident.to_string()));
            }
        }
    }
    for file in files {
        file.is_test |= stems.iter().any(|stem| {
            let rest = file.path.strip_prefix(stem.as_str());
            rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
        });
    }
}

/// Where a module's file is, without its ending: `a/mod.rs` and `b` give `a/b`, `a.rs` gives `a/b`.
fn module_stem(parent: &str, name: &str) -> String {
    let (folder, file) = parent.rsplit_once('/').unwrap_or(("", parent));
    let own = match file {
        "mod.rs" | "lib.rs" | "main.rs" => folder.to_owned(),
        _ => parent.trim_end_matches(".rs").to_owned(),
    };
    if own.is_empty() { name.to_owned() } else { format!("{own}/{name}") }
}

/// The attributes of an item.
pub fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// The line of a span, from 1 on.
pub fn line(span: Span) -> usize {
    span.start().line
}

/// The lines of a file, from 1 on, that only tests compile: items under `#[cfg(test)]` and
/// `#[test]`.
pub fn test_lines(file: &syn::File) -> BTreeSet<usize> {
    let mut lines = TestLines::default();
    lines.visit_file(file);
    lines.0
}

#[derive(Default)]
struct TestLines(BTreeSet<usize>);

impl TestLines {
    fn add(&mut self, span: Span) {
        self.0.extend(span.start().line..=span.end().line);
    }
}

impl<'ast> Visit<'ast> for TestLines {
    fn visit_item(&mut self, item: &'ast Item) {
        let attrs = attributes(item);
        if is_test_only(attrs) || attrs.iter().any(|attr| attr.path().is_ident("test")) {
            // An item's span begins with its attributes.
            self.add(item.span());
        } else {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, method: &'ast syn::ImplItemFn) {
        if is_test_only(&method.attrs) {
            self.add(method.span());
        } else {
            syn::visit::visit_impl_item_fn(self, method);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_known_by_place_and_by_declaration() {
        for path in ["a/tests/b.rs", "a/tests.rs", "tests/fuzz/src/lib.rs", "fuzz/src/a.rs"] {
            assert!(is_test_path(path), "{path}");
        }
        assert!(!is_test_path("host/examples/contests.rs"));
        let sources = Sources::of(&[
            ("a/src/lib.rs", "#[cfg(test)] mod oracle; mod b; #[cfg(feature = \"x\")] mod d;"),
            ("a/src/b.rs", "#[cfg(all(test, unix))] mod c;"),
            ("a/src/oracle/mod.rs", ""),
            ("a/src/b/c.rs", ""),
            ("a/src/d.rs", ""),
        ]);
        let files = sources.rust().unwrap();
        let tests: Vec<_> = files.iter().filter(|file| file.is_test).map(|f| f.path).collect();
        assert_eq!(tests, ["a/src/b/c.rs", "a/src/oracle/mod.rs"]);
    }

    #[test]
    fn lines_of_tests_are_found() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nimpl A {\n    #[cfg(test)]\n    fn c() {}\n}\n";
        let lines = test_lines(&syn::parse_file(text).unwrap());
        assert_eq!(lines.into_iter().collect::<Vec<_>>(), [2, 3, 4, 5, 7, 8]);
    }

    #[test]
    fn what_is_not_rust_is_named() {
        let error = Sources::of(&[("a.rs", "\nfn 1() {}")]).rust().err().unwrap().to_string();
        assert!(error.starts_with("a.rs:2: "), "{error}");
    }
}

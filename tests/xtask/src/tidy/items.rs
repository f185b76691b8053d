//! What Rust's syntax shows: tuple parameters, names that two types have, docs that say nothing.

use std::collections::BTreeMap;

use anyhow::Result;
use syn::{Attribute, Expr, FnArg, Item, Lit, Meta, Pat, Type, visit::Visit};

use super::TidyFinding;
use crate::sources::{RustFile, Sources, attributes, is_test_only, line};

/// Type names that several crates may have, because Rust programmers expect them so in each:
/// `Error` and `Result` are a crate's error enum and its alias (as in `std::io`), `Args` the clap
/// options of one command file.
const SHARED_NAMES: [&str; 3] = ["Args", "Error", "Result"];

/// A doc comment with fewer words repeats the name of what it documents, but for a unit such as
/// "Rows per block."
///
/// Fields and variants are exempt: "In milliseconds." is all that a field may need, and variants'
/// docs are the command line's help.
const MIN_DOC_WORDS: usize = 4;

/// Functions and methods with a tuple among their parameters. Closures may have one.
pub fn tuple_parameters(_: &Sources, files: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let collect = |file: &RustFile<'_>| {
        Collected::of(file)
            .tuples
            .into_iter()
            .map(|(line, function)| TidyFinding {
                path: file.path.to_owned(),
                line,
                problem: format!("`{function}` has a tuple parameter"),
                remedy: "pass the values one by one, or as a struct with named fields",
            })
            .collect::<Vec<_>>()
    };
    Ok(files.iter().flat_map(collect).collect())
}

/// Types with a name that another type has, outside of tests and examples.
pub fn doubled_names(_: &Sources, files: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let mut places: BTreeMap<String, Vec<(&str, TypeName)>> = BTreeMap::new();
    let is_example = |path: &str| path.split('/').any(|part| part == "examples");
    for file in files.iter().filter(|file| !file.is_test && !is_example(file.path)) {
        for found in Collected::of(file).types {
            if !SHARED_NAMES.contains(&found.name.as_str()) {
                places.entry(found.name.clone()).or_default().push((file.path, found));
            }
        }
    }
    let mut findings = Vec::new();
    for (name, places) in places {
        let [(first_path, first), others @ ..] = places.as_slice() else { continue };
        for (path, other) in others {
            // Of two definitions in a file under different `cfg`s one is compiled.
            let is_alternative = path == first_path && other.is_cfg && first.is_cfg;
            if !is_alternative {
                findings.push(TidyFinding {
                    path: (*path).to_owned(),
                    line: other.line,
                    problem: format!(
                        "a second type is called `{name}`; the first is at {first_path}:{}",
                        first.line
                    ),
                    remedy: "rename one, or use one for both",
                });
            }
        }
    }
    Ok(findings)
}

/// Doc comments of so few words that they add nothing to a name.
pub fn short_docs(_: &Sources, files: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let collect = |file: &RustFile<'_>| {
        Collected::of(file)
            .docs
            .into_iter()
            .map(|(line, text)| TidyFinding {
                path: file.path.to_owned(),
                line,
                problem: format!("the doc comment {text:?} says nothing that the name does not"),
                remedy: "drop it, or give a unit, a shape, a range or a reason",
            })
            .collect::<Vec<_>>()
    };
    Ok(files.iter().flat_map(collect).collect())
}

/// A type and where it is defined.
struct TypeName {
    name: String,
    line: usize,
    /// Whether a `cfg` decides if it is compiled.
    is_cfg: bool,
}

/// What one pass over a file finds.
#[derive(Default)]
struct Collected {
    types: Vec<TypeName>,
    /// Lines and names of functions.
    tuples: Vec<(usize, String)>,
    /// Lines and texts of doc comments that are too short.
    docs: Vec<(usize, String)>,
    /// How many of the items around the present one are for tests only.
    test_depth: usize,
}

impl Collected {
    fn of(file: &RustFile<'_>) -> Self {
        let mut collected = Self::default();
        collected.document(&file.syntax.attrs);
        collected.visit_file(&file.syntax);
        collected
    }

    fn document(&mut self, attrs: &[Attribute]) {
        let docs: Vec<(usize, String)> = attrs.iter().filter_map(doc_line).collect();
        let Some((line, _)) = docs.first() else { return };
        let text: Vec<&str> = docs.iter().map(|(_, text)| text.trim()).collect();
        let text = text.join(" ");
        let is_word = |word: &&str| word.contains(char::is_alphanumeric);
        let words = || text.split_whitespace().filter(is_word);
        if words().count() < MIN_DOC_WORDS && !words().any(|word| word == "per") {
            self.docs.push((*line, text));
        }
    }

    fn define(&mut self, ident: &syn::Ident, attrs: &[Attribute]) {
        if self.test_depth == 0 {
            let is_cfg = attrs.iter().any(|attr| attr.path().is_ident("cfg"));
            self.types.push(TypeName { name: ident.to_string(), line: line(ident.span()), is_cfg });
        }
    }
}

/// A line of a doc comment. None of an attribute that is something else.
fn doc_line(attr: &Attribute) -> Option<(usize, String)> {
    let Meta::NameValue(pair) = &attr.meta else { return None };
    let Expr::Lit(value) = &pair.value else { return None };
    let Lit::Str(text) = &value.lit else { return None };
    pair.path.is_ident("doc").then(|| (line(text.span()), text.value()))
}

fn is_tuple(ty: &Type) -> bool {
    match ty {
        Type::Tuple(tuple) => !tuple.elems.is_empty(),
        Type::Reference(inner) => is_tuple(&inner.elem),
        Type::Paren(inner) => is_tuple(&inner.elem),
        Type::Group(inner) => is_tuple(&inner.elem),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Collected {
    fn visit_item(&mut self, item: &'ast Item) {
        let attrs = attributes(item);
        let is_test = usize::from(is_test_only(attrs));
        self.test_depth += is_test;
        self.document(attrs);
        match item {
            Item::Enum(item) => self.define(&item.ident, attrs),
            Item::Struct(item) => self.define(&item.ident, attrs),
            Item::Trait(item) => self.define(&item.ident, attrs),
            Item::Type(item) => self.define(&item.ident, attrs),
            Item::Union(item) => self.define(&item.ident, attrs),
            _ => {}
        }
        syn::visit::visit_item(self, item);
        self.test_depth -= is_test;
    }

    fn visit_impl_item_fn(&mut self, method: &'ast syn::ImplItemFn) {
        self.document(&method.attrs);
        syn::visit::visit_impl_item_fn(self, method);
    }

    fn visit_trait_item_fn(&mut self, method: &'ast syn::TraitItemFn) {
        self.document(&method.attrs);
        syn::visit::visit_trait_item_fn(self, method);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        let is_tuple = |input: &FnArg| match input {
            FnArg::Typed(typed) => matches!(*typed.pat, Pat::Tuple(_)) || is_tuple(&typed.ty),
            FnArg::Receiver(_) => false,
        };
        if signature.inputs.iter().any(is_tuple) {
            self.tuples.push((line(signature.ident.span()), signature.ident.to_string()));
        }
        syn::visit::visit_signature(self, signature);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::places;

    #[test]
    fn tuple_parameters_are_found() {
        let text = "fn a((b, c): (u8, u8)) {}\n\
                    trait T {\n    fn d(&self, pair: (u8, u8));\n}\n\
                    impl S {\n    fn e(&self, pair: &(u8, u8)) {}\n}\n";
        let found = places(tuple_parameters, &[("a.rs", text)]);
        assert_eq!(found, [1, 3, 6].map(|line| ("a.rs".to_owned(), line)));
        let good = "fn a(b: u8, c: (), d: &[(u8, u8)]) -> (u8, u8) {\n    e(|(f, g)| f)\n}\n";
        assert_eq!(places(tuple_parameters, &[("a.rs", good)]), []);
    }

    #[test]
    fn doubled_names_are_found_across_crates() {
        let bad = [("a/src/lib.rs", "pub struct Row;\n"), ("b/src/lib.rs", "\nenum Row {}\n")];
        assert_eq!(places(doubled_names, &bad), [("b/src/lib.rs".to_owned(), 2)]);
        let every_kind =
            "trait A {}\ntype A = u8;\nunion A { b: u8 }\nfn f() {\n    struct A;\n}\n";
        let found = places(doubled_names, &[("a.rs", every_kind)]);
        assert_eq!(found, [2, 3, 5].map(|line| ("a.rs".to_owned(), line)));
    }

    #[test]
    fn tests_examples_alternatives_and_conventional_names_may_repeat() {
        let good = [
            (
                "a/src/lib.rs",
                "struct Row;\nenum Error {}\n#[cfg(test)]\nmod tests { struct Row; }\n",
            ),
            ("a/src/tests.rs", "struct Row;"),
            ("a/examples/b.rs", "struct Row;"),
            ("b/src/lib.rs", "enum Error {}\n#[cfg(a)]\nstruct B;\n#[cfg(not(a))]\nstruct B;\n"),
            ("tests/fuzz/src/lib.rs", "struct Row;"),
            ("c/src/lib.rs", "pub use a::Row;\nimpl Iterator for C { type Row = u8; }\n"),
        ];
        assert_eq!(places(doubled_names, &good), []);
    }

    #[test]
    fn short_docs_are_found() {
        let bad = "//! Logging.\n/// Chooses.\nfn a() {}\nimpl B {\n    /// Which one.\n    fn c() {}\n}\n";
        let found = places(short_docs, &[("a.rs", bad)]);
        assert_eq!(found, [1, 2, 5].map(|line| ("a.rs".to_owned(), line)));
        let good = "/// The row of an id, or none.\nfn a() {}\nstruct B {\n    /// In milliseconds.\n    c: u8,\n}\n\
                    // Short.\nfn d() {}\n/// Two\n/// lines count together.\nfn e() {}\n";
        assert_eq!(places(short_docs, &[("a.rs", good)]), []);
    }
}

//! Which crate may use which, from the manifests and from the paths in sources.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

use super::TidyFinding;
use crate::{
    scan::scan,
    sources::{RustFile, Sources},
};

/// Where a crate of the workspace is in the order of dependencies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the host: it may use crates with a smaller number alone.
    Host(u8),
    /// What plugins are written with.
    Sdk,
    /// Runs plugins in the host's runtime. It may use the SDK and [`HARNESS_USES`].
    Harness,
    /// Tests plugins in an installed host. It may use the SDK.
    TestKit,
    /// A plugin or an example of one. It may use the SDK, the harness and the test kit.
    Plugin,
    /// Tests of the whole. They may use everything, and nothing may use them.
    Tests,
    /// A tool of its own, built before all else. It may use no crate of the workspace.
    Tool,
}

/// The crates of the workspace. Those of one number are siblings: neither may use the other, so
/// the daemon `hypercast` links nothing of the lab, and serving knows no importer.
const CRATES: [(&str, Place); 22] = [
    ("hypercast-core", Place::Host(0)),
    ("hypercast-store", Place::Host(1)),
    ("hypercast-kernels", Place::Host(1)),
    ("hypercast-fm", Place::Host(2)),
    ("hypercast-data", Place::Host(3)),
    ("hypercast-expert", Place::Host(4)),
    ("hypercast-config", Place::Host(5)),
    ("hypercast-stream", Place::Host(6)),
    ("hypercast-train", Place::Host(7)),
    ("hypercast-serve", Place::Host(7)),
    ("hypercast-import", Place::Host(7)),
    ("hypercast", Place::Host(8)),
    ("hypercast-lab", Place::Host(8)),
    ("hypercast-sdk", Place::Sdk),
    ("hypercast-harness", Place::Harness),
    ("hypercast-testkit", Place::TestKit),
    ("hypercast-tests", Place::Tests),
    ("hypercast-hostile", Place::Tests),
    ("hypercast-fuzz", Place::Tests),
    ("hypercast-simulation", Place::Tests),
    ("cargo-hypercast", Place::Tool),
    ("xtask", Place::Tool),
];

const DAEMON: &str = "hypercast";

/// Folders of which every crate is a plugin.
const PLUGIN_FOLDERS: [&str; 2] = ["plugins/", "examples/"];

/// What the harness may use of the host.
const HARNESS_USES: [&str; 5] =
    ["hypercast-core", "hypercast-kernels", "hypercast-fm", "hypercast-data", "hypercast-expert"];

/// Crates from crates.io that few crates of the workspace may name. `*` at the end stands for any
/// ending. The lab is among Burn's users because its benches time plain Burn operators as a rival.
const CONFINED: [(&str, &[&str]); 5] = [
    ("wasmtime*", &["hypercast-expert"]),
    ("async-nats", &["hypercast-stream"]),
    ("parquet", &["hypercast-data", "hypercast-import"]),
    ("burn", &["hypercast-kernels", "hypercast-fm", "hypercast-expert", "hypercast-lab"]),
    ("burn-*", &["hypercast-kernels", "hypercast-fm", "hypercast-expert", "hypercast-lab"]),
];

/// What may not be linked into the harness by any crate that it uses: servers and their clients.
const NOT_IN_HARNESS: [&str; 4] = ["async-nats", "axum", "hyper", "hyper-util"];

const UPWARD: &str = "move what is needed to a lower crate, or pass it in; the order is in \
                      tests/xtask/src/tidy/layers.rs";
const ELSEWHERE: &str = "use it through a crate that may name it, listed in \
                         tests/xtask/src/tidy/layers.rs";

/// A manifest of the workspace.
struct Package<'a> {
    name: String,
    /// Its folder, with `/` at the end.
    folder: &'a str,
    manifest: &'a str,
    text: &'a str,
    dependencies: Vec<Dependency>,
}

/// A line of a table of dependencies.
struct Dependency {
    /// The package, whatever it is called in the code.
    name: String,
    line: usize,
    is_dev: bool,
}

/// Dependencies in manifests and paths in sources that the order forbids.
pub fn check(sources: &Sources, _: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let packages = packages(sources)?;
    let own: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let mut findings = Vec::new();
    for package in &packages {
        if place(package).is_none() {
            let remedy = "give it a place in tests/xtask/src/tidy/layers.rs";
            let problem = format!("`{}` is not in the order of crates", package.name);
            findings.push(finding(package.manifest, 1, problem, remedy));
        }
        for used in &package.dependencies {
            findings
                .extend(forbidden(package, &used.name, &packages).map(|(problem, remedy)| {
                    finding(package.manifest, used.line, problem, remedy)
                }));
        }
    }
    for (path, text) in sources.ending(".rs") {
        // The innermost package, since `host/` has packages below it.
        let inside = packages.iter().filter(|package| path.starts_with(package.folder));
        let Some(package) = inside.max_by_key(|package| package.folder.len()) else { continue };
        for (at, line) in scan(text).iter().enumerate() {
            for used in crates_named(&line.code) {
                let name = used.replace('_', "-");
                // A crate may have a module of the daemon's name: the expert contract makes one.
                let is_module = name == DAEMON && !package.names(DAEMON);
                let is_own = own.contains(name.as_str()) && !is_module;
                let is_known = is_own || confinement(&name).is_some();
                let broken = is_known.then(|| forbidden(package, &name, &packages)).flatten();
                findings
                    .extend(broken.map(|(problem, remedy)| finding(path, at + 1, problem, remedy)));
            }
        }
    }
    findings.extend(harness_tree(&packages));
    Ok(findings)
}

fn finding(path: &str, line: usize, problem: String, remedy: &'static str) -> TidyFinding {
    TidyFinding { path: path.to_owned(), line, problem, remedy }
}

/// Why a package may not use another, and what to do.
fn forbidden(
    package: &Package<'_>,
    used: &str,
    packages: &[Package<'_>],
) -> Option<(String, &'static str)> {
    if package.name == used {
        return None;
    }
    if let Some(allowed) = confinement(used) {
        let is_allowed = allowed.contains(&package.name.as_str());
        let problem = || format!("`{}` may not use `{used}`", package.name);
        return (!is_allowed).then(|| (problem(), ELSEWHERE));
    }
    let used = packages.iter().find(|other| other.name == used)?;
    let (from, to) = (place(package)?, place(used)?);
    let is_allowed = match (from, to) {
        (Place::Host(user), Place::Host(used)) => used < user,
        (Place::Harness, Place::Host(_)) => HARNESS_USES.contains(&used.name.as_str()),
        (Place::Harness | Place::TestKit | Place::Plugin, Place::Sdk) => true,
        (Place::Plugin, Place::Harness | Place::TestKit) => true,
        // The command that answers the test kit.
        (Place::Host(_), Place::Harness) => package.name == DAEMON,
        (Place::Tests, _) => to != Place::Tool,
        _ => false,
    };
    let problem = || format!("`{}` may not use `{}`", package.name, used.name);
    (!is_allowed).then(|| (problem(), UPWARD))
}

/// The crates that may name a crate from crates.io; none if all may.
fn confinement(name: &str) -> Option<&'static [&'static str]> {
    let is_match = |pattern: &str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    };
    CONFINED.iter().find(|(pattern, _)| is_match(pattern)).map(|(_, allowed)| *allowed)
}

fn place(package: &Package<'_>) -> Option<Place> {
    if PLUGIN_FOLDERS.iter().any(|folder| package.folder.starts_with(folder)) {
        return Some(Place::Plugin);
    }
    CRATES.iter().find(|(name, _)| *name == package.name).map(|(_, place)| *place)
}

/// What is linked into the harness and must not be, wherever it comes from.
fn harness_tree(packages: &[Package<'_>]) -> Vec<TidyFinding> {
    let by_name: BTreeMap<&str, &Package<'_>> =
        packages.iter().map(|package| (package.name.as_str(), package)).collect();
    let mut pending = vec!["hypercast-harness"];
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    while let Some(name) = pending.pop() {
        let Some(package) = by_name.get(name).filter(|_| seen.insert(name)) else { continue };
        for used in package.dependencies.iter().filter(|used| !used.is_dev) {
            pending.push(&used.name);
            if NOT_IN_HARNESS.contains(&used.name.as_str()) {
                let problem = format!("`{}` gets into hypercast-harness by `{name}`", used.name);
                let remedy = "move what needs it to a crate that the harness does not use";
                findings.push(finding(package.manifest, used.line, problem, remedy));
            }
        }
    }
    findings
}

/// The packages of all manifests.
fn packages(sources: &Sources) -> Result<Vec<Package<'_>>> {
    let mut packages = Vec::new();
    for (manifest, text) in sources.ending("Cargo.toml") {
        let table: toml::Table = toml::from_str(text).with_context(|| manifest.to_owned())?;
        let name = table.get("package").and_then(|package| package.get("name")?.as_str());
        let Some(name) = name.filter(|_| manifest != "Cargo.toml") else { continue };
        let folder = manifest.trim_end_matches("Cargo.toml");
        let mut package =
            Package { name: name.to_owned(), folder, manifest, text, dependencies: Vec::new() };
        package.read_tables(&table);
        packages.push(package);
    }
    Ok(packages)
}

impl Package<'_> {
    /// Whether the manifest has a crate among its dependencies.
    fn names(&self, name: &str) -> bool {
        self.dependencies.iter().any(|used| used.name == name)
    }

    /// Reads the tables of dependencies, those under `[target.'cfg(..)']` too.
    fn read_tables(&mut self, table: &toml::Table) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(used) = table.get(kind).and_then(toml::Value::as_table) else { continue };
            for (key, value) in used {
                let renamed = value.get("package").and_then(toml::Value::as_str);
                self.dependencies.push(Dependency {
                    name: renamed.unwrap_or(key).to_owned(),
                    line: line_of(self.text, kind, key),
                    is_dev: kind == "dev-dependencies",
                });
            }
        }
        let targets = table.get("target").and_then(toml::Value::as_table);
        for target in targets.into_iter().flat_map(|targets| targets.values()) {
            if let Some(table) = target.as_table() {
                self.read_tables(table);
            }
        }
    }
}

/// The line of a key under a header that ends with `kind`; 1 if it is written in another way.
fn line_of(text: &str, kind: &str, key: &str) -> usize {
    let mut is_inside = false;
    for (at, line) in text.lines().enumerate() {
        if let Some(header) = line.strip_prefix('[') {
            let header = header.trim_end_matches(']');
            is_inside = header.ends_with(kind);
            if header.ends_with(&format!("{kind}.{key}")) {
                return at + 1;
            }
        }
        let rest = line.strip_prefix(key).filter(|_| is_inside);
        if rest.is_some_and(|rest| rest.starts_with([' ', '=', '.'])) {
            return at + 1;
        }
    }
    1
}

/// The first parts of paths in a line of code: `a` of `a::b`, and of `use a;`.
fn crates_named(code: &str) -> Vec<&str> {
    let is_word = |char: char| char.is_alphanumeric() || char == '_';
    let mut names = Vec::new();
    let mut end = 0;
    while let Some(found) = code[end..].find("::") {
        let at = end + found;
        let before = &code[..at];
        let start = before
            .rfind(|char| !is_word(char))
            .map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
        // `b` of `a::b::c` and of `crate::b` is no crate; that of `::b` is.
        let prefix = code[..start].trim_end().strip_suffix("::");
        let is_inner =
            prefix.is_some_and(|prefix| prefix.ends_with(|char| is_word(char) || char == '>'));
        if start < at && !is_inner {
            names.push(&code[start..at]);
        }
        end = at + 2;
    }
    let used = code.trim().trim_start_matches("pub ").strip_prefix("use ");
    names.extend(used.and_then(|used| used.strip_suffix(';')).filter(|name| !name.contains(':')));
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::places;

    fn manifest(name: &str, rest: &str) -> String {
        format!("[package]\nname = \"{name}\"\n{rest}")
    }

    /// The findings in a workspace of a few crates, each as `path:line`.
    fn found(crates: &[(&str, &str, &str)]) -> Vec<String> {
        let manifests: Vec<(String, String)> = crates
            .iter()
            .map(|(folder, name, rest)| (format!("{folder}/Cargo.toml"), manifest(name, rest)))
            .collect();
        let files: Vec<(&str, &str)> =
            manifests.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        let found = places(check, &files);
        found.into_iter().map(|(path, line)| format!("{path}:{line}")).collect()
    }

    const CORE: (&str, &str, &str) = ("host/core", "hypercast-core", "");
    const LAB: (&str, &str, &str) = ("host/lab", "hypercast-lab", "");
    const SERVE: (&str, &str, &str) =
        ("host/serve", "hypercast-serve", "[dependencies]\naxum = \"1\"\nhypercast-core = \"1\"\n");

    #[test]
    fn dependencies_upwards_and_sideways_are_found() {
        let up =
            ("host/core", "hypercast-core", "[dependencies]\nhypercast-serve.workspace = true\n");
        assert_eq!(found(&[up, SERVE]), ["host/core/Cargo.toml:4"]);
        let dev =
            ("host/core", "hypercast-core", "[dev-dependencies.hypercast-serve]\npath = \"a\"\n");
        assert_eq!(found(&[dev, SERVE]), ["host/core/Cargo.toml:3"]);
        let sideways =
            ("host/train", "hypercast-train", "[dependencies]\nhypercast-serve = \"1\"\n");
        assert_eq!(found(&[CORE, SERVE, sideways]), ["host/train/Cargo.toml:4"]);
        let daemon = ("host", "hypercast", "[dependencies]\nx = { package = \"hypercast-lab\" }\n");
        // The key is another than the package, so the line is that of the key.
        assert_eq!(found(&[LAB, daemon]), ["host/Cargo.toml:4"]);
        let unknown = ("host/new", "hypercast-new", "");
        assert_eq!(found(&[CORE, unknown]), ["host/new/Cargo.toml:1"]);
    }

    #[test]
    fn dependencies_downwards_are_allowed() {
        let lab = ("host/lab", "hypercast-lab", "[dependencies]\nhypercast-serve = \"1\"\n");
        let tests = ("tests", "hypercast-tests", "[dependencies]\nhypercast-serve = \"1\"\n");
        assert_eq!(found(&[CORE, SERVE, lab, tests]), [""; 0]);
    }

    #[test]
    fn plugins_and_the_harness_link_no_server() {
        let plugin = ("plugins/a", "a", "[dependencies]\nhypercast-core = \"1\"\n");
        assert_eq!(found(&[CORE, plugin]), ["plugins/a/Cargo.toml:4"]);
        let tested = ("plugins/a", "a", "[dev-dependencies]\nhypercast-harness = \"1\"\n");
        let harness =
            ("sdk/harness", "hypercast-harness", "[dependencies]\nhypercast-core = \"1\"\n");
        assert_eq!(found(&[CORE, harness, tested]), [""; 0]);
        let serving =
            ("sdk/harness", "hypercast-harness", "[dependencies]\nhypercast-serve = \"1\"\n");
        let expected = ["host/serve/Cargo.toml:4", "sdk/harness/Cargo.toml:4"];
        assert_eq!(found(&[CORE, SERVE, serving]), expected);
        let core =
            ("host/core", "hypercast-core", "[target.'cfg(unix)'.dependencies]\nhyper = \"1\"\n");
        assert_eq!(found(&[core, harness]), ["host/core/Cargo.toml:4"]);
    }

    #[test]
    fn confined_crates_are_found_elsewhere() {
        let core = (
            "host/core",
            "hypercast-core",
            "[dependencies]\nwasmtime = \"1\"\nburn-flex = \"1\"\n",
        );
        assert_eq!(found(&[core]), ["host/core/Cargo.toml:4", "host/core/Cargo.toml:5"]);
        let expert =
            ("host/expert", "hypercast-expert", "[dependencies]\nwasmtime = \"1\"\nburn = \"1\"\n");
        assert_eq!(found(&[expert]), [""; 0]);
    }

    #[test]
    fn paths_in_sources_are_found() {
        let (core, serve) = (manifest("hypercast-core", ""), manifest("hypercast-serve", ""));
        let source = "//! `hypercast_serve::A`\nuse hypercast_serve::A;\nuse crate::wasmtime::B;\n\
                      fn f() { wasmtime::c() }\nconst D: &str = \"hypercast_serve::E\";\nuse burn;\n";
        let files = [
            ("host/core/Cargo.toml", core.as_str()),
            ("host/core/src/lib.rs", source),
            ("host/serve/Cargo.toml", serve.as_str()),
            ("host/serve/src/lib.rs", "use hypercast_core::A;"),
        ];
        let found = places(check, &files);
        assert_eq!(found, [2, 4, 6].map(|line| ("host/core/src/lib.rs".to_owned(), line)));
    }

    #[test]
    fn a_module_of_the_daemons_name_is_not_the_daemon() {
        let daemon = manifest("hypercast", "");
        let source = "mod hypercast;\nuse hypercast::expert::Graph;\n";
        let in_a_crate_with = |rest: &str| {
            let expert = manifest("hypercast-expert", rest);
            let files = [
                ("host/Cargo.toml", daemon.as_str()),
                ("host/expert/Cargo.toml", expert.as_str()),
                ("host/expert/src/lib.rs", source),
            ];
            places(check, &files).len()
        };
        assert_eq!(in_a_crate_with(""), 0);
        assert_eq!(in_a_crate_with("[dependencies]\nhypercast = \"1\"\n"), 2);
    }
}

//! `cargo hypercast new`: creates an expert's crate with a test, a schema to test it with and a
//! configuration to run it with. It only writes files; `cargo hypercast test` builds them.
//!
//! The crate names versions of the SDK, and no path, so that it can be handed to another machine.
//! With a checkout of HyperCast, cargo's own configuration beside it, which git ignores, replaces
//! these versions by the checkout's crates.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::surface_schema::{SurfaceSchema, TaskWorth, value_arms};
use crate::workspace::write;

/// The environment variable that names a checkout of HyperCast, as `--sdk` does.
const SDK_VARIABLE: &str = "HYPERCAST_SDK";

/// The surfaces of the simulated world of `hypercast simulate`.
const SIMULATED: [&str; 3] = ["feed", "search", "stories"];

/// The files of a crate and their templates. The extension `.in` keeps tools from treating the
/// templates as source files of this repository.
const FILES: [(&str, &str); 6] = [
    ("Cargo.toml", include_str!("../template/Cargo.toml.in")),
    ("src/lib.rs", include_str!("../template/lib.rs.in")),
    ("tests/expert.rs", include_str!("../template/expert.rs.in")),
    ("README.md", include_str!("../template/README.md.in")),
    ("hypercast.toml", include_str!("../template/hypercast.toml.in")),
    (".gitignore", "/target\n/run\n/.cargo/config.toml\n"),
];

/// Cargo's configuration for those who build with a checkout.
const CONFIGURATION: (&str, &str) =
    (".cargo/config.toml", include_str!("../template/config.toml.in"));

const SCHEMA: &str = include_str!("../template/schema.toml.in");

/// The templates of Rust, also those of `from-onnx`, in whose code a type may not have the name of
/// another one.
const CODE: [&str; 4] = [
    include_str!("../template/lib.rs.in"),
    include_str!("../template/expert.rs.in"),
    include_str!("../template/onnx.lib.rs.in"),
    include_str!("../template/onnx.expert.rs.in"),
];

/// The keywords of Rust, and those that it reserves.
pub const KEYWORDS: &[&str] = &[
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate",
    "do", "dyn", "else", "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl",
    "in", "let", "loop", "macro", "match", "mod", "move", "mut", "override", "priv", "pub", "ref",
    "return", "self", "static", "struct", "super", "trait", "true", "try", "type", "typeof",
    "unsafe", "unsized", "use", "virtual", "where", "while", "yield",
];

/// The crates that an expert's crate has beside it under these names.
const BESIDE: [&str; 7] =
    ["alloc", "core", "hypercast-sdk", "hypercast-testkit", "proc-macro", "std", "test"];

/// The options of `cargo hypercast new`.
#[derive(Debug, clap::Args)]
pub struct NewExpertArgs {
    /// Name of the expert and its crate: lower-case letters, digits and hyphens
    pub name: String,
    /// Surface that the expert serves
    #[arg(long, default_value = "feed")]
    pub surface: String,
    /// Schema to fit and to test with, a data set's `schema.toml` [default: that of `hypercast
    /// simulate`]
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// Folder to create [default: NAME]
    #[arg(long, value_name = "DIR")]
    pub into: Option<PathBuf>,
    /// Checkout of HyperCast to build with, instead of released versions [default: the environment
    /// variable HYPERCAST_SDK, if it is set]
    #[arg(long, value_name = "DIR")]
    pub sdk: Option<PathBuf>,
}

/// Creates the crate and returns its folder.
///
/// # Errors
/// A name is not valid, the schema has no such surface, the folder is not empty, or a file cannot
/// be written.
pub fn new(new: &NewExpertArgs) -> Result<PathBuf> {
    let given = new.sdk.clone().or_else(|| std::env::var_os(SDK_VARIABLE).map(PathBuf::from));
    create(new, given.as_deref().map(checkout).transpose()?.as_deref())
}

fn create(new: &NewExpertArgs, sdk: Option<&Path>) -> Result<PathBuf> {
    check_name(&new.name)?;
    ensure!(
        !new.surface.is_empty() && !new.surface.contains(['"', '\\', '\n']),
        "--surface {:?} is not valid: it must not be empty or contain quotes, backslashes or line breaks",
        new.surface
    );
    let schema = match &new.schema {
        Some(file) => std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?,
        None => simulated_schema(&new.surface),
    };
    let origin = new.schema.as_deref().unwrap_or(Path::new("schema.toml"));
    let worth = SurfaceSchema::parse(&schema)
        .and_then(|schema| schema.worth_on(&new.surface))
        .with_context(|| origin.display().to_string())?;
    let folder = new.into.clone().unwrap_or_else(|| PathBuf::from(&new.name));
    let is_free = std::fs::read_dir(&folder).map_or(true, |mut files| files.next().is_none());
    ensure!(
        is_free,
        "the folder {} exists and is not empty: choose another one with --into",
        folder.display()
    );
    for (file, template) in FILES {
        write(&folder.join(file), filled(template, new, &worth))?;
    }
    write(&folder.join("schema.toml"), schema)?;
    if let Some(sdk) = sdk {
        let (file, template) = CONFIGURATION;
        write(&folder.join(file), template.replace("{{sdk}}", &sdk.display().to_string()))?;
        // The versions that the checkout is tested with.
        for shared in ["Cargo.lock", "rust-toolchain.toml"] {
            let from = sdk.join(shared);
            std::fs::copy(&from, folder.join(shared))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(folder)
}

/// The absolute path of a checkout of HyperCast, which contains the SDK and the test kit.
fn checkout(folder: &Path) -> Result<PathBuf> {
    ensure!(
        folder.join("sdk/wit/expert.wit").is_file(),
        "{} is not a checkout of HyperCast: name one with --sdk or {SDK_VARIABLE}, or leave both \
         out to build with released versions",
        folder.display()
    );
    std::fs::canonicalize(folder).with_context(|| format!("cannot read {}", folder.display()))
}

/// The schema of `hypercast simulate`, with the expert's surface among its own.
fn simulated_schema(surface: &str) -> String {
    let surfaces = if SIMULATED.contains(&surface) {
        SIMULATED.to_vec()
    } else {
        [&[surface], &SIMULATED[..]].concat()
    };
    let quoted: Vec<String> = surfaces.iter().map(|name| format!("{name:?}")).collect();
    SCHEMA.replace("{{surfaces}}", &quoted.join(", ")).replace("{{first}}", surfaces[0])
}

fn check_name(name: &str) -> Result<()> {
    let is_first = name.starts_with(|first: char| first.is_ascii_lowercase());
    let is_rest = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    ensure!(
        is_first && is_rest && !name.ends_with('-') && name.len() <= 64,
        "{name:?} is not a valid name for an expert: use lower-case letters, digits and hyphens, \
         at most 64, starting with a letter and not ending with a hyphen"
    );
    ensure!(
        !KEYWORDS.contains(&name) && !BESIDE.contains(&name),
        "{name:?} is a keyword of Rust or the name of a crate that experts use: choose another \
         name, such as \"{name}-expert\""
    );
    Ok(())
}

fn filled(template: &str, new: &NewExpertArgs, worth: &[TaskWorth]) -> String {
    // The task that the template's own test ranks by.
    let ranked_by = worth.iter().find(|task| task.weight > 0.0).map_or("", |task| &task.task);
    template
        .replace("{{name}}", &new.name)
        .replace("{{crate}}", &new.name.replace('-', "_"))
        .replace("{{type}}", &type_name(&new.name))
        .replace("{{surface}}", &new.surface)
        .replace("{{task}}", ranked_by)
        .replace("{{worth}}", &value_arms(worth))
        .replace("{{version}}", released_version())
}

/// The version that a new crate asks for: this tool's own, or a later one that fits it.
fn released_version() -> &'static str {
    let version = env!("CARGO_PKG_VERSION");
    version.rsplit_once('.').map_or(version, |(minor, _)| minor)
}

/// The name of the expert's type, another one than any of the template's own.
pub fn type_name(name: &str) -> String {
    let part =
        |part: &str| part[..part.len().min(1)].to_ascii_uppercase() + part.get(1..).unwrap_or("");
    let plain: String = name.split('-').map(part).collect();
    let mut words = CODE.iter().flat_map(|code| code.split(|c: char| !c.is_ascii_alphanumeric()));
    if words.any(|word| word == plain) { plain + "Expert" } else { plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(name: &str, surface: &str, into: PathBuf) -> NewExpertArgs {
        let into = Some(into);
        NewExpertArgs { name: name.into(), surface: surface.into(), schema: None, into, sdk: None }
    }

    fn create_in(dir: &Path, name: &str, surface: &str) -> PathBuf {
        create(&args(name, surface, dir.join(name)), None).unwrap()
    }

    fn repository() -> PathBuf {
        checkout(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap()
    }

    #[test]
    fn every_file_is_filled_in() {
        let dir = tempfile::tempdir().unwrap();
        let folder = create_in(dir.path(), "home-page-2", "checkout");
        for (file, _) in FILES.iter().chain(&[("schema.toml", "")]) {
            let text = std::fs::read_to_string(folder.join(file)).unwrap();
            assert!(!text.contains("{{") && !text.is_empty(), "{file}: {text}");
        }
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
        assert!(read("src/lib.rs").contains("pub struct HomePage2;"));
        assert!(read("tests/expert.rs").contains("use home_page_2::HomePage2;"));
        let schema = read("schema.toml");
        assert!(
            schema.starts_with("surfaces = [\"checkout\", \"feed\", \"search\", \"stories\"]"),
            "{schema}"
        );
    }

    /// What is handed to another machine is what git has.
    #[test]
    fn a_crate_holds_versions_and_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let sdk = repository();
        let with_sdk = args("home", "feed", dir.path().join("with-sdk"));
        let folders =
            [create_in(dir.path(), "home", "feed"), create(&with_sdk, Some(&sdk)).unwrap()];
        for folder in &folders {
            for (file, _) in FILES {
                let text = std::fs::read_to_string(folder.join(file)).unwrap();
                let root = sdk.display().to_string();
                assert!(!text.contains(&root), "{file} names {root}: {text}");
            }
            let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
            let manifest: toml::Table = manifest.parse().unwrap();
            for (table, name) in
                [("dependencies", "hypercast-sdk"), ("dev-dependencies", "hypercast-testkit")]
            {
                let version = manifest[table][name].as_str().expect("a version, and nothing else");
                assert!(env!("CARGO_PKG_VERSION").starts_with(version), "{name} {version}");
            }
            let ignored = std::fs::read_to_string(folder.join(".gitignore")).unwrap();
            assert!(ignored.lines().any(|line| line == format!("/{}", CONFIGURATION.0)));
        }
        let file = CONFIGURATION.0;
        assert!(!folders[0].join(file).exists(), "released versions need no configuration");
        let text = std::fs::read_to_string(folders[1].join(file)).unwrap();
        let patch = text.parse::<toml::Table>().unwrap()["patch"]["crates-io"].clone();
        for (name, patched) in patch.as_table().unwrap() {
            let folder = Path::new(patched["path"].as_str().unwrap());
            let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{}", folder.display());
        }
    }

    #[test]
    fn a_template_fits_the_schema_that_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let schema = dir.path().join("shop.toml");
        std::fs::write(
            &schema,
            "surfaces = [\"home\"]\n[[tasks]]\nname = \"buys\"\nkind = \"binary\"\nlabel = \"buy\"\n",
        )
        .unwrap();
        let of = |surface: &str| NewExpertArgs {
            schema: Some(schema.clone()),
            ..args("shop", surface, dir.path().join(surface))
        };
        let folder = create(&of("home"), None).unwrap();
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
        assert!(read("src/lib.rs").contains("\"buys\" => 1.0,"), "{}", read("src/lib.rs"));
        assert!(read("tests/expert.rs").contains("(\"buys\", "), "{}", read("tests/expert.rs"));
        for file in ["src/lib.rs", "tests/expert.rs"] {
            assert!(!read(file).contains("like\"") && !read(file).contains("click\""), "{file}");
        }
        let refused = format!("{:#}", create(&of("feed"), None).unwrap_err());
        assert!(refused.contains("home") && refused.contains("shop.toml"), "{refused}");
        assert!(!dir.path().join("feed").exists(), "nothing is left of what was refused");
    }

    #[test]
    fn invalid_names_and_folders_in_use_are_refused() {
        for name in ["", "Home", "2nd", "a_b", "a-", "a b", "../a", "match", "std", "test"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for (name, of_type) in [("graph", "GraphExpert"), ("vec", "VecExpert"), ("dlrm", "Dlrm")] {
            assert_eq!(type_name(name), of_type);
        }
        let dir = tempfile::tempdir().unwrap();
        let folder = create_in(dir.path(), "feed", "feed");
        let again = args("feed", "feed", folder);
        assert!(create(&again, None).unwrap_err().to_string().contains("not empty"));
        let sdk = Some(dir.path().to_owned());
        let error = new(&NewExpertArgs { into: None, sdk, ..again }).unwrap_err().to_string();
        assert!(error.contains("--sdk"), "{error}");
    }
}

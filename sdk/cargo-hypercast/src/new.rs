//! `cargo hypercast new`: creates an expert's crate with a test, a schema to test it with and a
//! configuration to run it with. It only writes files; `cargo hypercast test` builds them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::write;

/// The surfaces of the simulated world of `hypercast simulate`.
const SIMULATED: [&str; 3] = ["feed", "search", "stories"];

/// The files of a crate and their templates. The extension `.in` keeps tools from treating the
/// templates as source files of this repository.
const FILES: [(&str, &str); 7] = [
    ("Cargo.toml", include_str!("../template/Cargo.toml.in")),
    (".cargo/config.toml", include_str!("../template/config.toml.in")),
    ("src/lib.rs", include_str!("../template/lib.rs.in")),
    ("tests/expert.rs", include_str!("../template/expert.rs.in")),
    ("README.md", include_str!("../template/README.md.in")),
    ("hypercast.toml", include_str!("../template/hypercast.toml.in")),
    (".gitignore", "/target\n/run\n"),
];

const SCHEMA: &str = include_str!("../template/schema.toml.in");

/// The options of `cargo hypercast new`.
#[derive(Debug, clap::Args)]
pub struct NewExpertArgs {
    /// Name of the expert and its crate: lower-case letters, digits and hyphens
    pub name: String,
    /// Surface that the expert serves
    #[arg(long, default_value = "feed")]
    pub surface: String,
    /// Schema to test with, a data set's `schema.toml` [default: that of `hypercast simulate`]
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// Folder to create [default: NAME]
    #[arg(long, value_name = "DIR")]
    pub into: Option<PathBuf>,
    /// Checkout of HyperCast to build against [default: the one that this tool was built in]
    #[arg(long, value_name = "DIR")]
    pub sdk: Option<PathBuf>,
}

/// Creates the crate and returns its folder.
///
/// # Errors
/// A name is not valid, the folder is not empty, or a file cannot be written.
pub fn new(new: &NewExpertArgs) -> Result<PathBuf> {
    check_name(&new.name)?;
    ensure!(
        !new.surface.is_empty() && !new.surface.contains(['"', '\\', '\n']),
        "--surface {:?} is not valid: it must not be empty or contain quotes, backslashes or line breaks",
        new.surface
    );
    let sdk = checkout(new.sdk.as_deref())?;
    let folder = new.into.clone().unwrap_or_else(|| PathBuf::from(&new.name));
    let is_free = std::fs::read_dir(&folder).map_or(true, |mut files| files.next().is_none());
    ensure!(
        is_free,
        "the folder {} exists and is not empty: choose another one with --into",
        folder.display()
    );
    for (file, template) in FILES {
        write(&folder.join(file), filled(template, new, &sdk))?;
    }
    let schema = match &new.schema {
        Some(file) => std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?,
        None => filled(SCHEMA, new, &sdk),
    };
    write(&folder.join("schema.toml"), schema)?;
    // The same versions as HyperCast's own, so that its build can be reused.
    for shared in ["Cargo.lock", "rust-toolchain.toml"] {
        let from = sdk.join(shared);
        if from.is_file() {
            std::fs::copy(&from, folder.join(shared))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(folder)
}

/// The folder of HyperCast's checkout, which contains the SDK and the harness.
fn checkout(given: Option<&Path>) -> Result<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = given.unwrap_or(&own);
    let is_there = folder.join("sdk/wit/expert.wit").is_file();
    ensure!(
        is_there,
        "{} is not a checkout of HyperCast: name one with --sdk, or install this tool from one (`cargo install --locked --path sdk/cargo-hypercast`)",
        folder.display()
    );
    std::fs::canonicalize(folder).with_context(|| format!("cannot read {}", folder.display()))
}

fn check_name(name: &str) -> Result<()> {
    let is_first = name.starts_with(|first: char| first.is_ascii_lowercase());
    let is_rest = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    ensure!(
        is_first && is_rest && !name.ends_with('-') && name.len() <= 64,
        "{name:?} is not a valid name for an expert: use lower-case letters, digits and hyphens, \
         at most 64, starting with a letter and not ending with a hyphen"
    );
    Ok(())
}

fn filled(template: &str, new: &NewExpertArgs, sdk: &Path) -> String {
    let surfaces = if SIMULATED.contains(&new.surface.as_str()) {
        SIMULATED.to_vec()
    } else {
        [&[new.surface.as_str()], &SIMULATED[..]].concat()
    };
    let quoted: Vec<String> = surfaces.iter().map(|name| format!("{name:?}")).collect();
    template
        .replace("{{name}}", &new.name)
        .replace("{{crate}}", &new.name.replace('-', "_"))
        .replace("{{type}}", &type_name(&new.name))
        .replace("{{surface}}", &new.surface)
        .replace("{{surfaces}}", &quoted.join(", "))
        .replace("{{first}}", surfaces[0])
        .replace("{{sdk}}", &sdk.display().to_string())
}

/// The name of the expert's type.
pub fn type_name(name: &str) -> String {
    let part =
        |part: &str| part[..part.len().min(1)].to_ascii_uppercase() + part.get(1..).unwrap_or("");
    name.split('-').map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(name: &str, surface: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let into = Some(dir.path().join(name));
        let args = NewExpertArgs {
            name: name.into(),
            surface: surface.into(),
            schema: None,
            into,
            sdk: None,
        };
        let folder = new(&args).unwrap();
        (dir, folder)
    }

    #[test]
    fn every_file_is_filled_in() {
        let (_dir, folder) = create("home-page-2", "checkout");
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
        assert!(folder.join("Cargo.lock").is_file(), "the versions of the checkout");
    }

    /// Otherwise the first test of an expert builds all dependencies of the harness once more.
    #[test]
    fn dependencies_are_built_as_in_the_repository() {
        let (_dir, folder) = create("home", "feed");
        let profile = |file: &Path| {
            let text = std::fs::read_to_string(file).unwrap();
            text.parse::<toml::Table>().unwrap()["profile"]["dev"].clone()
        };
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
        let (expert, repository) = (profile(&folder.join("Cargo.toml")), profile(&repository));
        for (key, value) in expert.as_table().unwrap().iter().filter(|(key, _)| *key != "package") {
            assert_eq!(Some(value), repository.get(key), "{key}");
        }
        let packages = expert["package"].as_table().unwrap();
        let is_dependency = |name: &str| name != "home" && !name.starts_with("hypercast-");
        let dependencies: Vec<_> =
            packages.iter().filter(|(name, _)| is_dependency(name)).collect();
        assert!(!dependencies.is_empty());
        for (name, settings) in dependencies {
            assert_eq!(Some(settings), repository["package"].get(name), "{name}");
        }
    }

    #[test]
    fn invalid_names_and_folders_in_use_are_refused() {
        for name in ["", "Home", "2nd", "a_b", "a-", "a b", "../a"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        let (_dir, folder) = create("feed", "feed");
        let again = NewExpertArgs {
            name: "feed".into(),
            surface: "feed".into(),
            schema: None,
            into: Some(folder),
            sdk: None,
        };
        assert!(new(&again).unwrap_err().to_string().contains("not empty"));
        let sdk = Some(std::env::temp_dir());
        let error = new(&NewExpertArgs { into: None, sdk, ..again }).unwrap_err().to_string();
        assert!(error.contains("--sdk"), "{error}");
    }
}

//! From a core module to a component, and the check of what it imports.

use std::path::Path;

use anyhow::{Context, Result, bail};
use wit_component::{ComponentEncoder, DecodedWasm};
use wit_parser::WorldItem;

/// The function of the contract that a guest may call.
const LOG: &str = "log";

/// The contract's functions that an expert exports.
const EXPORTS: [&str; 7] =
    ["describe", "network", "rank", "labels", "sample", "schedule", "evaluate"];

/// Makes the component `out` of the core module in the file `module`, whatever toolchain built it, if it is an expert.
pub fn wrap(module: &Path, out: &Path) -> Result<()> {
    let bytes =
        std::fs::read(module).with_context(|| format!("cannot read {}", module.display()))?;
    let component = encode(&bytes)
        .and_then(|component| check(&component).map(|()| component))
        .with_context(|| module.display().to_string())?;
    std::fs::write(out, component).with_context(|| format!("cannot write {}", out.display()))
}

/// Wraps a core module that was built against a WIT world.
pub fn encode(module: &[u8]) -> Result<Vec<u8>> {
    ComponentEncoder::default()
        .validate(true)
        .module(module)
        .and_then(|encoder| encoder.encode())
        .context("the module cannot become a component")
}

/// Refuses a component that is no expert, or that can call more than the contract gives: no host would load it.
pub fn check(component: &[u8]) -> Result<()> {
    let interface = Interface::read(component)?;
    if let Some(missing) = EXPORTS.iter().find(|name| !interface.exports.iter().any(|e| e == *name))
    {
        bail!(
            "the component does not export `{missing}`: does the crate call `hypercast_sdk::export!`?"
        );
    }
    let foreign: Vec<_> =
        interface.imports.iter().filter(|name| *name != LOG).map(String::as_str).collect();
    if foreign.is_empty() {
        return Ok(());
    }
    bail!(
        "the component imports {}; an expert may import nothing but `{LOG}`. \
         A dependency that wants files, clocks or randomness is the usual cause: see `cargo tree`",
        foreign.join(", ")
    )
}

/// What a component can call and what it can be called for, by name: functions, and interfaces with
/// functions. Types are left out, since importing them reaches nothing.
#[derive(Debug)]
struct Interface {
    imports: Vec<String>,
    exports: Vec<String>,
}

impl Interface {
    fn read(component: &[u8]) -> Result<Self> {
        let DecodedWasm::Component(resolve, world) =
            wit_component::decode(component).context("cannot read the component")?
        else {
            bail!("this is a WIT package, not a component");
        };
        let is_callable = |item: &WorldItem| match item {
            WorldItem::Function(_) => true,
            WorldItem::Interface { id, .. } => !resolve.interfaces[*id].functions.is_empty(),
            WorldItem::Type { .. } => false,
        };
        let world = &resolve.worlds[world];
        let [imports, exports] = [&world.imports, &world.exports].map(|items| {
            let callable = items.iter().filter(|(_, item)| is_callable(item));
            callable.map(|(key, _)| resolve.name_world_key(key)).collect()
        });
        Ok(Self { imports, exports })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    // `cargo verify` builds the guests and says where they are.
    fn components(variable: &str) -> Option<Vec<(String, Vec<u8>)>> {
        let Some(folder) = std::env::var_os(variable).map(PathBuf::from) else {
            eprintln!("skipped: {variable} is not set; run `cargo verify`");
            return None;
        };
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.expect("a readable folder").path();
            let name = path.file_stem().expect("a file name").to_string_lossy().into_owned();
            (name, std::fs::read(&path).expect("a readable component"))
        };
        let found: Vec<_> =
            std::fs::read_dir(folder).expect("a readable folder").map(read).collect();
        assert!(!found.is_empty(), "{variable} names an empty folder");
        Some(found)
    }

    #[test]
    fn in_tree_plugins_import_nothing_but_log() {
        for (name, component) in components("HYPERCAST_PLUGINS").into_iter().flatten() {
            let interface = Interface::read(&component).expect("a component");
            assert!(interface.imports.iter().all(|import| import == LOG), "{name}: {interface:?}");
            check(&component).expect("an expert");
        }
    }

    #[test]
    fn a_foreign_import_is_refused_by_name() {
        let Some(guests) = components("HYPERCAST_HOSTILE") else {
            return;
        };
        let (_, guest) =
            guests.iter().find(|(name, _)| name == "other_import").expect("other_import is built");
        let error = check(guest).expect_err("it imports a clock").to_string();
        assert!(error.contains("hypercast:hostile/clock"), "{error}");
    }

    #[test]
    fn a_module_without_expert_is_refused() {
        assert!(encode(b"not wasm").is_err());
        // The smallest core module: its magic number and version.
        let component = encode(b"\0asm\x01\0\0\0").expect("an empty component");
        let error = check(&component).expect_err("it exports nothing").to_string();
        assert!(error.contains("`describe`") && error.contains("export!"), "{error}");
    }
}

//! Turns a core module into a component and checks that the component is an expert.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use wit_component::{ComponentEncoder, DecodedWasm};
use wit_parser::WorldItem;

use crate::workspace::{read, write};

/// The only function of the contract that a guest may call.
const LOG: &str = "log";

/// The functions of the contract that an expert must export.
const EXPORTS: [&str; 7] =
    ["describe", "network", "rank", "labels", "sample", "schedule", "evaluate"];

/// Writes the component `out` from the core module in the file `module`. Any toolchain may have
/// built the module.
///
/// # Errors
/// The module is not an expert, or a file cannot be read or written.
pub fn wrap(module: &Path, out: &Path) -> Result<()> {
    let component = encode(&read(module)?)
        .and_then(|component| check(&component).map(|()| component))
        .with_context(|| module.display().to_string())?;
    write(out, component)
}

/// Turns a core module that was linked with `wit-bindgen`'s bindings into a component.
pub fn encode(module: &[u8]) -> Result<Vec<u8>> {
    ComponentEncoder::default()
        .validate(true)
        .module(module)
        .and_then(|encoder| encoder.encode())
        .context(
            "cannot turn the module into a component: is it linked with the contract's bindings?",
        )
}

/// Checks that a component is an expert that a host would load.
///
/// # Errors
/// The component lacks an export of the contract, or imports more than the contract offers.
pub fn check(component: &[u8]) -> Result<()> {
    let Interface { mut imports, exports } = Interface::read(component)?;
    if let Some(missing) = EXPORTS.iter().find(|name| exports.iter().all(|e| e != *name)) {
        bail!(
            "the component does not export `{missing}`: call `hypercast_sdk::export!` in the crate"
        );
    }
    imports.retain(|name| name != LOG);
    ensure!(
        imports.is_empty(),
        "the component imports {}; an expert may import nothing but `{LOG}`. \
         Usually a dependency that uses files, clocks or randomness causes this: find it with \
         `cargo tree` and remove it",
        imports.join(", ")
    );
    Ok(())
}

/// The names of the functions and of the interfaces with functions that a component imports and
/// exports. Imports of types alone are harmless and left out.
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
            bail!("the file contains a WIT package, not a component");
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

    // `cargo verify` builds the guests and sets the variable to their folder.
    fn components(variable: &str) -> Option<Vec<(String, Vec<u8>)>> {
        let Some(folder) = std::env::var_os(variable).map(PathBuf::from) else {
            let reason = format!("{variable} is not set; run `cargo verify`");
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{reason}");
            eprintln!("SKIPPED: {reason}");
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
    fn a_module_without_an_expert_is_refused() {
        assert!(encode(b"not wasm").is_err());
        // The smallest core module: its magic number and version.
        let component = encode(b"\0asm\x01\0\0\0").expect("an empty component");
        let error = check(&component).expect_err("it exports nothing").to_string();
        assert!(error.contains("`describe`") && error.contains("export!"), "{error}");
    }
}

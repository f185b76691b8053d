//! From a core module to a component, and the check of what it imports.

use anyhow::{Context, Result, bail};
use wit_component::{ComponentEncoder, DecodedWasm};
use wit_parser::WorldItem;

/// The function of the contract that a guest may call.
const LOG: &str = "log";

/// Wraps a core module that was built against a WIT world.
pub fn encode(module: &[u8]) -> Result<Vec<u8>> {
    ComponentEncoder::default()
        .validate(true)
        .module(module)
        .and_then(|encoder| encoder.encode())
        .context("the module is no component: does it call `hypercast_sdk::export!`?")
}

/// What a component can call: the functions and interfaces with functions that it imports, by name. Types
/// are left out, since importing them reaches nothing.
pub fn imports(component: &[u8]) -> Result<Vec<String>> {
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
    let imports = resolve.worlds[world].imports.iter().filter(|(_, item)| is_callable(item));
    Ok(imports.map(|(key, _)| resolve.name_world_key(key)).collect())
}

/// Refuses a component that can call more than the contract gives: no host would load it.
pub fn check_imports(component: &[u8]) -> Result<()> {
    let imports = imports(component)?;
    let foreign: Vec<_> = imports.iter().filter(|name| *name != LOG).map(String::as_str).collect();
    if foreign.is_empty() {
        return Ok(());
    }
    bail!(
        "the component imports {}; an expert may import nothing but `{LOG}`. \
         A dependency that wants files, clocks or randomness is the usual cause: see `cargo tree`",
        foreign.join(", ")
    )
}

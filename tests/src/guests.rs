//! Guests that no compiler would make: core modules as text, wrapped as components of the contract in `sdk/wit`.
//!
//! Every export is there with its right type; what it does is up to the test.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::{Resolve, WorldId, WorldItem, abi::AbiVariant, abi::WasmType};

/// A guest by what is odd in it.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// What each export does that returns an address, as instructions; by default, and where it returns none, it traps.
    pub export: &'a str,
    /// What the allocator does that the host calls for lists and texts.
    pub realloc: &'a str,
    /// The memory's and other limits: fields of the module.
    pub fields: &'a str,
    /// Fields that come after the functions: a start function, data.
    pub more: &'a str,
    /// What is imported besides the contract, as WIT items of the world, with its packages.
    pub imports: Option<Imports<'a>>,
}

/// Imports besides the contract's.
#[derive(Debug, Clone, Copy)]
pub struct Imports<'a> {
    /// WIT of the package, with its header.
    pub package: &'a str,
    /// Its interface, as a world names it.
    pub interface: &'a str,
    /// The core import.
    pub import: &'a str,
}

/// An allocator that never frees.
const BUMP: &str = "(local $at i32)
    (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
    (global.set $heap (i32.add (local.get $at) (local.get 3)))
    (local.get $at)";

impl Default for Guest<'_> {
    fn default() -> Self {
        Self {
            export: "unreachable",
            realloc: BUMP,
            fields: "(memory (export \"memory\") 32)",
            more: "",
            imports: None,
        }
    }
}

/// The guest's component.
///
/// # Panics
/// If its text is none, or the contract cannot be read.
pub fn component(guest: Guest<'_>) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sdk/wit");
    let (package, _) = resolve.push_dir(&wit).expect("the contract can be read");
    let mut world = resolve.select_world(&[package], Some("expert")).expect("it has a world");
    if let Some(imports) = guest.imports {
        world = world_with(&mut resolve, package, imports);
    }
    let mut module = wat::parse_str(text(&resolve, world, guest)).expect("it is a module's text");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .expect("the world can be told");
    ComponentEncoder::default()
        .validate(true)
        .module(&module)
        .and_then(|encoder| encoder.encode())
        .expect("it is a component")
}

fn world_with(
    resolve: &mut Resolve,
    contract: wit_parser::PackageId,
    imports: Imports<'_>,
) -> WorldId {
    let source = |name: &str| PathBuf::from(name);
    resolve.push_str(source("other.wit"), imports.package).expect("the package can be read");
    let contract = &resolve.packages[contract].name;
    let version = contract.version.as_ref().expect("the contract has a version");
    let package = format!(
        "package hypercast:hostile;\nworld hostile {{ include hypercast:expert/expert@{version}; import {}; }}",
        imports.interface
    );
    let package = resolve.push_str(source("hostile.wit"), &package).expect("the world can be read");
    resolve.select_world(&[package], Some("hostile")).expect("it was just made")
}

/// The module: each export of the world with the type that the canonical ABI gives it.
fn text(resolve: &Resolve, world: WorldId, guest: Guest<'_>) -> String {
    let mut text = String::from("(module\n");
    if let Some(imports) = guest.imports {
        writeln!(text, "{}", imports.import).expect("texts grow");
    }
    writeln!(
        text,
        "{}\n(global $heap (mut i32) (i32.const 65536))\n\
         (func (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32) {})",
        guest.fields, guest.realloc
    )
    .expect("texts grow");
    for (key, item) in &resolve.worlds[world].exports {
        let WorldItem::Function(function) = item else { continue };
        let signature = resolve.wasm_signature(AbiVariant::GuestExport, function);
        let types =
            |types: &[WasmType]| types.iter().map(|ty| core(*ty)).collect::<Vec<_>>().join(" ");
        writeln!(
            text,
            "(func (export \"{}\") (param {}) (result {}) {})",
            resolve.name_world_key(key),
            types(&signature.params),
            types(&signature.results),
            if types(&signature.results) == "i32" { guest.export } else { "unreachable" }
        )
        .expect("texts grow");
    }
    writeln!(text, "{}\n)", guest.more).expect("texts grow");
    text
}

fn core(ty: WasmType) -> &'static str {
    match ty {
        WasmType::I32 | WasmType::Pointer | WasmType::Length => "i32",
        WasmType::I64 | WasmType::PointerOrI64 => "i64",
        WasmType::F32 => "f32",
        WasmType::F64 => "f64",
    }
}

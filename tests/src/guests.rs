//! Guests that no compiler would produce: core modules written as text and wrapped into components
//! of the contract in `sdk/wit`.
//!
//! Every export exists and has the right type. The test decides what it does.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::{Resolve, WorldId, WorldItem, abi::AbiVariant, abi::WasmType};

/// The parts of a guest that a test can set. The default is a guest whose exports trap.
#[derive(Debug, Clone, Copy)]
pub struct TextGuest<'a> {
    /// The instructions of each export that returns an address. Other exports always trap.
    pub export: &'a str,
    /// The instructions of the allocator that the host calls for lists and strings.
    pub realloc: &'a str,
    /// Fields of the module before its functions: memories and tables with their limits.
    pub fields: &'a str,
    /// Fields of the module after its functions: a start function, data.
    pub more: &'a str,
    /// An import that is not part of the contract.
    pub imports: Option<Imports<'a>>,
}

/// An import that is not part of the contract.
#[derive(Debug, Clone, Copy)]
pub struct Imports<'a> {
    /// The WIT of the package that contains it.
    pub package: &'a str,
    /// The full name of its interface.
    pub interface: &'a str,
    /// The import of the core module, as text.
    pub import: &'a str,
}

/// An allocator that never frees memory.
const BUMP: &str = "(local $at i32)
    (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
    (global.set $heap (i32.add (local.get $at) (local.get 3)))
    (local.get $at)";

impl Default for TextGuest<'_> {
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

/// Builds the guest's component.
///
/// # Panics
/// The text is not a valid module, or the contract cannot be read.
pub fn component(guest: TextGuest<'_>) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sdk/wit");
    let (package, _) = resolve.push_dir(&wit).expect("the contract can be read");
    let mut world = resolve.select_world(&[package], Some("expert")).expect("it has a world");
    if let Some(imports) = guest.imports {
        world = world_with(&mut resolve, package, imports);
    }
    let mut module = wat::parse_str(text(&resolve, world, guest)).expect("the text is a module");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .expect("the world can be embedded");
    ComponentEncoder::default()
        .validate(true)
        .module(&module)
        .and_then(|encoder| encoder.encode())
        .expect("the module can be encoded as a component")
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

/// The text of the module. Each export of the world has the type that the canonical ABI defines.
fn text(resolve: &Resolve, world: WorldId, guest: TextGuest<'_>) -> String {
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

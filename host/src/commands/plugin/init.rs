//! `hypercast plugin init FILE`: writes the parameters that a component's network begins with, so
//! that one that was trained elsewhere serves as it is.

use std::path::PathBuf;

use anyhow::bail;

use super::subject::{LoadedPlugin, PluginUnderTest};
use hypercast_expert::wasm::contract::Column;
use hypercast_expert::{Normaliser, Parameters};

/// Arguments of `hypercast plugin init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The component, and what it is to fit.
    #[command(flatten)]
    pub subject: PluginUnderTest,
    /// The FM version that it is to be served with
    #[arg(long, value_name = "VERSION")]
    pub fm: String,
    /// The parameters file to write; beside the component if missing
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Writes the file, and prints where it is.
pub fn run(args: Args) -> anyhow::Result<()> {
    let parameters = initial(&args.subject.load()?, &args.fm)?;
    let out = args.out.unwrap_or_else(|| args.subject.file.with_extension("safetensors"));
    parameters.save(&out)?;
    println!("parameters: {}", out.display());
    Ok(())
}

/// The parameters, if nothing of them has to be learned first.
fn initial(loaded: &LoadedPlugin, fm: &str) -> anyhow::Result<Parameters> {
    let blueprint = &loaded.blueprint;
    let graph = &blueprint.graph;
    if let Some(spec) = graph.parameters.iter().find(|spec| spec.values.is_none()) {
        bail!(
            "its parameter `{}` has no values of its own, and begins by chance: train it \
             (`cargo hypercast train`)",
            spec.name
        );
    }
    let standardised = graph.columns.iter().find(|column| matches!(column, Column::Feature(_)));
    if let Some(column) = standardised {
        bail!(
            "its network reads {} standardised, and only logs tell how: train it (`cargo \
             hypercast train`), or read the feature as it is (`g.raw_features`)",
            column.label()
        );
    }
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let mut parameters = blueprint.init_parameters(normaliser, 0);
    if let Some(task) = parameters.provenance.labels.keys().next() {
        bail!(
            "its output of task `{task}` is relative to a rate or a scale that only logs tell: \
             train it (`cargo hypercast train`), or say the whole logit or value \
             (`g.whole_output`)"
        );
    }
    fm.clone_into(&mut parameters.provenance.fm_version);
    Ok(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_core::prerequisite::{hostile, plugins};
    use hypercast_expert::SavedParameters;

    fn args(file: PathBuf, schema: Option<PathBuf>, out: PathBuf) -> Args {
        let subject =
            PluginUnderTest { file, schema, config: None, tae_dim: Some(8), max_flops: None };
        Args { subject, fm: "2.1.0".into(), out: Some(out) }
    }

    #[test]
    fn what_was_trained_elsewhere_can_serve_as_it_is() {
        let Some(imported) = hostile("init", "dlrm") else { return };
        let Some(plugins) = plugins("init") else { return };
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/onnx/dlrm");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("parameters.safetensors");
        let schema = Some(PathBuf::from(model).join("schema.toml"));
        run(args(imported.clone(), schema.clone(), out.clone())).unwrap();
        let saved = SavedParameters::read(&out).unwrap();
        let provenance = saved.provenance.clone();
        assert_eq!((provenance.fm_version.as_str(), provenance.tae_dim), ("2.1.0", 8));
        assert!(provenance.labels.is_empty(), "the outputs are whole");
        let loaded = args(imported, schema, out.clone()).subject.load().unwrap();
        let parameters = Parameters::restore(&loaded.blueprint.graph, saved).unwrap();
        let weights = std::fs::read(PathBuf::from(model).join("weights/top.0.bias.f32")).unwrap();
        let bytes = parameters.by_name("top.0.bias").unwrap().iter();
        assert_eq!(bytes.flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>(), weights);
        let by_chance = run(args(plugins.join("mlp-fusion.wasm"), None, out)).unwrap_err();
        assert!(by_chance.to_string().contains("begins by chance: train it"), "{by_chance}");
    }
}

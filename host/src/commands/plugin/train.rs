//! `hypercast plugin train FILE --logs DIR`: a training run of a component on feature
//! logs, with progressive NE, that ends in a parameters file.
//!
//! It is `hypercast train expert` for a component that no configuration names: the same
//! code, the same figures.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use hypercast_config::{Config, ExpertEntry, TrainOn};
use hypercast_core::atomic_file;
use hypercast_data::logs::LogReader;
use hypercast_expert::wasm::contract::{HostSchema, VectorWidths};
use hypercast_expert::{Engine, Plugin};
use hypercast_train::{expert, report};

/// Arguments of `hypercast plugin train`.
#[derive(Debug, Parser)]
pub struct Args {
    /// The component, as `cargo hypercast build` writes it.
    pub file: PathBuf,
    /// The feature logs (`paths.logs` of who wrote them)
    #[arg(long, value_name = "DIR")]
    pub logs: PathBuf,
    /// The parameters file to write; beside the component if missing
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The FM version whose TAEs it learns with; needed where the logs hold several
    #[arg(long, value_name = "VERSION")]
    pub fm: Option<String>,
    /// A surface to learn from (may be repeated); those that it serves if missing
    #[arg(long = "surface", value_name = "NAME")]
    pub surfaces: Vec<String>,
    /// A configuration, for its [expert_training] and [plugin_limits]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Passes over the logs, or the most of them, in place of the configuration's
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Metrics as JSON, besides the table
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Trains and prints progressive metrics.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut config = match &args.config {
        Some(file) => Config::read(file)?,
        None => Config::without_folder(),
    };
    config.paths.logs = args.logs.clone();
    if let Some(epochs) = args.epochs {
        let training = &mut config.expert_training;
        (training.epochs, training.max_epochs) = (epochs, epochs);
    }
    let engine = Engine::new(config.guests())?;
    // Training writes into a folder of its own, so that a run that fails leaves no file.
    let out = args.out.clone().unwrap_or_else(|| args.file.with_extension("safetensors"));
    let beside = out.parent().filter(|dir| !dir.as_os_str().is_empty());
    let beside = beside.map_or_else(|| PathBuf::from("."), PathBuf::from);
    std::fs::create_dir_all(&beside)
        .with_context(|| format!("cannot make {}", beside.display()))?;
    let work = tempfile::tempdir_in(&beside)
        .with_context(|| format!("cannot write in {}", beside.display()))?;
    config.paths.experts = work.path().to_owned();
    // The logs alone say how wide content vectors are: the configuration may be of another data
    // set, and an empty folder is of none.
    config.paths.dataset = work.path().to_owned();
    let surfaces = surfaces(&args, &engine, &config)?;
    config.experts.clear();
    let entry = ExpertEntry {
        name: "parameters".into(),
        plugin: args.file.clone(),
        surfaces,
        without_tae: false,
        shadow: false,
        train_on: TrainOn::Own,
        limits: Default::default(),
        ne_limits: Default::default(),
    };
    let source = expert::TrainingSource::Logs(args.fm.as_deref());
    let trained = expert::train(&config, &entry, &engine, source)?;
    atomic_file::rename(&trained.parameters, &out)
        .with_context(|| format!("cannot write {}", out.display()))?;
    println!(
        "{}, {} rows, {:.1} s, before they were learned from:",
        trained.plugin, trained.rows, trained.seconds
    );
    print!("{}", report::table(&trained.progressive));
    trained.passes.iter().for_each(|passes| println!("{passes}"));
    println!("parameters: {}", out.display());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&trained.progressive)?;
        atomic_file::write(file, (text + "\n").as_bytes())
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Those that were asked for, or that the component says it serves; none for all.
fn surfaces(args: &Args, engine: &Engine, config: &Config) -> anyhow::Result<Vec<String>> {
    if !args.surfaces.is_empty() {
        return Ok(args.surfaces.clone());
    }
    let log = LogReader::open_for(&args.logs, args.fm.as_deref())?;
    let limits = config.plugin_limits.load_options().limits;
    let plugin = Plugin::load(engine, &args.file, &limits)?;
    let vectors = VectorWidths { tae: log.tae_dim, content: log.content_dim };
    let mut info = HostSchema::new(&log.schema, vectors).info;
    plugin.limit(&mut info);
    Ok(plugin.declared(&info)?.surfaces)
}

//! `hypercast plugin replay COMPONENT --requests PATH`: a component over recorded requests, beside
//! another version or what was answered.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};

use hypercast_config::Config;
use hypercast_data::dataset::{Dataset, content};
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Blueprint, Engine, FeatureStatistics, LoadOptions, Parameters, SavedParameters, ServedExpert,
};
use hypercast_serve::request_log::{
    self, RecordedRequest, ReplayExpert, ReplaySchema, ReplaySettings,
};
use hypercast_stream::registry::schema_hash;

/// Arguments of `hypercast plugin replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The component
    pub component: PathBuf,
    /// Recorded requests: a file, or a folder of them as a daemon keeps it
    /// (paths.state/recorded)
    #[arg(long, value_name = "PATH")]
    pub requests: PathBuf,
    /// Its parameters; without any it runs with initial values, which tells of faults and times
    /// alone
    #[arg(long, value_name = "FILE")]
    pub parameters: Option<PathBuf>,
    /// Another component, instead of what was answered
    #[arg(long, value_name = "COMPONENT")]
    pub against: Option<PathBuf>,
    /// Its parameters
    #[arg(long, value_name = "FILE", requires = "against")]
    pub against_parameters: Option<PathBuf>,
    /// Run both with zeros in the embedding's place
    #[arg(long)]
    pub without_tae: bool,
    /// The schema of the requests (`schema.toml` of a data set) [default: that of the
    /// configuration's data set]
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// The configuration file, for limits, device and data set
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// Requests to run, the newest ones
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub most: usize,
    /// Length of the lists that are compared at their tops
    #[arg(long, value_name = "K", default_value_t = 10)]
    pub k: usize,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs, and prints what came of it.
pub fn run(args: Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.k > 0 && args.most > 0, "--k and --most: at least 1");
    let config = match args.config.is_file() {
        true => Config::read(&args.config)?,
        false => Config::without_folder(),
    };
    let schema = match &args.schema {
        Some(path) => Arc::new(Schema::load(path)?),
        None => {
            Dataset::open(&config.paths.dataset)
                .context("the requests' schema is needed: give --schema or --config")?
                .schema
        }
    };
    let all = request_log::newest(&args.requests, args.most, |_| true)?;
    let Some(last) = all.last() else { bail!("{} holds no requests", args.requests.display()) };
    let (fm, tae_dim, recorded) = (last.fm.clone(), last.tae_dim, ReplaySchema::new(&schema));
    if !recorded.has(last) {
        bail!(
            "the requests are of schema {}, and this one is {}; give the schema of the daemon's data set",
            last.schema,
            schema_hash(&schema)
        );
    }
    let content_dim = match recorded_content_dim(&all) {
        Some(width) => width,
        None => content::width_in(&config.paths.dataset)?,
    };
    let options = LoadOptions {
        tae_dim,
        fm_version: Some(fm.clone()),
        ..config.load_options(&args.component.display().to_string(), content_dim)
    };
    let engine = Engine::new(config.guests())?;
    let open = |component: &Path, parameters: Option<&Path>| -> anyhow::Result<ServedExpert> {
        let blueprint = Blueprint::load(&engine, component, &schema, &options)?;
        let parameters = match parameters {
            Some(path) => Parameters::restore(&blueprint.graph, SavedParameters::read(path)?)?,
            None => {
                eprintln!(
                    "{}: no parameters given, so it runs with initial values",
                    component.display()
                );
                let columns = blueprint.columns.feature_names().to_vec();
                blueprint.init_parameters(FeatureStatistics::new(&columns).finish(), 0)
            }
        };
        let breaker = config.plugin_limits.breaker();
        Ok(ServedExpert::new(Arc::new(blueprint), parameters, config.device, breaker)?)
    };
    let own = open(&args.component, args.parameters.as_deref())?;
    let other = args
        .against
        .as_ref()
        .map(|path| open(path, args.against_parameters.as_deref()))
        .transpose()?;
    let mut left_out = std::collections::BTreeMap::new();
    let serves = |expert: &ServedExpert, record: &RecordedRequest| {
        expert.blueprint().serves(&schema.surfaces[usize::from(record.example.surface)])
    };
    let fits = |record: &RecordedRequest| {
        let why = if !recorded.has(record) {
            "of another schema"
        } else if record.fm != fm || record.tae_dim != tae_dim {
            "with embeddings of another FM than the newest one's"
        } else if !serves(&own, record)
            || other.as_ref().is_some_and(|other| !serves(other, record))
        {
            "of surfaces that it does not serve"
        } else {
            return true;
        };
        *left_out.entry(why.to_owned()).or_insert(0) += 1;
        false
    };
    let fitting = all.into_iter().filter(fits).map(|record| recorded.upgraded(record));
    let requests: Vec<RecordedRequest> = fitting.collect();
    let label = |path: &Path| path.display().to_string();
    let (own_label, other_label) =
        (label(&args.component), args.against.as_deref().map(label).unwrap_or_default());
    let without_tae = args.without_tae;
    let candidate = ReplayExpert { expert: &own, without_tae, label: &own_label };
    let against =
        other.as_ref().map(|expert| ReplayExpert { expert, without_tae, label: &other_label });
    let mut report = request_log::replay(
        &requests,
        candidate,
        against,
        &ReplaySettings { k: args.k, stop_at_fault: false, stop: &|| false },
    );
    report.left_out.append(&mut left_out);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    Ok(())
}

/// The width of the content vectors in the newest request that has any. None where none has, so
/// that nobody can tell whether the daemon had vectors.
fn recorded_content_dim(requests: &[RecordedRequest]) -> Option<usize> {
    let targets = requests.iter().rev().flat_map(|request| &request.example.targets);
    targets.map(|target| target.item.content.len()).find(|width| *width > 0)
}

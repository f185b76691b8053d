//! `hypercast versions`: which FMs and experts there are, and which of them answers whom.
//!
//! Every change is checked against the registry's rules and refused with the reason; daemons,
//! trainers and the logging tier follow the registry and act on it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use hypercast_config::{Config, PluginLimits};
use hypercast_core::text_table::TextTable;
use hypercast_data::dataset::Dataset;
use hypercast_expert::{Engine as WasmEngine, Provenance, SavedParameters};
use hypercast_fm::checkpoint::FmManifest;
use hypercast_stream::publish::{PublicationFollower, PublicationHeader};
use hypercast_stream::registry::{
    ExpertVersion, FmVersion, NewExpert, Promotion, Registry, RegistryClient, UnappliedDecisions,
    VersionState, WeightsLocation,
};
use hypercast_stream::streams::{self, StreamEngine, Topic};
use hypercast_train::{HeldPublications, HeldVersion};

use super::plugin::host::{Host, HostAccess};

/// Register, promote, roll back and retire versions of the FM and of experts
#[derive(Debug, clap::Args)]
#[command(after_help = "\
An expert's version pins one FM version. The way of a version: training, shadow (it sees requests, and is only
measured), active (it answers), retired. A daemon loads what is promoted before it answers with it, and keeps the
version before for `rollback` until that is retired.

Trainers that publish (`hypercast train ... --follow`) register their versions themselves; `register` is for what was
trained elsewhere.

  hypercast versions list
  hypercast versions list --daemon http://127.0.0.1:8570
  hypercast versions register expert feed 2.0.0 --fm 1.0.0
  hypercast versions promote expert feed 2.0.0 --share 0.1
  hypercast versions promote expert feed 2.0.0
  hypercast versions rollback expert feed")]
pub struct Args {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub action: VersionsCommand,
}

/// What can be done with versions.
#[derive(Debug, clap::Subcommand)]
pub enum VersionsCommand {
    /// Print every version, its state, its pin and who it answers, and what trainers here hold
    List(ListOptions),
    /// Print all that is registered of one version, as JSON
    #[command(subcommand)]
    Show(Which),
    /// Register a version as training: a checkpoint, a trained expert, or what a trainer publishes
    #[command(subcommand)]
    Register(Register),
    /// Let a version answer
    #[command(subcommand)]
    Promote(Promote),
    /// Give an expert's users back to the version that answered before
    #[command(subcommand)]
    Rollback(Rollback),
    /// Let a version see requests, and only be measured
    #[command(subcommand)]
    Shadow(Which),
    /// Put a version out of use; daemons unload it
    #[command(subcommand)]
    Retire(Retire),
    /// Have a training expert go on with another FM version
    #[command(subcommand)]
    PinCommand(PinCommand),
}

/// Options of `versions list`; a daemon is asked only if one is named.
#[derive(Debug, clap::Args)]
pub struct ListOptions {
    /// As JSON, with all that is registered
    #[arg(long)]
    pub json: bool,
    /// Also what came of the versions that share users, as this daemon has counted it:
    /// http://127.0.0.1:8570 or https://HOST
    #[arg(long, value_name = "URL")]
    pub daemon: Option<String>,
    /// Credentials for that daemon.
    #[command(flatten)]
    pub access: HostAccess,
}

/// The version to act on.
#[derive(Debug, clap::Subcommand)]
pub enum Which {
    /// A version of the FM
    Fm {
        /// Its version
        version: String,
    },
    /// A version of an expert
    Expert {
        /// Its name
        name: String,
        /// Its version
        version: String,
    },
}

/// The kind of version to register.
#[derive(Debug, clap::Subcommand)]
pub enum Register {
    /// A checkpoint of the FM, with the version that it says it has
    Fm {
        /// Its folder, which must stay as it is [default: paths.fm]
        #[arg(long, value_name = "DIR")]
        checkpoint: Option<PathBuf>,
        /// Instead, the version that a trainer publishes (`train fm --follow`)
        #[arg(long, value_name = "VERSION", conflicts_with = "checkpoint")]
        published: Option<String>,
        /// The version that it began as
        #[arg(long, value_name = "VERSION")]
        parent: Option<String>,
    },
    /// A trained expert; its plugin and parameters are copied to its version's own folder
    Expert(RegisterExpert),
}

/// The expert version to register.
#[derive(Debug, clap::Args)]
pub struct RegisterExpert {
    /// Its name; what is not given is taken from its entry in the configuration
    pub name: String,
    /// Its version, as 1.0.0
    pub version: String,
    /// The FM version that it pins [default: the one that its parameters were trained with]
    #[arg(long, value_name = "VERSION")]
    pub fm: Option<String>,
    /// The component
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// Its parameters
    #[arg(long, value_name = "FILE")]
    pub parameters: Option<PathBuf>,
    /// Its parameters are those that a trainer publishes (`train expert --follow`)
    #[arg(long, conflicts_with = "parameters")]
    pub published: bool,
    /// The surfaces that it serves, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub surfaces: Vec<String>,
    /// The version that it began as
    #[arg(long, value_name = "VERSION")]
    pub parent: Option<String>,
}

/// The kind of version to promote.
#[derive(Debug, clap::Subcommand)]
pub enum Promote {
    /// A version of the FM: experts that pin it can be promoted. Several may be active
    Fm {
        /// Its version
        version: String,
    },
    /// A version of an expert
    Expert {
        /// Its name
        name: String,
        /// Its version
        version: String,
        /// The share of the expert's users that it answers; those that answer now keep the rest
        #[arg(long, default_value_t = 1.0)]
        share: f64,
        /// Take the place of other experts on its surfaces
        #[arg(long)]
        replace: bool,
    },
}

/// What is rolled back.
#[derive(Debug, clap::Subcommand)]
pub enum Rollback {
    /// An expert, to the version or shares before
    Expert {
        /// Its name
        name: String,
    },
}

/// The kind of version to retire.
#[derive(Debug, clap::Subcommand)]
pub enum Retire {
    /// A version of the FM that no expert pins
    Fm {
        /// Its version
        version: String,
    },
    /// A version of an expert that answers nobody
    Expert {
        /// Its name
        name: String,
        /// Its version
        version: String,
        /// Even the only one that answers: its surfaces then get the FM's own ranking, marked
        /// degraded
        #[arg(long)]
        unserve: bool,
    },
}

/// The expert to pin, and the FM version.
#[derive(Debug, clap::Subcommand)]
pub enum PinCommand {
    /// A version of an expert
    Expert {
        /// Its name
        name: String,
        /// Its version
        version: String,
        /// The FM version
        fm: String,
    },
}

/// Does it, and prints what is registered then.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let engine = streams::open(&config.engine)?;
    let versions = RegistryClient::new(&*engine);
    let registry = match args.action {
        VersionsCommand::List(options) => {
            let (registry, held) = (versions.read()?, HeldVersion::all(&config)?);
            return list(&registry, &held, &config.plugin_limits, options);
        }
        VersionsCommand::Show(which) => {
            return show(&versions.read()?, &which, &HeldVersion::all(&config)?);
        }
        VersionsCommand::Register(what) => register(&config, &engine, what)?,
        VersionsCommand::Promote(Promote::Fm { version }) => {
            versions.decide(|r| r.promote_fm(&version))?
        }
        VersionsCommand::Promote(Promote::Expert { name, version, share, replace }) => {
            let promotion = Promotion { name, version, share, replace };
            versions.decide(|r| r.promote_expert(&promotion))?
        }
        VersionsCommand::Rollback(Rollback::Expert { name }) => {
            versions.decide(|r| r.roll_back(&name))?
        }
        VersionsCommand::Shadow(which) => versions.decide(|r| match &which {
            Which::Fm { version } => r.shadow_fm(version),
            Which::Expert { name, version } => r.shadow_expert(name, version),
        })?,
        VersionsCommand::Retire(which) => versions.decide(|r| match &which {
            Retire::Fm { version } => r.retire_fm(version),
            Retire::Expert { name, version, unserve } => r.retire_expert(name, version, *unserve),
        })?,
        VersionsCommand::PinCommand(PinCommand::Expert { name, version, fm }) => {
            versions.decide(|r| r.pin(&name, &version, &fm))?
        }
    };
    print!("{}", table(&registry));
    Ok(())
}

fn list(
    registry: &Registry,
    held: &[HeldVersion],
    limits: &PluginLimits,
    options: ListOptions,
) -> anyhow::Result<()> {
    let ListOptions { json, daemon, access } = options;
    let daemon = daemon.map(|host| Host { host, access });
    let arms =
        daemon.map(|daemon| Ok::<_, anyhow::Error>(daemon.get::<LiveArms>("/v1/live")?.arms));
    let arms = arms.transpose()?;
    if json {
        let mut all = serde_json::to_value(registry)?;
        all["held"] = serde_json::to_value(held)?;
        if let Some(arms) = arms {
            all["arms"] = serde_json::to_value(arms)?;
        }
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        print!("{}{}{}", table(registry), held_lines(held), over_lines(registry, limits));
        arms.into_iter().for_each(|arms| print!("\n{}", arm_table(&arms)));
    }
    Ok(())
}

/// What a daemon says of the versions that share users.
#[derive(Debug, Deserialize)]
struct LiveArms {
    arms: Vec<LiveArm>,
}

/// A version's outcomes for a task, beside those of the version with the largest share.
#[derive(Debug, Serialize, Deserialize)]
struct LiveArm {
    surface: String,
    task: String,
    arm: String,
    share: f64,
    rows: u64,
    users: u64,
    mean: Option<f64>,
    against: Option<String>,
    difference: Option<f64>,
    low: Option<f64>,
    high: Option<f64>,
    p: Option<f64>,
}

/// The versions that share users. The interval and p hold whenever somebody looks.
fn arm_table(arms: &[LiveArm]) -> String {
    if arms.is_empty() {
        return "no two versions share users, or none of their outcomes is known yet\n".into();
    }
    let head =
        ["surface", "task", "arm", "share", "rows", "users", "mean", "difference", "95 %", "p"];
    let mut table = TextTable::new(3, head);
    for arm in arms {
        let number = |value: Option<f64>| value.map_or_else(String::new, |of| format!("{of:.4}"));
        let interval = arm.low.zip(arm.high).map(|(low, high)| format!("[{low:.4}, {high:.4}]"));
        table.line([
            arm.surface.clone(),
            arm.task.clone(),
            arm.arm.clone(),
            format!("{:.1} %", arm.share * 100.0),
            arm.rows.to_string(),
            arm.users.to_string(),
            number(arm.mean),
            number(arm.difference),
            interval.unwrap_or_default(),
            number(arm.p),
        ]);
    }
    table.to_string()
}

fn register(
    config: &Config,
    engine: &Arc<dyn StreamEngine>,
    what: Register,
) -> anyhow::Result<Registry> {
    let Dataset { schema, content: content_dim, .. } = Dataset::open(&config.paths.dataset)?;
    let versions = RegistryClient::new(&**engine);
    match what {
        Register::Fm { checkpoint, published: version, parent } => {
            let (manifest, weights) = match version {
                Some(version) => {
                    let header = published(engine, Topic::fm(&version))?;
                    (serde_json::from_str(&header.manifest)?, WeightsLocation::Published)
                }
                None => {
                    let dir = checkpoint.unwrap_or_else(|| config.paths.fm.clone());
                    let manifest = FmManifest::read(&dir)?;
                    let dir = dir.canonicalize().with_context(|| dir.display().to_string())?;
                    (manifest, WeightsLocation::Path(dir))
                }
            };
            let fm = FmVersion { parent, ..FmVersion::new(&manifest, &schema, weights) };
            Ok(versions.decide(|registry| registry.register_fm(&fm))?)
        }
        Register::Expert(of) => {
            let RegisterExpert { name, version, fm, plugin, parameters, surfaces, parent, .. } = of;
            let entry = config.experts.iter().find(|entry| entry.name == name);
            let plugin =
                plugin.or_else(|| entry.map(|entry| entry.plugin.clone())).with_context(|| {
                    format!("the configuration has no expert {name:?}; give --plugin")
                })?;
            let (weights, trained): (WeightsLocation, Provenance) = if of.published {
                let header = published(engine, Topic::expert(&name, &version))?;
                (WeightsLocation::Published, serde_json::from_str(&header.manifest)?)
            } else {
                let own = || entry.map(|entry| config.parameters(entry));
                let file = parameters.or_else(own).with_context(|| {
                    format!("the configuration has no expert {name:?}; give --parameters")
                })?;
                let trained = SavedParameters::read(&file)?.provenance;
                (WeightsLocation::Path(file), trained)
            };
            let surfaces = match (surfaces.is_empty(), entry) {
                (false, _) => surfaces,
                (true, Some(entry)) => config
                    .serving_surfaces(entry, &schema)?
                    .into_iter()
                    .map(|at| schema.surfaces[usize::from(at)].clone())
                    .collect(),
                (true, None) => {
                    anyhow::bail!("the configuration has no expert {name:?}; give --surfaces")
                }
            };
            let new = NewExpert {
                plugin,
                weights,
                fm: fm.unwrap_or(trained.fm_version),
                tae_dim: trained.tae_dim,
                content_dim,
                without_tae: entry.is_some_and(|entry| entry.without_tae),
                surfaces,
                name,
                version,
            };
            let wasm = WasmEngine::new(config.guests())?;
            let expert = ExpertVersion { parent, ..new.describe(config, &wasm, &schema)? };
            Ok(versions.decide(|registry| {
                registry.check_flops_share(&expert, config)?;
                // What is refused leaves its number to a smaller one.
                registry.register_expert(&expert.clone().keep_files(&config.paths.experts)?)
            })?)
        }
    }
}

/// What the first publication that is still kept says of itself.
fn published(engine: &Arc<dyn StreamEngine>, topic: Topic) -> anyhow::Result<PublicationHeader> {
    let mut follower = PublicationFollower::open(engine.clone(), topic.clone())?;
    let first = follower.next(Duration::ZERO)?.with_context(|| {
        format!("nothing is published in stream {topic} yet; start its trainer with --follow")
    })?;
    Ok(first.header)
}

fn show(registry: &Registry, which: &Which, held: &[HeldVersion]) -> anyhow::Result<()> {
    let held = |kind: &str, version: &str| {
        let own = held.iter().find(|own| own.kind == kind && own.version == version);
        own.map(|own| own.held.clone())
    };
    let text = match which {
        Which::Fm { version } => {
            let fm = registry.fm(version).with_context(|| format!("no FM {version}"))?;
            let pins: Vec<String> = registry
                .pins(version)
                .iter()
                .map(|pin| format!("{} {}", pin.name, pin.version))
                .collect();
            serde_json::to_string_pretty(&serde_json::json!({
                "fm": fm, "pinned_by": pins, "held": held("fm", version),
            }))?
        }
        Which::Expert { name, version } => {
            let expert = registry
                .expert_version(name, version)
                .with_context(|| format!("no expert {name} {version}"))?;
            let share = registry.expert(name).map_or(0.0, |all| all.share(version));
            serde_json::to_string_pretty(&serde_json::json!({
                "expert": expert, "share": share, "held": held(name, version),
            }))?
        }
    };
    println!("{text}");
    Ok(())
}

/// What trainers on this machine hold, a line each.
fn held_lines(held: &[HeldVersion]) -> String {
    let line = |HeldVersion { kind, version, held }: &HeldVersion| {
        let HeldPublications { in_a_row, reason, .. } = held;
        format!("{kind} {version}: {in_a_row} publications held: {reason}\n")
    };
    held.iter().map(line).collect()
}

/// Versions in use that cost more than new ones may, a line each.
fn over_lines(registry: &Registry, limits: &PluginLimits) -> String {
    let line = |version: &ExpertVersion| {
        let ExpertVersion { name, version: number, surfaces, .. } = version;
        let over = limits.check_flops_share(surfaces, registry.flops_share(version)?).err()?;
        Some(format!("{name} {number}: {over}; a new component like it is refused\n"))
    };
    let versions = registry.experts().flat_map(|(_, expert)| expert.in_order());
    let in_use = versions.filter(|version| version.state != VersionState::Retired);
    in_use.filter_map(line).collect()
}

/// Every version in a line.
pub fn table(registry: &Registry) -> String {
    let missing = registry.unapplied().map_or_else(String::new, |unapplied| {
        let UnappliedDecisions { count, first } = unapplied;
        format!("incomplete: {count} decisions are left out; the first is {first}\n")
    });
    if registry.is_empty() {
        return missing + "nothing is registered: the configuration says what serves\n";
    }
    let mut lines = vec![
        ["kind", "version", "state", "share", "FM", "TAE", "weights", "surfaces"]
            .map(str::to_owned),
    ];
    for fm in registry.fms() {
        lines.push([
            "fm".into(),
            fm.version.clone(),
            fm.state.to_string(),
            String::new(),
            String::new(),
            fm.tae_dim.to_string(),
            place(&fm.weights),
            String::new(),
        ]);
    }
    for (name, expert) in registry.experts() {
        for version in expert.in_order() {
            let share = match (version.state, expert.share(&version.version)) {
                (VersionState::Active, share) if share > 0.0 => format!("{:.1} %", share * 100.0),
                (VersionState::Active, _) => "standby".into(),
                _ => String::new(),
            };
            lines.push([
                name.to_owned(),
                version.version.clone(),
                version.state.to_string(),
                share,
                version.fm.clone(),
                version.tae_dim.to_string(),
                place(&version.weights),
                version.surfaces.join(","),
            ]);
        }
    }
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..8).map(|column| width(column).unwrap_or(0)).collect();
    let line = |cells: &[String; 8]| {
        let cells: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    missing + &lines.iter().map(line).collect::<String>()
}

fn place(weights: &WeightsLocation) -> String {
    match weights {
        WeightsLocation::Path(_) => "files".into(),
        WeightsLocation::Published => "published".into(),
    }
}

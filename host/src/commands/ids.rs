//! `hypercast data ids`: whose keys keys are, where the schema says that ids are strings.
//!
//! Feature logs, dead letters and messages of models name users and items by their keys. The texts
//! are in the data set's dictionaries, and in those that the daemons of this machine keep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use hypercast_config::Config;
use hypercast_data::dataset::id_dictionary::IdDictionary;
use hypercast_data::dataset::ids::{ITEM_IDS, IdDictionaryWriter, USER_IDS, for_each_id};
use hypercast_data::schema::{IdKind, Schema};
use serde_json::Value;

/// Arguments of `hypercast data ids`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Keys whose ids to print
    #[arg(value_name = "KEY", required_unless_present = "into")]
    pub keys: Vec<u64>,
    /// Write all keys with their ids to this Parquet file, in the columns `key` and `id`
    #[arg(long, value_name = "FILE", conflicts_with = "keys")]
    pub into: Option<PathBuf>,
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
}

/// Prints or writes what was asked for.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let ids = known_ids(&Config::read(&args.config)?)?;
    match &args.into {
        None => {
            for key in &args.keys {
                let id =
                    ids.get(key).with_context(|| format!("no id with the key {key} is known"))?;
                println!("{key}\t{id}");
            }
        }
        Some(path) => {
            let dir = path.parent().unwrap_or(Path::new(""));
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.with_context(|| format!("{}: not a file's name", path.display()))?;
            let (count, mut writer) = (ids.len(), IdDictionaryWriter::create(dir, name)?);
            for (key, id) in ids {
                writer.write(key, id)?;
            }
            writer.finish()?;
            println!("{count} ids written to {}", path.display());
        }
    }
    Ok(())
}

/// The ids that are texts and whose keys are numbers in `value`, by key. None without a schema.
pub(super) fn named_in(config: &Config, value: &Value) -> BTreeMap<u64, String> {
    let known = known_ids(config).unwrap_or_default();
    let (mut named, mut rest) = (BTreeMap::new(), vec![value]);
    while let Some(value) = rest.pop() {
        match value {
            Value::Array(values) => rest.extend(values),
            Value::Object(fields) => rest.extend(fields.values()),
            _ => {
                let id = value.as_u64().and_then(|key| known.get_key_value(&key));
                named.extend(id.map(|(&key, id)| (key, id.clone())));
            }
        }
    }
    named
}

/// All ids that are texts, by key.
fn known_ids(config: &Config) -> anyhow::Result<BTreeMap<u64, String>> {
    let mut ids = BTreeMap::new();
    let dataset = &config.paths.dataset;
    let declared = Schema::load(&dataset.join("schema.toml"))?.ids;
    for (kind, file) in [(declared.users, USER_IDS), (declared.items, ITEM_IDS)] {
        if kind == IdKind::String {
            for_each_id(dataset, file, |id| {
                ids.insert(id.key().key, id.text().to_owned());
                Ok(())
            })?;
        }
    }
    let kept = config.paths.state.join("ids");
    let folders = if kept.is_dir() { kept.read_dir()?.collect::<Result<_, _>>()? } else { vec![] };
    for folder in folders {
        if let Some(dictionary) = IdDictionary::read(&folder.path())? {
            dictionary.for_each(|id| {
                ids.insert(id.key().key, id.text().to_owned());
                Ok(())
            })?;
        }
    }
    Ok(ids)
}

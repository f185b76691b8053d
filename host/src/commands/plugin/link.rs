//! `hypercast plugin link COMPONENT`: names a component in a `hypercast.toml`, and has a running
//! daemon read that file again.
//!
//! It is for an author's own machine: a version that others are to trust is pushed. The rest of the
//! file, with its comments, stays as it is.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use hypercast_config::Config;
use hypercast_core::atomic_file;

use super::host::{Host, HostAccess};
use super::read;
use super::subject::PluginUnderTest;

/// Arguments of `hypercast plugin link`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The component, as `cargo hypercast build` writes it
    pub component: PathBuf,
    /// The configuration to change
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// The schema that it is to fit [default: that of the configuration's data set, or that of
    /// `hypercast simulate`]
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// Trained parameters to serve it with; those that it has already if missing
    #[arg(long, value_name = "FILE")]
    pub parameters: Option<PathBuf>,
    /// A daemon that runs with this configuration, to read it again
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// Credentials for that daemon.
    #[command(flatten)]
    pub access: HostAccess,
}

/// Checks the component, changes the configuration, and tells the daemon.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let of_dataset = config.paths.dataset.join("schema.toml");
    let loaded = PluginUnderTest {
        file: args.component.clone(),
        schema: args.schema.or_else(|| of_dataset.is_file().then_some(of_dataset)),
        config: Some(args.config.clone()),
        tae_dim: None,
        max_flops: None,
    }
    .load()?;
    let description = &loaded.blueprint.description;
    let component = std::fs::canonicalize(&args.component)
        .with_context(|| args.component.display().to_string())?;
    let text = String::from_utf8(read(&args.config)?)
        .with_context(|| args.config.display().to_string())?;
    let text = linked(&text, &description.name, &component, &description.surfaces);
    replace_config(&args.config, &text, &description.name, &component)?;
    let config = Config::read(&args.config)?;
    let parameters = config.parameters(config.expert(&description.name)?);
    if let Some(given) = &args.parameters {
        let folder = parameters.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        atomic_file::write(&parameters, &read(given)?)
            .with_context(|| parameters.display().to_string())?;
    }
    println!("{} serves {} by {}", description.name, component.display(), args.config.display());
    if !parameters.is_file() {
        println!(
            "it has no parameters yet: `hypercast train expert {}`, or `link --parameters FILE`",
            description.name
        );
    } else if let Some(host) = args.host {
        let daemon = Host { host, access: args.access };
        let outcome: Value = daemon.post("/v1/admin/reload", b"")?;
        println!("{} read it again: {outcome}", daemon.host);
    }
    Ok(())
}

/// Writes the changed configuration, if it says what it should.
fn replace_config(file: &Path, text: &str, name: &str, plugin: &Path) -> anyhow::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    // Beside it, because its paths start there.
    let trial = tempfile::Builder::new().suffix(".toml").tempfile_in(folder)?;
    atomic_file::write(trial.path(), text.as_bytes())?;
    let by_hand = || {
        format!(
            "{} is left as it is; name the component by hand: [[experts]] with name = {name:?} and \
             plugin = {:?}",
            file.display(),
            plugin.display().to_string()
        )
    };
    let changed = Config::read(trial.path()).with_context(by_hand)?;
    let names_it = changed.expert(name).is_ok_and(|entry| entry.plugin == plugin);
    anyhow::ensure!(names_it, by_hand());
    atomic_file::write(file, text.as_bytes()).with_context(|| file.display().to_string())
}

/// The configuration with the component in the entry of the expert, which is added if it is
/// missing.
fn linked(text: &str, name: &str, plugin: &Path, surfaces: &[String]) -> String {
    let plugin = format!("plugin = {:?}", plugin.display().to_string());
    let mut lines: Vec<&str> = text.lines().collect();
    let is_key = |line: &str, key: &str| {
        line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    let is_named = |line: &&str| {
        is_key(line, "name") && line.split('"').nth(1).is_some_and(|value| value == name)
    };
    let starts = (0..lines.len()).filter(|at| lines[*at].trim() == "[[experts]]");
    for start in starts.collect::<Vec<_>>() {
        let rest = &lines[start + 1..];
        let end = rest.iter().position(|line| line.trim_start().starts_with('['));
        let end = end.map_or(lines.len(), |length| start + 1 + length);
        if !lines[start..end].iter().any(is_named) {
            continue;
        }
        if let Some(at) = (start..end).find(|at| is_key(lines[*at], "plugin")) {
            lines[at] = &plugin;
            return lines.join("\n") + "\n";
        }
    }
    format!(
        "{}\n[[experts]]\nname = {name:?}\n{plugin}\nsurfaces = {surfaces:?}\n",
        lines.iter().map(|line| format!("{line}\n")).collect::<String>()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_is_added_once_and_then_renewed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hypercast.toml");
        let before = "# Ours.\n[server]\nlisten = \"127.0.0.1:8570\"\n";
        let (first, second) = (Path::new("/a/feed.wasm"), Path::new("/b/feed.wasm"));
        let added = linked(before, "feed", first, &["feed".into()]);
        replace_config(&file, &added, "feed", first).unwrap();
        let other = linked(&added, "search", first, &["search".into()]);
        let renewed = linked(&other, "feed", second, &["feed".into()]);
        replace_config(&file, &renewed, "feed", second).unwrap();
        let config = Config::read(&file).unwrap();
        let entries: Vec<_> =
            config.experts.iter().map(|entry| (entry.name.as_str(), &*entry.plugin)).collect();
        assert_eq!(entries, [("feed", second), ("search", first)]);
        assert_eq!(config.expert("feed").unwrap().surfaces, ["feed"]);
        assert!(renewed.starts_with(before), "the rest stays: {renewed}");
        let refused = replace_config(&file, "[server]\n", "feed", second).unwrap_err();
        assert!(refused.to_string().contains("by hand"), "{refused}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), renewed);
    }
}

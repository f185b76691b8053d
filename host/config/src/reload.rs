//! Reloads of the configuration while a daemon runs: some keys take effect at once, the others at
//! the next start.

use std::collections::BTreeSet;

use toml::{Table, Value};

use crate::Config;
use crate::error::{CommonErrors as _, Error, Result};

/// Keys that take effect on reload. All others determine something that was created at the start.
pub const RELOADABLE_KEYS: [&str; 15] = [
    "experts",
    "fm_logging.max_body_bytes",
    "fm_serving.max_body_bytes",
    "rollout.trusted_keys",
    "server.admin",
    "server.admin_tokens",
    "server.deadline_ms",
    "server.explain",
    "server.insecure_admin",
    "server.log",
    "server.max_body_bytes",
    "server.max_candidates",
    "server.tls_certificate",
    "server.tls_key",
    "server.tokens",
];

/// The result of a reload.
#[derive(Debug, Clone, PartialEq)]
pub struct Reloaded {
    /// The old configuration with the new values of keys that take effect on reload.
    pub config: Config,
    /// The keys that changed.
    pub changed: Vec<String>,
    /// The keys that differ but keep their old values until the next start.
    pub waiting: Vec<String>,
}

impl Config {
    /// This configuration with the values of `file` for keys that take effect on reload.
    ///
    /// # Errors
    /// A configuration cannot be represented as TOML, which does not happen to one that was read
    /// from a file.
    pub fn reloaded(&self, file: &Config) -> Result<Reloaded> {
        let wrong = |error: String| Error::internal(format!("the configuration: {error}"));
        let table = |of: &Config| Table::try_from(of).map_err(|error| wrong(error.to_string()));
        let (mut old, new) = (table(self)?, table(file)?);
        // A listener cannot change between HTTP and HTTPS.
        let same_kind = self.server.has_tls() == file.server.has_tls();
        let live =
            |key: &str| RELOADABLE_KEYS.contains(&key) && (same_kind || !key.contains(".tls_"));
        let (mut changed, mut waiting) = (Vec::new(), Vec::new());
        for [part, key] in differing_keys(&old, &new) {
            let name = if key.is_empty() { part.clone() } else { format!("{part}.{key}") };
            if !live(&name) {
                waiting.push(name);
                continue;
            }
            changed.push(name);
            let value = value_at(&new, &part, &key).cloned();
            put(&mut old, part, key, value);
        }
        let config = old.try_into().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
        Ok(Reloaded { config, changed, waiting })
    }
}

/// Pairs of a table and a key; a value outside of tables has an empty key.
fn keys(config: &Table) -> BTreeSet<[String; 2]> {
    let of_part = |(part, value): (&String, &Value)| -> Vec<[String; 2]> {
        match value {
            Value::Table(table) => table.keys().map(|key| [part.clone(), key.clone()]).collect(),
            _ => vec![[part.clone(), String::new()]],
        }
    };
    config.iter().flat_map(of_part).collect()
}

/// The keys whose values differ, each with its table; a value outside of tables has an empty key.
pub fn differing_keys(old: &Table, new: &Table) -> Vec<[String; 2]> {
    let differs = |[part, key]: &[String; 2]| value_at(old, part, key) != value_at(new, part, key);
    keys(old).union(&keys(new)).filter(|key| differs(key)).cloned().collect()
}

/// The value of a key of a table.
pub fn value_at<'a>(config: &'a Table, part: &str, key: &str) -> Option<&'a Value> {
    let value = config.get(part)?;
    if key.is_empty() { Some(value) } else { value.get(key) }
}

fn put(config: &mut Table, part: String, key: String, value: Option<Value>) {
    let (table, key) = if key.is_empty() {
        (config, part)
    } else {
        match config.get_mut(&part) {
            Some(Value::Table(table)) => (table, key),
            _ => unreachable!("both configurations have the same tables"),
        }
    };
    match value {
        Some(value) => table.insert(key, value),
        None => table.remove(&key),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn what_can_change_does_and_the_rest_is_named() {
        let old = config("[server]\ndeadline_ms = 10\n");
        let file = config(
            "device = 'cuda'\n[server]\ndeadline_ms = 20\nthreads = 9\n[fm_serving]\ndevice = 'cpu'\n\
             [[experts]]\nname = 'a'\nplugin = 'a.wasm'\n",
        );
        let Reloaded { config: now, changed, waiting } = old.reloaded(&file).unwrap();
        assert_eq!(changed, ["experts", "server.deadline_ms"]);
        assert_eq!(waiting, ["device", "fm_serving.device", "server.threads"]);
        let mut expected = old.clone();
        expected.server.deadline_ms = 20;
        expected.experts = file.experts.clone();
        assert_eq!(now, expected);
        let back = now.reloaded(&old).unwrap();
        assert_eq!((back.config, back.waiting), (old.clone(), Vec::new()));
        assert_eq!(old.reloaded(&old).unwrap().changed, Vec::<String>::new());
    }

    #[test]
    fn every_reloadable_key_is_a_key() {
        let all = Table::try_from(Config::default()).unwrap();
        for name in RELOADABLE_KEYS {
            let (part, key) = name.split_once('.').unwrap_or((name, ""));
            assert!(value_at(&all, part, key).is_some(), "{name}");
        }
    }

    /// The keys in the first column of the table in the operator's guide. A name without its table
    /// is of the table that was named last.
    #[test]
    fn the_operators_guide_lists_every_reloadable_key_and_no_other() {
        let guide = include_str!("../../README.md");
        let (_, section) = guide.split_once("## Configuration and its reload").unwrap();
        let (section, _) = section.split_once("\n## ").unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| ")).skip(1);
        let (mut listed, mut table) = (BTreeSet::new(), "");
        for cell in rows.filter_map(|row| row.split('|').nth(1)) {
            for name in cell.split('`').skip(1).step_by(2) {
                let key = match name.split_once('.') {
                    _ if name == "[[experts]]" => "experts".to_owned(),
                    Some((own, _)) => {
                        table = own;
                        name.to_owned()
                    }
                    None => format!("{table}.{name}"),
                };
                listed.insert(key);
            }
        }
        assert_eq!(listed, RELOADABLE_KEYS.map(str::to_owned).into());
    }

    #[test]
    fn a_listener_stays_of_its_kind() {
        let plain = config("");
        let one = config("[server]\ntls_certificate = 'a'\ntls_key = 'b'\n");
        let other = config("[server]\ntls_certificate = 'c'\ntls_key = 'd'\n");
        let keys = ["server.tls_certificate", "server.tls_key"];
        assert_eq!(plain.reloaded(&one).unwrap().waiting, keys);
        assert_eq!(one.reloaded(&plain).unwrap().waiting, keys);
        assert_eq!(one.reloaded(&other).unwrap().changed, keys);
    }
}

//! Command-line options. A full argument parser would triple the build time of this crate.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// The options of one command, and what follows `--`.
#[derive(Debug, Default)]
pub struct Options {
    values: BTreeMap<String, String>,
    /// Arguments after `--`, passed on as they are.
    pub rest: Vec<String>,
}

impl Options {
    /// Reads `--name value`, `--name=value` and the flags `--name`.
    pub fn parse(args: &[String], valued: &[&str], flags: &[&str]) -> Result<Self> {
        let mut options = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                options.rest = args.cloned().collect();
                break;
            }
            let name =
                arg.strip_prefix("--").with_context(|| format!("unexpected argument {arg:?}"))?;
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let value = if flags.contains(&name) {
                inline.unwrap_or_default()
            } else if valued.contains(&name) {
                inline
                    .or_else(|| args.next().cloned())
                    .with_context(|| format!("--{name} needs a value"))?
            } else {
                bail!("unknown option --{name}; `cargo xtask help` lists the options");
            };
            options.values.insert(name.to_owned(), value);
        }
        Ok(options)
    }

    /// The value of an option, if it was given.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Whether a flag was given.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The values of a comma-separated option, each of which must be in `known`; all of `known` if
    /// the option was not given.
    pub fn choice<'a>(&self, name: &str, known: &[&'a str]) -> Result<Vec<&'a str>> {
        let Some(list) = self.value(name) else { return Ok(known.to_vec()) };
        let find = |wanted: &str| {
            known.iter().copied().find(|known| *known == wanted).with_context(|| {
                format!("--{name} {wanted}: unknown; known are {}", known.join(", "))
            })
        };
        list.split(',').map(|wanted| find(wanted.trim())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options> {
        let args: Vec<String> = args.iter().map(|arg| arg.to_string()).collect();
        Options::parse(&args, &["only", "rev"], &["list"])
    }

    #[test]
    fn values_flags_and_the_rest_are_told_apart() {
        let options =
            parse(&["--only", "a,b", "--list", "--rev=x", "--", "--python", "p"]).unwrap();
        assert_eq!(options.value("rev"), Some("x"));
        assert!(options.has("list"));
        assert_eq!(options.rest, ["--python", "p"]);
        assert_eq!(options.choice("only", &["b", "a", "c"]).unwrap(), ["a", "b"]);
        assert_eq!(options.choice("steps", &["b", "a"]).unwrap(), ["b", "a"]);
    }

    #[test]
    fn mistakes_are_errors() {
        assert!(parse(&["--onyl", "a"]).is_err());
        assert!(parse(&["--only"]).is_err());
        assert!(parse(&["a"]).is_err());
        let error = parse(&["--only", "d"]).unwrap().choice("only", &["a"]).unwrap_err();
        assert_eq!(error.to_string(), "--only d: unknown; known are a");
    }
}

//! A first mapping, proposed from what is in the files: a person looks at it and corrects it.

mod roles;
mod sample;
mod tags;
mod write;

use std::path::{Path, PathBuf};

use hypercast_core::atomic_file;

use self::roles::Roles;
use self::sample::Sample;
use self::write::{Findings, MappingText};
use crate::error::{CommonErrors as _, Error, Result};
use crate::input::{FileFormat, InputFile, InputOptions};
use crate::mapping::Mapping;

/// The files to look at, and where the mapping goes.
#[derive(Debug, Clone, Default)]
pub struct InferOptions {
    /// The log, with `*` for any part of a name and `**` for folders.
    pub impressions: Vec<String>,
    /// The files of items.
    pub items: Vec<String>,
    /// The files of users.
    pub users: Vec<String>,
    /// The form of the files' rows, where their endings do not say it.
    pub format: Option<FileFormat>,
    /// Columns of the log that are known.
    pub hints: ColumnHints,
    /// The mapping to write.
    pub into: PathBuf,
}

/// Columns of a log that need not be guessed.
#[derive(Debug, Clone, Default)]
pub struct ColumnHints {
    /// That of the user's id.
    pub user: Option<String>,
    /// That of the item's id.
    pub item: Option<String>,
    /// That of the time when the item was shown.
    pub time: Option<String>,
    /// That of the place where it was shown.
    pub surface: Option<String>,
}

/// Looks at the first rows of each file and writes a mapping, each line with its reason. The
/// mapping imports as it is.
///
/// # Errors
/// A file cannot be read, no column is like a user, an item, a time or an action, or the mapping
/// exists.
pub fn infer(options: &InferOptions) -> Result<()> {
    let into = &options.into;
    if into.exists() {
        let reason = "it exists, and may have been corrected; remove it or name another file";
        return Err(Error::data(into, reason));
    }
    let absolute = options.with_absolute_files()?;
    let find = |patterns: &[String]| match patterns {
        [] => Ok(None),
        _ => {
            let input = InputOptions { format: options.format, ..InputOptions::default() };
            let files = InputFile::find(patterns, Path::new(""), &input)?;
            Sample::read(&files).map(Some)
        }
    };
    let Some(log) = find(&absolute.impressions)? else {
        return Err(Error::invalid("no files of impressions are named"));
    };
    let (items, users) = (find(&absolute.items)?, find(&absolute.users)?);
    let roles = Roles::find(&log, items.as_ref(), users.as_ref(), &options.hints)?;
    if roles.actions.is_empty() && roles.ratings.is_empty() {
        let reason = "no column of the impressions says yes or no about what a user did, as \
                      `clicked` would, or how much an item was liked, as `rating` would; without \
                      one there is nothing to learn";
        return Err(Error::invalid(reason));
    }
    // A mapping in this folder keeps the names that were given.
    let is_here = into.parent().is_none_or(|parent| parent == Path::new(""));
    let named = if is_here { options } else { &absolute };
    let (items, users) = (items.as_ref(), users.as_ref());
    let findings = Findings { options: named, roles, log: &log, items, users };
    let text = MappingText::write(&findings, &into.display().to_string());
    Mapping::parse(&text, into)?;
    atomic_file::write(into, text.as_bytes()).map_err(Error::io(into))
}

impl InferOptions {
    /// The same with names of files that mean the same in any folder.
    fn with_absolute_files(&self) -> Result<InferOptions> {
        let here = std::env::current_dir().map_err(Error::io("."))?;
        let here = glob::Pattern::escape(&here.to_string_lossy());
        let full = |patterns: &[String]| -> Vec<String> {
            let full = |pattern: &String| Path::new(&here).join(pattern);
            patterns.iter().map(|pattern| full(pattern).to_string_lossy().into_owned()).collect()
        };
        Ok(InferOptions {
            impressions: full(&self.impressions),
            items: full(&self.items),
            users: full(&self.users),
            ..self.clone()
        })
    }
}

#[cfg(test)]
mod tests;

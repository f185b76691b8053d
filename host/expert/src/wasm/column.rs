//! The kinds of columns that this host knows.
//!
//! A column of the contract is a kind and a name, both texts. It is read once, when a plugin is
//! loaded; a kind that the host does not know is refused by its name.
//!
//! To add a kind: a variant here with its text in `KINDS`, where its values are in `batch`, its
//! type in `graph::validate` if networks read it, and what it contains in `sdk/wit/expert.wit`.

use hypercast_data::schema::{OwnColumns, Schema};

use super::contract::{FM_LOGIT, HostInfo, OfferedColumn, VECTOR, WireColumn, offered, quote};

/// A column of a kind that the host knows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeclaredColumn {
    /// The FM's target-aware embedding.
    Tae,
    /// A numeric feature, standardised for a network.
    Feature(String),
    /// A numeric feature as it is, for a network.
    RawFeature(String),
    /// A categorical feature or raw id.
    Id(String),
    /// A vector of the item.
    Vector(String),
    /// The FM's own prediction of a task.
    FmLogit(String),
    /// The time of the request.
    Time,
    /// The request's place in the batch.
    Request,
    /// The position at which the item was ranked before it was shown.
    RankedPosition,
    /// The probability that the rule gave for that.
    RankedPropensity,
    /// A categorical feature of the items in the short history.
    HistoryId(String),
    /// The actions of the short history.
    HistoryActions,
    /// The age of the short history's events.
    HistoryAge,
}

/// Who reads a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ColumnReader {
    Network,
    Rank,
    Hooks,
}

impl ColumnReader {
    /// The list of the description that declares its columns.
    fn list(self) -> &'static str {
        match self {
            ColumnReader::Network => "columns",
            ColumnReader::Rank => "rank-columns",
            ColumnReader::Hooks => "training-columns",
        }
    }

    /// What may read and what it can read.
    fn rule(self) -> &'static str {
        match self {
            ColumnReader::Network => "a network reads no time, no request and nothing of a ranking",
            ColumnReader::Rank => "`rank` reads tae, feature, id, vector and fm-logit columns only",
            ColumnReader::Hooks => {
                "hooks (`labels`, `sample`, `weights`, `evaluate-rows`) read no raw-feature and no \
                 column of the history"
            }
        }
    }
}

/// A kind with a name makes a column of it; one without has a column already.
#[derive(Clone, Copy)]
enum Kind {
    Named(fn(String) -> DeclaredColumn),
    Nameless(fn() -> DeclaredColumn),
}

const KINDS: [(&str, Kind); 13] = [
    ("tae", Kind::Nameless(|| DeclaredColumn::Tae)),
    ("feature", Kind::Named(DeclaredColumn::Feature)),
    ("raw-feature", Kind::Named(DeclaredColumn::RawFeature)),
    ("id", Kind::Named(DeclaredColumn::Id)),
    (VECTOR, Kind::Named(DeclaredColumn::Vector)),
    (FM_LOGIT, Kind::Named(DeclaredColumn::FmLogit)),
    ("time", Kind::Nameless(|| DeclaredColumn::Time)),
    ("request", Kind::Nameless(|| DeclaredColumn::Request)),
    ("ranked-position", Kind::Nameless(|| DeclaredColumn::RankedPosition)),
    ("ranked-propensity", Kind::Nameless(|| DeclaredColumn::RankedPropensity)),
    ("history-id", Kind::Named(DeclaredColumn::HistoryId)),
    ("history-actions", Kind::Nameless(|| DeclaredColumn::HistoryActions)),
    ("history-age", Kind::Nameless(|| DeclaredColumn::HistoryAge)),
];

impl DeclaredColumn {
    /// Reads a column of the contract.
    ///
    /// # Errors
    /// Its kind is not known, or a kind without names has one.
    pub fn read(raw: WireColumn) -> Result<DeclaredColumn, String> {
        let WireColumn { kind, name } = raw;
        match KINDS.iter().find(|(known, _)| *known == kind) {
            Some((_, Kind::Named(column))) => Ok(column(name)),
            Some((_, Kind::Nameless(column))) if name.is_empty() => Ok(column()),
            Some(_) => {
                let (kind, name) = (quote(&kind), quote(&name));
                Err(format!("its column of kind `{kind}` has the name `{name}`, and needs none"))
            }
            None => {
                let known: Vec<&str> = KINDS.iter().map(|(kind, _)| *kind).collect();
                Err(format!(
                    "it reads a column of kind `{}`, which this host does not know (it knows \
                     `{}`): leave it out, or update the host",
                    quote(&kind),
                    known.join("`, `")
                ))
            }
        }
    }

    /// The column as the contract has it.
    pub fn wire(&self) -> WireColumn {
        WireColumn { kind: self.kind().to_owned(), name: self.name().to_owned() }
    }

    /// The column with its number of values a row.
    pub(super) fn offered(&self, width: u32) -> OfferedColumn {
        let WireColumn { kind, name } = self.wire();
        OfferedColumn { kind, name, width }
    }

    fn kind(&self) -> &'static str {
        match self {
            DeclaredColumn::Tae => "tae",
            DeclaredColumn::Feature(_) => "feature",
            DeclaredColumn::RawFeature(_) => "raw-feature",
            DeclaredColumn::Id(_) => "id",
            DeclaredColumn::Vector(_) => VECTOR,
            DeclaredColumn::FmLogit(_) => FM_LOGIT,
            DeclaredColumn::Time => "time",
            DeclaredColumn::Request => "request",
            DeclaredColumn::RankedPosition => "ranked-position",
            DeclaredColumn::RankedPropensity => "ranked-propensity",
            DeclaredColumn::HistoryId(_) => "history-id",
            DeclaredColumn::HistoryActions => "history-actions",
            DeclaredColumn::HistoryAge => "history-age",
        }
    }

    fn name(&self) -> &str {
        match self {
            DeclaredColumn::Feature(name)
            | DeclaredColumn::RawFeature(name)
            | DeclaredColumn::Id(name)
            | DeclaredColumn::Vector(name)
            | DeclaredColumn::FmLogit(name)
            | DeclaredColumn::HistoryId(name) => name,
            _ => "",
        }
    }

    /// The column's kind and name, for messages.
    pub fn label(&self) -> String {
        let kind = self.kind().replace('-', " ");
        if self.name().is_empty() { kind } else { format!("{kind} `{}`", quote(self.name())) }
    }

    /// The index of its name among the host's columns of its kind, those of the list of further
    /// columns last; 0 for a kind without names.
    ///
    /// # Errors
    /// The schema lacks it.
    pub(crate) fn index_in(&self, info: &HostInfo) -> Result<usize, String> {
        let (name, listed): (_, &[String]) = match self {
            DeclaredColumn::Feature(name) | DeclaredColumn::RawFeature(name) => {
                (name, &info.features)
            }
            DeclaredColumn::Id(name) => (name, &info.ids),
            DeclaredColumn::HistoryId(name) => (name, &info.history_ids),
            DeclaredColumn::Vector(name) | DeclaredColumn::FmLogit(name) => (name, &[]),
            _ => return Ok(0),
        };
        let kind = match self {
            DeclaredColumn::RawFeature(_) => "feature",
            other => other.kind(),
        };
        let further = offered(info, kind).map(|column| &column.name);
        let known: Vec<&String> = listed.iter().chain(further).collect();
        known.iter().position(|known| *known == name).ok_or_else(|| {
            let names: Vec<&str> = known.iter().map(|name| name.as_str()).collect();
            let (label, names) = (self.label(), names.join("`, `"));
            let has = if names.is_empty() { "none".to_owned() } else { format!("`{names}`") };
            format!("it reads {label}, which the schema lacks (it has {has})")
        })
    }

    /// The surface that the column belongs to in a schema.
    pub(super) fn owner<'a>(&self, schema: &'a Schema) -> Option<&'a str> {
        let mut surfaces = schema.owned.keys().map(String::as_str);
        surfaces.find(|surface| {
            let own = OwnColumns::of(schema, Some(surface));
            match self {
                DeclaredColumn::Feature(name) | DeclaredColumn::RawFeature(name) => {
                    own.features.contains(name)
                }
                DeclaredColumn::Id(name) => own.ids.contains(name),
                _ => false,
            }
        })
    }

    /// Refuses a column that a description declares for a reader which cannot read it.
    pub(super) fn check_reader(&self, reader: ColumnReader) -> Result<(), String> {
        let is_read = match self {
            DeclaredColumn::Tae
            | DeclaredColumn::Feature(_)
            | DeclaredColumn::Id(_)
            | DeclaredColumn::Vector(_)
            | DeclaredColumn::FmLogit(_) => true,
            DeclaredColumn::Time
            | DeclaredColumn::Request
            | DeclaredColumn::RankedPosition
            | DeclaredColumn::RankedPropensity => reader == ColumnReader::Hooks,
            DeclaredColumn::RawFeature(_)
            | DeclaredColumn::HistoryId(_)
            | DeclaredColumn::HistoryActions
            | DeclaredColumn::HistoryAge => reader == ColumnReader::Network,
        };
        let (list, label, rule) = (reader.list(), self.label(), reader.rule());
        if is_read { Ok(()) } else { Err(format!("its {list} hold {label}; {rule}")) }
    }

    /// Whether it is a column of the short history.
    pub fn is_history(&self) -> bool {
        matches!(
            self,
            DeclaredColumn::HistoryId(_)
                | DeclaredColumn::HistoryActions
                | DeclaredColumn::HistoryAge
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_read_as_it_is_written() {
        for (kind, build) in KINDS {
            let column = match build {
                Kind::Named(build) => build("some".into()),
                Kind::Nameless(build) => build(),
            };
            assert_eq!(column.kind(), kind);
            assert_eq!(DeclaredColumn::read(column.wire()).unwrap(), column);
        }
    }

    #[test]
    fn what_the_host_does_not_know_is_refused_by_its_name() {
        let read = |kind: &str, name: &str| {
            DeclaredColumn::read(WireColumn { kind: kind.into(), name: name.into() }).unwrap_err()
        };
        let why = read("history-vector", "content");
        assert!(why.contains("`history-vector`") && why.contains("update the host"), "{why}");
        assert!(read("tae", "mine").contains("`mine`"));
    }
}

//! What each column of a log is: by what is in it, and where that leaves a choice, by its name.

use std::collections::{BTreeSet, HashMap};

use hypercast_data::schema::MAX_ACTIONS;

use super::ColumnHints;
use super::sample::{Sample, SampledColumn};
use crate::error::{CommonErrors as _, Error, Result};

/// Words in the names of columns, for each role.
const USER: [&str; 8] =
    ["user", "customer", "visitor", "member", "uid", "client", "account", "shopper"];
const ITEM: [&str; 11] = [
    "item", "sku", "product", "video", "movie", "article", "content", "listing", "song", "track",
    "offer",
];
pub(super) const TIME: [&str; 7] = ["time", "ts", "shown", "served", "date", "at", "impression"];
const SURFACE: [&str; 10] = [
    "surface",
    "placement",
    "page",
    "channel",
    "tab",
    "feed",
    "widget",
    "screen",
    "section",
    "slot",
];
const REQUEST: [&str; 8] =
    ["request", "req", "pageview", "search_id", "query_id", "slate", "reco_id", "impression_id"];
const ACTION: [&str; 16] = [
    "click",
    "like",
    "buy",
    "bought",
    "purchase",
    "order",
    "cart",
    "follow",
    "share",
    "comment",
    "convert",
    "conversion",
    "install",
    "watched",
    "save",
    "hide",
];
const VALUE: [&str; 9] =
    ["revenue", "gmv", "amount", "dwell", "watch_time", "play_time", "spent", "rating", "profit"];

pub(super) const RATING: [&str; 3] = ["rating", "stars", "score"];

/// The most different values of a surface.
const MAX_SURFACES: usize = 50;

/// Rows in which a number must not be 0 before it is said to come of an action.
const FEWEST_SET: usize = 20;

/// The share of rows that a rule holds in, for it to be believed.
const NEARLY_ALL: f64 = 0.995;

/// The columns of a log by their roles, each with the reason.
pub(super) struct Roles<'a> {
    pub(super) user: Role<'a>,
    pub(super) item: Role<'a>,
    pub(super) time: Role<'a>,
    pub(super) surface: Option<Role<'a>>,
    pub(super) request: Option<Role<'a>>,
    pub(super) outcome_time: Option<Role<'a>>,
    pub(super) actions: Vec<Role<'a>>,
    pub(super) values: Vec<Role<'a>>,
    /// Values that are a judgement, of which a high one is an action.
    pub(super) ratings: Vec<Role<'a>>,
    /// Positions in the ranking, which only training knows.
    pub(super) positions: Vec<Role<'a>>,
    /// What may be features of the context, or nothing.
    pub(super) others: Vec<Role<'a>>,
}

/// A column and why it has its role.
#[derive(Clone)]
pub(super) struct Role<'a> {
    pub(super) column: &'a SampledColumn,
    pub(super) reason: String,
}

/// Whether a name has one of the words, the better the smaller.
pub(super) fn named(name: &str, words: &[&str]) -> Option<usize> {
    let name = name.to_lowercase();
    let parts: Vec<&str> = name.split(['_', '.', '-', ' ']).collect();
    // Short words stand alone: `at` is not in `category`.
    let has = |word: &&str| parts.contains(word) || (word.len() > 3 && name.contains(*word));
    words.iter().position(has)
}

fn best_named<'a>(
    columns: impl Iterator<Item = &'a SampledColumn>,
    words: &[&str],
) -> Option<&'a SampledColumn> {
    let ranked = columns.filter_map(|column| Some((named(&column.name, words)?, column)));
    ranked.min_by_key(|(rank, _)| *rank).map(|(_, column)| column)
}

impl<'a> Roles<'a> {
    /// The roles of a log's columns; `items` and `users` are the samples of the other files.
    ///
    /// # Errors
    /// No column is like a user, an item or a time, and no hint names one.
    pub(super) fn find(
        log: &'a Sample,
        items: Option<&Sample>,
        users: Option<&Sample>,
        hints: &ColumnHints,
    ) -> Result<Roles<'a>> {
        let time = find(log, &hints.time, "time", || {
            let times = || log.columns.iter().filter(|column| column.time_unit().is_some());
            let complete = times().filter(|column| column.present == log.rows);
            best_named(complete.clone(), &TIME)
                .or(complete.clone().next())
                .map(|column| Role { column, reason: "each row has a time".to_owned() })
        })?;
        let is_free = |column: &&SampledColumn| column.time_unit().is_none() && !column.is_list();
        let item = find(log, &hints.item, "item", || {
            by_ids(log, items, &ITEM).or_else(|| {
                let columns = log.columns.iter().filter(is_free);
                best_named(columns, &ITEM).map(|column| by_name(column, "an item"))
            })
        })?;
        let user = find(log, &hints.user, "user", || {
            let others = || log.columns.iter().filter(is_free);
            by_ids(log, users, &USER).or_else(|| {
                let columns = others().filter(|column| column.name != item.column.name);
                best_named(columns, &USER).map(|column| by_name(column, "a user"))
            })
        })?;
        let mut taken: BTreeSet<&str> =
            [&user, &item, &time].map(|role| role.column.name.as_str()).into();
        let surface = match &hints.surface {
            Some(_) => Some(find(log, &hints.surface, "surface", || None)?),
            None => surface(log, &taken),
        };
        taken.extend(surface.iter().map(|role| role.column.name.as_str()));
        let request = request(log, user.column, time.column, &taken);
        taken.extend(request.iter().map(|role| role.column.name.as_str()));
        let outcome_time = outcome_time(log, time.column, &taken);
        taken.extend(outcome_time.iter().map(|role| role.column.name.as_str()));
        let mut roles = Roles {
            user,
            item,
            time,
            surface,
            request,
            outcome_time,
            actions: Vec::new(),
            values: Vec::new(),
            ratings: Vec::new(),
            positions: Vec::new(),
            others: Vec::new(),
        };
        let is_open = |column: &&SampledColumn| !taken.contains(column.name.as_str());
        let open = log.columns.iter().filter(is_open);
        let (positions, open): (Vec<_>, Vec<_>) = open.partition(|column| column.is_position());
        let reason = "named as a place in the ranking, so no request can send it".to_owned();
        let role = |column| Role { column, reason: reason.clone() };
        roles.positions = positions.into_iter().map(role).collect();
        roles.sort_actions(&open);
        roles.sort_numbers(&open);
        Ok(roles)
    }

    /// Flags that differ within requests and items are what users did. Where there are more of
    /// them than a schema can have actions, they describe something, and only names tell an action.
    fn sort_actions(&mut self, open: &[&'a SampledColumn]) {
        let mut unnamed = Vec::new();
        for &column in open.iter().filter(|column| column.is_flag()) {
            let set = (0..column.ids.len()).filter(|&row| column.is_set(row)).count();
            let together = self.request.as_ref().unwrap_or(&self.user);
            let of_request = is_set_together(column, together.column);
            let of_item = is_set_together(column, self.item.column);
            let role = |reason: &str| Role { column, reason: reason.to_owned() };
            if set == 0 || column.present == 0 {
                self.others.push(role("it is never set in the rows that were read"));
            } else if named(&column.name, &ACTION).is_some() {
                self.actions.push(role("yes or no, and named as an action"));
            } else if of_request || of_item {
                let of = if of_item { "each item" } else { "all rows of a request" };
                self.others.push(role(&format!("the same for {of}, so nothing that a user did")));
            } else {
                unnamed.push(role("yes or no, and different within requests and items"));
            }
        }
        if self.actions.len() + unnamed.len() <= MAX_ACTIONS {
            self.actions.append(&mut unnamed);
        }
        for role in &mut unnamed {
            role.reason = format!("yes or no, as more than {MAX_ACTIONS} columns are");
        }
        self.others.append(&mut unnamed);
    }

    /// Numbers that are not 0 only where an action happened came of it.
    fn sort_numbers(&mut self, open: &[&'a SampledColumn]) {
        for &column in open.iter().filter(|column| !column.is_flag()) {
            let rows: Vec<usize> =
                (0..column.ids.len()).filter(|&row| column.is_set(row)).collect();
            let is_number = column.is_number() && column.time_unit().is_none();
            let follows = self.actions.iter().find(|action| {
                let also = rows.iter().filter(|&&row| action.column.is_set(row)).count();
                let all = (0..column.ids.len()).filter(|&row| action.column.is_set(row)).count();
                let is_rare = all < column.ids.len() / 2;
                is_rare && also as f64 >= NEARLY_ALL * rows.len() as f64
            });
            let follows = follows.filter(|_| is_number && rows.len() >= FEWEST_SET);
            // Where it is 0 or missing it says nothing, which is the same for each item, too.
            let is_of_item = rows.len() >= FEWEST_SET
                && is_constant_in(column, self.item.column, |row| column.is_set(row));
            match follows {
                None if is_number && is_of_item => {
                    let reason = "the same for each item, so nothing that a user did".to_owned();
                    self.others.push(Role { column, reason });
                }
                _ if column.is_rating() => {
                    let reason = "a number, and named as a judgement".to_owned();
                    self.ratings.push(Role { column, reason: reason.clone() });
                    self.values.push(Role { column, reason });
                }
                Some(action) => {
                    let action = &action.column.name;
                    let reason = format!("it is above 0 only where `{action}` happened");
                    self.values.push(Role { column, reason });
                }
                None if is_number && named(&column.name, &VALUE).is_some() => {
                    let reason = "a number, and named as an outcome".to_owned();
                    self.values.push(Role { column, reason });
                }
                None => self.others.push(Role { column, reason: "known before".to_owned() }),
            }
        }
    }
}

/// The column that a hint names, or the one that `guess` finds.
fn find<'a>(
    log: &'a Sample,
    hint: &Option<String>,
    what: &str,
    guess: impl FnOnce() -> Option<Role<'a>>,
) -> Result<Role<'a>> {
    let has =
        || log.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ");
    match hint {
        Some(name) => {
            let column = log.column(name).ok_or_else(|| {
                Error::invalid(format!("--{what}: no column is called `{name}`; there are {}", has()))
            })?;
            Ok(Role { column, reason: format!("--{what} names it") })
        }
        None => guess().ok_or_else(|| {
            let has = has();
            Error::invalid(format!(
                "no column of the impressions looks like the {what}; name it with --{what}, of {has}"
            ))
        }),
    }
}

fn by_name<'a>(column: &'a SampledColumn, what: &str) -> Role<'a> {
    Role { column, reason: format!("named as {what}") }
}

/// The column whose cells are the ids of the other file. Where several may be, as small numbers
/// are, names decide; without these, none is.
fn by_ids<'a>(log: &'a Sample, entities: Option<&Sample>, words: &[&str]) -> Option<Role<'a>> {
    let entities = entities?;
    let candidates: Vec<(IdColumn<'_>, &SampledColumn)> = log
        .columns
        .iter()
        .filter_map(|column| Some((id_column(entities, column)?, column)))
        .collect();
    let evidence = |(id, column): &(IdColumn<'_>, &SampledColumn)| {
        [id.column.name == column.name, named(&column.name, words).is_some()]
    };
    let best = candidates
        .iter()
        .max_by(|a, b| evidence(a).cmp(&evidence(b)).then(a.0.share.total_cmp(&b.0.share)))?;
    let is_clear = candidates.len() == 1 || evidence(best) != [false; 2];
    let reason = "its cells are the ids of the other file".to_owned();
    is_clear.then_some(Role { column: best.1, reason })
}

/// The column of items or users that has their ids.
pub(super) struct IdColumn<'a> {
    pub(super) column: &'a SampledColumn,
    /// The share of the log's ids that it has.
    pub(super) share: f64,
}

/// The column of items or users that has each cell once and at least half of those of `column`.
pub(super) fn id_column<'a>(entities: &'a Sample, column: &SampledColumn) -> Option<IdColumn<'a>> {
    let ids = column.different();
    let shares = entities.columns.iter().filter_map(|of| {
        let known = of.different();
        let is_unique =
            of.present == entities.rows && known.len() as f64 >= NEARLY_ALL * of.present as f64;
        let share = ids.intersection(&known).count() as f64 / ids.len().max(1) as f64;
        // A flag or a small number is in any column of numbers.
        let is_like = is_unique && share >= 0.5 && ids.len() > 2;
        is_like.then_some(IdColumn { column: of, share })
    });
    let named_id = |of: &IdColumn<'_>| {
        (of.column.name == column.name, named(&of.column.name, &["id", "sku", "key"]).is_some())
    };
    shares.max_by(|a, b| named_id(a).cmp(&named_id(b)).then(a.share.total_cmp(&b.share)))
}

fn surface<'a>(log: &'a Sample, taken: &BTreeSet<&str>) -> Option<Role<'a>> {
    let fits = |column: &&SampledColumn| {
        let counted = !column.counts.is_empty() && column.counts.len() <= MAX_SURFACES;
        let is_other = column.is_flag() || column.is_list() || column.is_position();
        counted && !is_other && !taken.contains(column.name.as_str())
    };
    let column = best_named(log.columns.iter().filter(fits), &SURFACE)?;
    let reason = format!("named as a place, with {} different", column.counts.len());
    Some(Role { column, reason })
}

/// A column of which each value has one user, and which is named as a request or has one time, too.
fn request<'a>(
    log: &'a Sample,
    user: &SampledColumn,
    time: &SampledColumn,
    taken: &BTreeSet<&str>,
) -> Option<Role<'a>> {
    let fits = |column: &&SampledColumn| {
        let is_id = column.time_unit().is_none() && !column.is_flag();
        is_id && !taken.contains(column.name.as_str()) && is_constant(user, column)
    };
    let (column, why) = match best_named(log.columns.iter().filter(fits), &REQUEST) {
        Some(column) => (column, "named as a request; each has one user"),
        None => {
            let mut columns = log.columns.iter().filter(fits);
            (columns.find(|column| is_constant(time, column))?, "each has one user and one time")
        }
    };
    let rows = column.present as f64 / column.different().len().max(1) as f64;
    Some(Role { column, reason: format!("{why}, and {rows:.1} rows") })
}

/// Another time, which is never before the impression's.
fn outcome_time<'a>(
    log: &'a Sample,
    time: &SampledColumn,
    taken: &BTreeSet<&str>,
) -> Option<Role<'a>> {
    let scale = |column: &SampledColumn| match column.time_unit().map(|unit| unit.name()) {
        Some("s") => 1e3,
        Some("us") => 1e-3,
        Some("ns") => 1e-6,
        _ => 1.0,
    };
    let fits = |column: &&SampledColumn| {
        let pairs = column.numbers.iter().zip(&time.numbers).filter(|(other, _)| !other.is_nan());
        let (own, of_time) = (scale(column), scale(time));
        let later = pairs.filter(|(other, at)| *other * own >= *at * of_time).count();
        let is_other = column.time_unit().is_some() && !taken.contains(column.name.as_str());
        is_other && later == column.present
    };
    let column = log.columns.iter().find(fits)?;
    Some(Role { column, reason: "a time that is never before the impression's".to_owned() })
}

/// Whether nearly all rows that share a value of `by` with one where the flag is set have it set,
/// and there are some.
fn is_set_together(flag: &SampledColumn, by: &SampledColumn) -> bool {
    #[derive(Default)]
    struct Group {
        rows: usize,
        set: usize,
    }
    let mut groups: HashMap<u64, Group> = HashMap::new();
    for (row, &of) in by.ids.iter().enumerate().filter(|&(_, &of)| of != 0) {
        let group = groups.entry(of).or_default();
        group.rows += 1;
        group.set += usize::from(flag.is_set(row));
    }
    let several = || groups.values().filter(|group| group.rows > 1 && group.set > 0);
    let rows: usize = several().map(|group| group.rows).sum();
    let set: usize = several().map(|group| group.set).sum();
    rows > 0 && set as f64 >= NEARLY_ALL * rows as f64
}

/// Whether `column` has one value for each value of `by` in nearly all rows where that is known, of
/// which some must share a value of `by`.
fn is_constant(column: &SampledColumn, by: &SampledColumn) -> bool {
    is_constant_in(column, by, |_| true)
}

/// The same in the rows that `counts` names.
fn is_constant_in(
    column: &SampledColumn,
    by: &SampledColumn,
    counts: impl Fn(usize) -> bool,
) -> bool {
    let mut first: HashMap<u64, u64> = HashMap::new();
    let (mut same, mut shared) = (0, 0);
    for row in (0..column.ids.len()).filter(|&row| by.ids[row] != 0 && counts(row)) {
        let (value, group) = (column.ids[row], by.ids[row]);
        match first.get(&group) {
            None => {
                first.insert(group, value);
            }
            Some(&other) => {
                shared += 1;
                same += usize::from(other == value);
            }
        }
    }
    shared > 0 && same as f64 >= NEARLY_ALL * shared as f64
}

//! The text of a proposed mapping: what can be taken as it is, and the reason of each line.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use hypercast_data::schema::{Counter, Feature, IdKind, Schema};

use super::InferOptions;
use super::roles::{Role, Roles, id_column};
use super::sample::{Sample, SampledColumn, percent};
use super::tags::TagProposal;
use crate::cell::TimeUnit;

/// The most different texts of a category.
const MAX_CATEGORIES: usize = 1_000;

/// An action that happened less often in the sample gets no counter.
const COUNTED_ACTIONS: usize = 100;

/// A value has a long tail if one in a hundred of its numbers is so many times their median.
const LONG_TAIL: f64 = 5.0;

/// Up to so many positions, each is learned for itself.
const MAX_POSITIONS: usize = 50;

/// A share of rows below which an action is no main task.
const RARE: f64 = 1e-3;

/// What the samples say.
pub(super) struct Findings<'a> {
    pub(super) options: &'a InferOptions,
    pub(super) roles: Roles<'a>,
    pub(super) log: &'a Sample,
    pub(super) items: Option<&'a Sample>,
    pub(super) users: Option<&'a Sample>,
}

/// Writes the parts of a mapping.
pub(super) struct MappingText<'a> {
    findings: &'a Findings<'a>,
    text: String,
    /// The names of columns in the schema.
    names: BTreeSet<String>,
    actions: Vec<WrittenAction>,
    /// Categorical features of items that counters can have for keys.
    keys: Vec<String>,
}

/// An action as it was written, and in how many rows it happened.
struct WrittenAction {
    name: String,
    happened: usize,
}

impl<'a> MappingText<'a> {
    /// The text of a mapping that imports as it is.
    pub(super) fn write(findings: &'a Findings<'a>, folder: &str) -> String {
        let (actions, keys) = Default::default();
        let mut text =
            MappingText { findings, text: String::new(), names: BTreeSet::new(), actions, keys };
        text.head(folder);
        text.impressions();
        text.outcomes();
        text.context();
        let roles = &findings.roles;
        let options = findings.options;
        text.entity("items", &options.items, findings.items, roles.item.column);
        text.entity("users", &options.users, findings.users, roles.user.column);
        text.tasks();
        text.counters();
        text.text
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// A key, and the reason of what it says.
    fn key(&mut self, key: &str, value: &str, reason: &str) {
        let comment = if reason.is_empty() { String::new() } else { format!("  # {reason}") };
        self.line(&format!("{key} = {value}{comment}"));
    }

    fn role(&mut self, key: &str, role: &Role<'_>) {
        let reason = format!("{}; {}", role.reason, role.column.describe());
        self.key(key, &quoted(&role.column.name), &reason);
    }

    fn head(&mut self, folder: &str) {
        let findings = self.findings;
        let rows = findings.log.rows;
        self.line(&format!(
            "# Proposed from {rows} rows: look at each line, correct it, and then\n#\n#     \
             hypercast data import --mapping {folder} --into data\n"
        ));
        match &findings.roles.surface {
            None => {
                self.key(
                    "surfaces",
                    "[\"main\"]",
                    "no column is named as a place; one for all rows",
                );
            }
            Some(role) => {
                let mut surfaces: Vec<(&String, &usize)> = role.column.counts.iter().collect();
                surfaces.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
                let shares: Vec<String> =
                    surfaces.iter().map(|&(_, &count)| percent(count, rows)).collect();
                let names = surfaces.iter().map(|(name, _)| quoted(name)).collect::<Vec<_>>();
                let reason = format!("the most frequent first: {}", shares.join(", "));
                self.key("surfaces", &format!("[{}]", names.join(", ")), &reason);
            }
        }
        let kinds = [("users", self.user_ids()), ("items", self.item_ids())];
        self.line("\n[ids]");
        for (entity, kind) in kinds {
            match kind {
                IdKind::Integer => self.key(entity, "\"integer\"", "all are whole numbers"),
                IdKind::String => self.key(entity, "\"string\"", "some are no whole numbers"),
            }
        }
    }

    fn user_ids(&self) -> IdKind {
        kind_of(self.findings.roles.user.column, self.findings.users)
    }

    fn item_ids(&self) -> IdKind {
        kind_of(self.findings.roles.item.column, self.findings.items)
    }

    fn impressions(&mut self) {
        let Findings { options, roles, .. } = self.findings;
        self.line("\n[impressions]");
        self.files(&options.impressions);
        self.role("user", &roles.user);
        self.role("item", &roles.item);
        self.role("time", &roles.time);
        let unit = |role: &Role<'_>| role.column.time_unit().unwrap_or(TimeUnit::Iso).name();
        self.key("time_unit", &quoted(unit(&roles.time)), "by what the cells look like");
        if let Some(surface) = &roles.surface {
            self.role("surface", surface);
        }
        match &roles.request {
            Some(request) => self.role("request", request),
            None => self.key(
                "request_within_s",
                "1",
                "no column tells requests apart; rows of a user and surface within a second are one",
            ),
        }
        if roles
            .request
            .as_ref()
            .is_some_and(|request| request.column.present < self.findings.log.rows)
        {
            self.key("request_within_s", "1", "for the rows without one");
        }
        let outcome = roles.outcome_time.as_ref();
        if let Some(outcome) = outcome {
            self.role("outcome_time", outcome);
            if unit(outcome) != unit(&roles.time) {
                self.key("outcome_unit", &quoted(unit(outcome)), "");
            }
        }
        if outcome.is_none_or(|outcome| outcome.column.present < self.findings.log.rows) {
            let reason = "when an outcome is known: a guess; models must not see it before";
            self.key("outcome_delay_s", "3600", reason);
        }
    }

    fn files(&mut self, patterns: &[String]) {
        let patterns: Vec<String> = patterns.iter().map(|pattern| quoted(pattern)).collect();
        self.key("files", &format!("[{}]", patterns.join(", ")), "");
        if let Some(format) = self.findings.options.format {
            self.key("options", &format!("{{ format = \"{format}\" }}"), "as `--format` says");
        }
    }

    fn outcomes(&mut self) {
        let roles = &self.findings.roles;
        for action in &roles.actions {
            let column = action.column;
            let name = self.name(&column.name, "action");
            self.block("[[actions]]", &name, action);
            let happened = (0..column.ids.len()).filter(|&row| column.is_set(row)).count();
            self.actions.push(WrittenAction { name, happened });
        }
        for rating in &roles.ratings {
            self.rating(rating);
        }
        let is_rating = |value: &&Role<'_>| {
            roles.ratings.iter().any(|rating| rating.column.name == value.column.name)
        };
        for value in roles.values.iter().filter(|value| !is_rating(value)) {
            let column = value.column;
            let set: Vec<f64> = column.numbers.iter().copied().filter(|&n| n > 0.0).collect();
            let is_new = roles.actions.iter().all(|action| {
                let of_action = (0..column.ids.len()).filter(|&row| action.column.is_set(row));
                (set.len() as f64) < 0.9 * of_action.count() as f64
            });
            let least = set.iter().copied().fold(f64::MAX, f64::min);
            if is_new && least < f64::MAX {
                let name = self.name(&format!("{}_above_0", column.name), "action");
                self.line(&format!("\n[[actions]]\nname = {}", quoted(&name)));
                self.key("column", &quoted(&column.name), "rarer than every other action");
                self.key("at_least", "1e-6", &format!("above 0; the least such number is {least}"));
                self.key("default", "false", "missing, it did not happen");
                self.actions.push(WrittenAction { name, happened: set.len() });
            }
        }
        for value in &roles.values {
            let name = self.name(&value.column.name, "value");
            self.block("[[values]]", &name, value);
        }
    }

    /// A high rating as an action: from the mark on that about half of the rows have.
    fn rating(&mut self, rating: &Role<'_>) {
        let column = rating.column;
        let known = column.numbers.iter().copied().filter(|number| !number.is_nan());
        let known: Vec<f64> = known.collect();
        let at_least = |mark: f64| known.iter().filter(|&&number| number >= mark).count();
        let mut marks = known.clone();
        marks.sort_unstable_by(f64::total_cmp);
        marks.dedup();
        let from_half = |mark: &f64| at_least(*mark).abs_diff(known.len() / 2);
        // From the lowest on, all rows would have it.
        let Some(&high) = marks[1..].iter().min_by_key(|mark| from_half(mark)) else { return };
        let name =
            self.name(&format!("{}_at_least_{high}", column.name).replace('.', "_"), "action");
        self.line(&format!("\n[[actions]]\nname = {}", quoted(&name)));
        self.role("column", rating);
        let share = |mark: &f64| format!("{mark} in {}", percent(at_least(*mark), known.len()));
        let shares: Vec<String> = marks.iter().map(share).collect();
        let reason = format!("of the rows that are rated, at least {}", shares.join(", "));
        self.key("at_least", &format!("{high:?}"), &reason);
        self.actions.push(WrittenAction { name, happened: at_least(high) });
    }

    /// The beginning of an entry: its name, and its column with the reason.
    fn block(&mut self, header: &str, name: &str, role: &Role<'_>) {
        self.line(&format!("\n{header}\nname = {}", quoted(name)));
        self.role("column", role);
    }

    fn context(&mut self) {
        for role in &self.findings.roles.positions {
            let name = self.name(&role.column.name, "context");
            let is_short = role.column.different().len() <= MAX_POSITIONS;
            let kind = if is_short { "categorical" } else { "dense" };
            self.line(&format!(
                "\n# What is shown first is clicked more. Models learn how much, and rank without \
                 it.\n[[context_features]]\nname = {}\nkind = \"{kind}\"",
                quoted(&name)
            ));
            self.role("column", role);
            self.key("training_only", "true", "take the line out if requests do send it");
        }
        for role in &self.findings.roles.others {
            let column = role.column;
            let same_in_items = [self.findings.items, self.findings.users]
                .into_iter()
                .flatten()
                .any(|of| of.column(&column.name).is_some());
            match feature_kind(column) {
                Ok(kind) if !same_in_items => {
                    let name = self.name(&column.name, "context");
                    self.line(&format!(
                        "\n# Requests have to send it too; leave it out if they cannot.\n\
                         [[context_features]]\nname = {}\nkind = \"{kind}\"",
                        quoted(&name)
                    ));
                    self.role("column", role);
                    self.optional(column);
                    self.list(&name, column);
                }
                Ok(_) => self.unused(column, "items or users have it"),
                Err(reason) => self.unused(column, reason),
            }
        }
    }

    fn optional(&mut self, column: &SampledColumn) {
        let rows = column.ids.len();
        if column.present < rows {
            let missing = percent(rows - column.present, rows);
            let reason = format!("{missing} of the cells are missing; models learn from that");
            self.key("optional", "true", &reason);
        }
    }

    fn list(&mut self, name: &str, column: &SampledColumn) {
        if let Some(TagProposal { separator, max_values, reason }) = column.tags()
            && self.take_columns(&Feature::tags(name, max_values))
        {
            self.key("max_values", &max_values.to_string(), &reason);
            if let Some(separator) = separator {
                self.key("separator", &quoted(&separator.to_string()), "");
            }
        } else if column.is_list() {
            self.key("list", "\"first\"", "of a list, only its first element");
        }
    }

    /// Takes the names of a feature's columns, if no other has one of them.
    fn take_columns(&mut self, feature: &Feature) -> bool {
        let columns = feature.columns();
        let is_free = columns.iter().all(|column| !self.names.contains(column));
        if is_free {
            self.names.extend(columns);
        }
        is_free
    }

    fn unused(&mut self, column: &SampledColumn, reason: &str) {
        let describe = column.describe();
        self.line(&format!("\n# Not used: {}, {reason}; {describe}.", column.name));
    }

    fn entity(
        &mut self,
        entity: &str,
        patterns: &[String],
        sample: Option<&Sample>,
        of_log: &SampledColumn,
    ) {
        let Some(sample) = sample else { return };
        let (share, id) = match id_column(sample, of_log) {
            Some(id) => (id.share, id.column),
            None => (0.0, sample.column(&of_log.name).unwrap_or(&sample.columns[0])),
        };
        self.line(&format!("\n[{entity}]"));
        self.files(patterns);
        let of = percent((share * 1e4) as usize, 10_000);
        let reason = format!("it has {of} of the ids in the log; {}", id.describe());
        self.key("id", &quoted(&id.name), &reason);
        let is_name = |column: &&SampledColumn| {
            let name = column.name.to_lowercase();
            ["title", "name"].iter().any(|word| name.ends_with(word)) && column.name != id.name
        };
        let name = sample.columns.iter().find(|column| entity == "items" && is_name(column));
        if let Some(name) = name {
            self.key("name", &quoted(&name.name), "for people; models do not read it");
        }
        let rest = sample.columns.iter().filter(|column| {
            column.name != id.name && name.is_none_or(|name| name.name != column.name)
        });
        let mut unused = Vec::new();
        for column in rest {
            let kind = match feature_kind(column) {
                Ok(kind) => kind,
                Err(reason) => {
                    unused.push((column, reason));
                    continue;
                }
            };
            let name = self.name(&column.name, entity.trim_end_matches('s'));
            self.line(&format!(
                "\n[[{entity}.features]]\nname = {}\nkind = \"{kind}\"",
                quoted(&name)
            ));
            self.key("column", &quoted(&column.name), &column.describe());
            self.optional(column);
            self.list(&name, column);
            let is_key = kind == "categorical" && column.tags().is_none();
            if entity == "items" && is_key && column.different().len() > 1 {
                self.keys.push(name);
            }
        }
        for (column, reason) in unused {
            self.unused(column, reason);
        }
    }

    fn tasks(&mut self) {
        let rows = self.findings.log.rows;
        for action in std::mem::take(&mut self.actions) {
            let name = quoted(&action.name);
            let is_rare = (action.happened as f64) < RARE * rows as f64;
            let role = if is_rare { "auxiliary" } else { "main" };
            let reason = format!("it happened in {} of the rows", percent(action.happened, rows));
            self.line(&format!("\n[[tasks]]\nname = {name}\nlabel = {name}\nkind = \"binary\""));
            self.key("role", &quoted(role), &reason);
            self.actions.push(action);
        }
        for value in &self.findings.roles.values {
            let name = quoted(&value.column.name);
            self.line(&format!(
                "\n[[tasks]]\nname = {name}\nlabel = {name}\nkind = \"regression\"\n\
                 role = \"auxiliary\""
            ));
            if let Some(reason) = long_tail(&value.column.numbers) {
                self.key("transform", "\"log\"", &reason);
            }
        }
    }

    fn counters(&mut self) {
        let mut counted: Vec<&WrittenAction> =
            self.actions.iter().filter(|action| action.happened >= COUNTED_ACTIONS).collect();
        counted.sort_by_key(|action| std::cmp::Reverse(action.happened));
        let actions: Vec<&str> =
            counted.iter().take(2).map(|action| action.name.as_str()).collect();
        let mut keys: Vec<Vec<&str>> = vec![vec!["user_id"], vec!["item_id"]];
        let keys_of_items: Vec<&str> = self.keys.iter().take(3).map(String::as_str).collect();
        keys.extend(keys_of_items.iter().map(|&key| vec![key]));
        keys.extend(keys_of_items.first().map(|&key| vec!["user_id", key]));
        if self.findings.roles.surface.is_some() {
            keys.extend([vec!["user_id", "surface"], vec!["item_id", "surface"]]);
        }
        let keys: Vec<&[&str]> = keys.iter().map(Vec::as_slice).collect();
        let counters = Counter::lasting(&keys, &actions);
        if counters.is_empty() {
            return;
        }
        self.line(
            "\n# How often the most frequent actions followed, by user, item and their groups.",
        );
        for Counter { name, key, action, .. } in counters {
            let key: Vec<String> = key.iter().map(|column| quoted(column)).collect();
            let (name, action) = (quoted(&name), quoted(&action));
            let _ = write!(
                self.text,
                "[[counters]]\nname = {name}\nkey = [{}]\naction = {action}\n\n",
                key.join(", ")
            );
        }
        self.text.truncate(self.text.trim_end().len());
        self.text.push('\n');
    }

    /// A name in the schema, which no other column has.
    fn name(&mut self, column: &str, prefix: &str) -> String {
        let name = column.replace('.', "_");
        let is_taken = self.names.contains(&name) || Schema::is_reserved(&name);
        let name = if is_taken { format!("{prefix}_{name}") } else { name };
        self.names.insert(name.clone());
        name
    }
}

fn kind_of(of_log: &SampledColumn, entities: Option<&Sample>) -> IdKind {
    let of_file = entities.and_then(|of| id_column(of, of_log));
    match of_file {
        Some(id) if id.column.id_kind() == IdKind::String => IdKind::String,
        _ => of_log.id_kind(),
    }
}

/// The type of a feature, or why the column is none.
fn feature_kind(column: &SampledColumn) -> Result<&'static str, &'static str> {
    let different = column.different().len();
    if column.present == 0 || different < 2 {
        return Err("it is always the same");
    }
    if column.time_unit().is_some() {
        return Err("it is a time");
    }
    if column.tags().is_some() {
        return Ok("categorical");
    }
    if column.is_list() {
        let is_text = column.numbers.iter().all(|number| number.is_nan());
        return if is_text && different <= MAX_CATEGORIES {
            Ok("categorical")
        } else {
            Err("features have no lists of numbers or of so many texts yet")
        };
    }
    if column.is_flag() {
        return Ok("categorical");
    }
    if column.is_number() {
        // Ids and codes are numbers, too; a name says so.
        let name = column.name.to_lowercase();
        let is_code = ["id", "code", "type", "kind", "category"].iter().any(|w| name.ends_with(w));
        return Ok(if is_code && column.is_whole() { "categorical" } else { "dense" });
    }
    if different > MAX_CATEGORIES {
        Err("there are too many different texts")
    } else {
        Ok("categorical")
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A number above 0 with two digits, as TOML writes floats.
/// Why a value is to be learned by its logarithm; none if its largest numbers are not far from the
/// usual ones. NaN is a missing number.
fn long_tail(numbers: &[f64]) -> Option<String> {
    let known = numbers.iter().filter(|number| !number.is_nan()).count();
    let sizes = numbers.iter().map(|number| number.abs());
    let mut sizes: Vec<f64> = sizes.filter(|&size| size > 0.0).collect();
    sizes.sort_unstable_by(f64::total_cmp);
    let last = sizes.len().checked_sub(1)?;
    let (median, large) = (sizes[last / 2], sizes[last - last / 100]);
    let zeros = percent(known - sizes.len(), known);
    (large >= LONG_TAIL * median).then(|| {
        format!(
            "a long tail: {zeros} are 0, half of the others are above {median:.2}, and one in a \
             hundred above {large:.2}"
        )
    })
}

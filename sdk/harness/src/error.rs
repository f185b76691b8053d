//! What a test is told: why an expert could not be loaded, or what it broke,
//! where, and what to do about it.

use std::fmt;

use hypercast_fm::example::Example;

/// The harness could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refuses the component, or a native expert's network.
    #[error(transparent)]
    Expert(#[from] hypercast_expert::Error),
    /// The schema of the world cannot be read, or is not valid.
    #[error(transparent)]
    Schema(#[from] hypercast_data::Error),
    /// A native expert's own words about its network.
    #[error("the network does not fit this schema: {0}")]
    Network(String),
}

/// Where in a test's requests something went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The request, in words.
    pub request: Option<String>,
    /// The candidate's place in the request, or the example's in a batch.
    pub row: Option<usize>,
    /// The task.
    pub task: Option<String>,
}

impl Place {
    /// A request.
    pub fn of(example: &Example, surfaces: &[String]) -> Place {
        let surface = surfaces.get(usize::from(example.surface)).map_or("?", String::as_str);
        let Example { request, targets, history, .. } = example;
        let words = format!(
            "request {request} (surface {surface}, {} candidates, {} past events)",
            targets.len(),
            history.len()
        );
        Place { request: Some(words), ..Place::default() }
    }

    /// The same, at a row.
    pub fn row(self, row: usize) -> Place {
        Place { row: Some(row), ..self }
    }

    /// The same, of a task.
    pub fn task(self, task: &str) -> Place {
        Place { task: Some(task.into()), ..self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = self.request.clone();
        let row = self.row.map(|row| format!("row {row}"));
        let task = self.task.as_ref().map(|task| format!("task `{task}`"));
        let parts: Vec<String> = [request, row, task].into_iter().flatten().collect();
        f.write_str(&parts.join(", "))
    }
}

/// A promise that an expert broke. It is shown alike by `{}` and `{:?}`, so that a test which returns it is readable.
#[derive(Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which promise.
    pub check: &'static str,
    /// Where.
    pub place: Place,
    /// What was seen.
    pub seen: String,
    /// What to do.
    pub advice: &'static str,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.place.to_string();
        let at = if place.is_empty() { String::new() } else { format!(" at {place}") };
        write!(f, "{}{at}: {}\n  -> {}", self.check, self.seen, self.advice)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Failure {}

/// All promises that an expert broke, the first failure of each.
#[derive(Clone, PartialEq, Eq)]
pub struct Failures(pub Vec<Failure>);

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} of the promises that every expert makes are broken:")?;
        self.0.iter().try_for_each(|failure| write!(f, "\n{failure}"))
    }
}

impl fmt::Debug for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Failures {}

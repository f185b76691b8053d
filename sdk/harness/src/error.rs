//! The errors and failures of tests: why an expert could not be loaded, or which check failed,
//! where, and what to do.

use std::fmt;

use hypercast_fm::example::Example;

/// An expert could not be loaded or trained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused the component, or the network of a native expert.
    #[error(transparent)]
    Expert(#[from] hypercast_expert::Error),
    /// The schema of the world cannot be read or is not valid.
    #[error(transparent)]
    Schema(#[from] hypercast_data::Error),
    /// A native expert could not build its network. Contains the expert's message.
    #[error("the network does not fit this schema: {0}")]
    Network(String),
}

/// The request, row and task of a failure, as far as they are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FailureLocation {
    /// A description of the request.
    pub request: Option<String>,
    /// The index of the candidate in the request, or of the example in a batch.
    pub row: Option<usize>,
    /// The name of the task.
    pub task: Option<String>,
}

impl FailureLocation {
    /// The location of a request.
    pub fn of(example: &Example, surfaces: &[String]) -> FailureLocation {
        let surface = surfaces.get(usize::from(example.surface)).map_or("?", String::as_str);
        let Example { request, targets, history, .. } = example;
        let words = format!(
            "request {request} (surface {surface}, {} candidates, {} past events)",
            targets.len(),
            history.len()
        );
        FailureLocation { request: Some(words), ..FailureLocation::default() }
    }

    /// Adds a row to the location.
    pub fn row(self, row: usize) -> FailureLocation {
        FailureLocation { row: Some(row), ..self }
    }

    /// Adds a task to the location.
    pub fn task(self, task: &str) -> FailureLocation {
        FailureLocation { task: Some(task.into()), ..self }
    }
}

impl fmt::Display for FailureLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = self.request.clone();
        let row = self.row.map(|row| format!("row {row}"));
        let task = self.task.as_ref().map(|task| format!("task `{task}`"));
        let parts: Vec<String> = [request, row, task].into_iter().flatten().collect();
        f.write_str(&parts.join(", "))
    }
}

fn at(place: &FailureLocation) -> String {
    if *place == FailureLocation::default() { String::new() } else { format!(" at {place}") }
}

/// A check that an expert failed. `{:?}` prints the same text as `{}`, so that a test can return
/// it.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{check}{}: {seen}\n  -> {advice}", at(.place))]
pub struct Failure {
    /// The name of the check.
    pub check: &'static str,
    /// Where in the test's requests the check failed.
    pub place: FailureLocation,
    /// The wrong result.
    pub seen: String,
    /// How to correct the expert.
    pub advice: &'static str,
}

impl Failure {
    pub(crate) fn new(
        check: &'static str,
        place: FailureLocation,
        seen: String,
        advice: &'static str,
    ) -> Failure {
        Failure { check, place, seen, advice }
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The first failure of each check that an expert failed.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} of the checks that every expert must pass failed:{}",
    .0.len(),
    .0.iter().map(|failure| format!("\n{failure}")).collect::<String>()
)]
pub struct Failures(pub Vec<Failure>);

impl fmt::Debug for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

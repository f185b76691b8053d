//! The process of an installed `hypercast`, which answers a line of JSON with a line of JSON.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The environment variable that names the binary.
const VARIABLE: &str = "HYPERCAST";

/// The name of the binary.
const NAME: &str = "hypercast";

/// A question that got no answer. `{:?}` prints the same text as `{}`.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// There is no `hypercast` on this machine.
    #[error(
        "cannot find the `{NAME}` program: install it with `cargo install --locked {NAME}`, or set \
         the environment variable {VARIABLE} to it"
    )]
    NotInstalled,
    /// The process cannot be started, or has ended.
    #[error(
        "{}: {why}; see what it printed, and install the version that this test kit was made \
         for: `cargo install --locked {NAME} --version {}`",
        program.display(),
        env!("CARGO_PKG_VERSION")
    )]
    Process {
        /// The binary.
        program: PathBuf,
        /// What went wrong.
        why: String,
    },
    /// The host refuses the expert or a request, or the expert faults.
    #[error("{0}")]
    Refused(String),
}

impl std::fmt::Debug for HostError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// A running `hypercast plugin harness`. It ends when this is dropped.
pub(crate) struct HostProcess {
    program: PathBuf,
    child: Child,
    /// None once it was told that no more questions come.
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl HostProcess {
    /// Starts the installed binary.
    pub(crate) fn start() -> Result<HostProcess, HostError> {
        HostProcess::of(program().ok_or(HostError::NotInstalled)?)
    }

    fn of(program: PathBuf) -> Result<HostProcess, HostError> {
        let mut command = Command::new(&program);
        command.args(["plugin", "harness"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let started = command.spawn();
        let mut child = started.map_err(|error| HostError::Process {
            why: format!("cannot be started: {error}"),
            program: program.clone(),
        })?;
        let questions = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("its output is a pipe"));
        Ok(HostProcess { program, child, questions, answers })
    }

    /// Asks a question, and waits for the answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, question: &Value) -> Result<T, HostError> {
        let answer = self.line(question).map_err(|why| self.failed(why.to_string()))?;
        let mut answer: Value =
            serde_json::from_str(&answer).map_err(|_| self.failed("it has ended".into()))?;
        if let Some(why) = answer["error"].as_str() {
            return Err(HostError::Refused(why.to_owned()));
        }
        serde_json::from_value(answer["ok"].take())
            .map_err(|why| self.failed(format!("gave another answer than expected: {why}")))
    }

    fn line(&mut self, question: &Value) -> std::io::Result<String> {
        let mut answer = String::new();
        if let Some(questions) = &mut self.questions {
            writeln!(questions, "{question}")?;
            questions.flush()?;
            self.answers.read_line(&mut answer)?;
        }
        Ok(answer)
    }

    fn failed(&self, why: String) -> HostError {
        HostError::Process { program: self.program.clone(), why }
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.questions = None;
        let _ = self.child.wait();
    }
}

/// A list of numbers as JSON, in which null stands for NaN.
pub(crate) fn numbers(values: &[f32]) -> Value {
    json!(values)
}

/// The numbers of a list in JSON.
pub(crate) fn read_numbers(values: Vec<Option<f32>>) -> Vec<f32> {
    values.into_iter().map(|value| value.unwrap_or(f32::NAN)).collect()
}

/// The binary that the environment names, or the first one in the path or in a folder above this
/// test's executable, where a checkout's own build puts it.
fn program() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os(VARIABLE) {
        return Some(PathBuf::from(given));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = std::env::current_exe().unwrap_or_default();
    let above = own.ancestors().skip(1).take(2).map(Path::to_path_buf);
    let folders = std::env::split_paths(&path).chain(above);
    folders.map(|folder| folder.join(NAME)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that answers each question with the same line.
    fn answering(line: &str) -> (tempfile::TempDir, HostProcess) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("hypercast");
        let script = format!("#!/bin/sh\nwhile read -r question; do echo '{line}'; done\n");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let process = HostProcess::of(program).unwrap();
        (dir, process)
    }

    #[test]
    fn an_answer_is_a_value_or_a_refusal() {
        let (_dir, mut process) = answering(r#"{"ok": [0.5, null]}"#);
        let values: Vec<Option<f32>> = process.ask(&json!("predict")).unwrap();
        let values = read_numbers(values);
        assert!(values[0] == 0.5 && values[1].is_nan(), "{values:?}");
        let other: Result<String, HostError> = process.ask(&json!("predict"));
        assert!(other.unwrap_err().to_string().contains("another answer"));
        let (_dir, mut process) = answering(r#"{"error": "no such surface"}"#);
        let refused: Result<(), HostError> = process.ask(&json!("predict"));
        assert_eq!(refused, Err(HostError::Refused("no such surface".into())));
    }

    #[test]
    fn a_process_that_ends_is_named_with_what_to_do() {
        let ended = HostProcess::of("/bin/false".into()).unwrap().ask::<()>(&json!("predict"));
        let ended = ended.unwrap_err().to_string();
        assert!(ended.contains("/bin/false") && ended.contains("cargo install"), "{ended}");
        let missing = HostProcess::of("/no/such/program".into()).err().unwrap().to_string();
        assert!(missing.contains("cannot be started"), "{missing}");
    }
}

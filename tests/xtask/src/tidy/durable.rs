//! What must survive a crash: files and folders are replaced by one primitive alone.

use anyhow::Result;

use super::TidyFinding;
use crate::{
    scan::scan,
    sources::{RustFile, Sources, test_lines},
};

/// What writes files that must survive a crash. Tools for authors are not among it.
const PLACES: [&str; 2] = ["host/", "fm/"];

/// The primitive, which `atomic_dir` beside it uses too, and the names of `std::fs` below it.
const PRIMITIVES: [&str; 2] = ["host/core/src/atomic_file.rs", "host/core/src/disk.rs"];

/// A crash after either leaves half a file, or none.
const CALLS: [&str; 3] = ["fs::write(", "fs::rename(", "disk::rename("];

/// Files that are written or renamed by hand, outside of tests and examples.
pub fn whole_files(_: &Sources, files: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let counts = |file: &&RustFile<'_>| {
        let is_example = file.path.split('/').any(|part| part == "examples");
        let is_placed = PLACES.iter().any(|place| file.path.starts_with(place));
        is_placed && !file.is_test && !is_example && !PRIMITIVES.contains(&file.path)
    };
    let mut findings = Vec::new();
    for file in files.iter().filter(counts) {
        let of_tests = test_lines(&file.syntax);
        let lines = scan(file.text).into_iter().zip(1..);
        for (line, number) in lines.filter(|(_, number)| !of_tests.contains(number)) {
            if let Some(call) = CALLS.iter().find(|call| line.code.contains(**call)) {
                findings.push(TidyFinding {
                    path: file.path.to_owned(),
                    line: number,
                    problem: format!("`{call}..)` is not durable"),
                    remedy: "use atomic_file or atomic_dir of hypercast-core",
                });
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::places;

    #[test]
    fn writes_by_hand_are_found() {
        let code = "/// fs::write(a)\nfn f() {\n    std::fs::write(a, b); // fs::write(a)\n    \
                    fs::rename(a, b);\n    g(\"fs::write(\");\n}\n#[cfg(test)]\nmod tests {\n    \
                    fn t() {\n        fs::write(a, b);\n    }\n}\n";
        let found = places(
            whole_files,
            &[
                ("host/serve/src/a.rs", code),
                ("host/serve/tests/a.rs", code),
                ("host/core/src/atomic_file.rs", code),
                ("fm/examples/a.rs", code),
                ("tests/xtask/src/a.rs", code),
            ],
        );
        assert_eq!(found, [3, 4].map(|line| ("host/serve/src/a.rs".to_owned(), line)));
    }
}

//! What can be seen line by line: the width of comments and documents, the length of files.

use anyhow::Result;

use super::TidyFinding;
use crate::{
    scan::scan,
    sources::{RustFile, Sources},
};

/// The most columns of a line with a comment, and of a line of Markdown. As `max_width` of rustfmt.
const MAX_COLUMNS: usize = 100;

/// The most lines of a Rust file.
const MAX_FILE_LINES: usize = 600;

/// Comments of Rust and TOML, and Markdown.
pub fn width(sources: &Sources, _: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let mut findings = Vec::new();
    let mut add = |path: &str, at: usize, line: &str| {
        let columns = line.chars().count();
        if columns > MAX_COLUMNS && !is_link(line) {
            findings.push(TidyFinding {
                path: path.to_owned(),
                line: at + 1,
                problem: format!("{columns} columns"),
                remedy: "wrap the text at 100",
            });
        }
    };
    for (path, text) in sources.ending(".rs") {
        for (at, (line, scanned)) in text.lines().zip(scan(text)).enumerate() {
            if scanned.has_comment {
                add(path, at, line);
            }
        }
    }
    for (path, text) in sources.ending(".toml") {
        for (at, line) in text.lines().enumerate().filter(|(_, l)| l.trim_start().starts_with('#'))
        {
            add(path, at, line);
        }
    }
    for (path, text) in sources.ending(".md") {
        let mut in_fence = false;
        for (at, line) in text.lines().enumerate() {
            let start = line.trim_start();
            if start.starts_with("```") {
                in_fence = !in_fence;
            } else if !in_fence && !start.starts_with('|') {
                add(path, at, line);
            }
        }
    }
    Ok(findings)
}

/// Whether a line is one link or one address, which cannot be wrapped.
fn is_link(line: &str) -> bool {
    let text = line.trim_start_matches(['/', '!', '#', '*', '-', '>', ' ', '\t']).trim_end();
    let is_reference = text.starts_with('[') && text.contains("]: ");
    let is_inline = (text.starts_with('[') || text.starts_with("![")) && text.ends_with(')');
    let is_address = !text.contains(' ') && text.contains("://");
    is_reference || is_address || is_inline && text.matches("](").count() == 1
}

/// Rust files that are too long to be read as a whole.
pub fn size(sources: &Sources, _: &[RustFile<'_>]) -> Result<Vec<TidyFinding>> {
    let lengths = sources.ending(".rs").map(|(path, text)| (path, text.lines().count()));
    let too_long = lengths.filter(|(_, lines)| *lines > MAX_FILE_LINES);
    Ok(too_long
        .map(|(path, lines)| TidyFinding {
            path: path.to_owned(),
            line: MAX_FILE_LINES + 1,
            problem: format!("{lines} lines"),
            remedy: "split the file by duty; 600 are the most",
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::places;

    #[test]
    fn wide_comments_are_found() {
        let wide = "x ".repeat(50) + "y";
        let fits = "x ".repeat(46);
        let rust = format!(
            "// {wide}\n//! {fits}\nconst A: &str = \"{wide}\";\nfn f() {{}} // {wide}\n/*\n  {wide}\n*/\n"
        );
        let toml = format!("# {wide}\na = \"{wide}\"\n");
        let found = places(width, &[("a.rs", &rust), ("b.toml", &toml)]);
        let expected = [("a.rs", 1), ("a.rs", 4), ("a.rs", 6), ("b.toml", 1)];
        assert_eq!(found, expected.map(|(path, line)| (path.to_owned(), line)));
    }

    #[test]
    fn tables_fences_and_links_may_be_wide() {
        let wide = "x ".repeat(60);
        let address = format!("https://host/{}", "x".repeat(120));
        let text = format!(
            "| {wide} |\n```\n{wide}\n```\n{address}\n[a]: {address}\n- [a b]({address})\nsee {address}\n{wide}\n"
        );
        let found = places(width, &[("a.md", &text)]);
        assert_eq!(found, [("a.md".to_owned(), 8), ("a.md".to_owned(), 9)]);
        let columns = "ü".repeat(100);
        assert_eq!(places(width, &[("a.md", &columns)]), []);
    }

    #[test]
    fn long_files_are_found() {
        let (fits, long) = ("// a\n".repeat(600), "// a\n".repeat(601));
        let found = places(size, &[("a.rs", &fits), ("b.rs", &long), ("c.md", &long)]);
        assert_eq!(found, [("b.rs".to_owned(), 601)]);
    }
}

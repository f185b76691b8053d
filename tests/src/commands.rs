//! The commands of a page of the documentation, for tests that run them.

use std::path::{Path, PathBuf};

/// The repository's root.
///
/// # Panics
/// It was moved while tests run.
pub fn checkout() -> PathBuf {
    std::fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).expect("it is there")
}

/// The commands of ```` ```sh ```` blocks.
///
/// # Panics
/// A block is not closed.
pub fn shell_blocks(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in page.lines() {
        match (&mut block, line.trim_end()) {
            (None, "```sh") => block = Some(String::new()),
            (Some(_), "```") => blocks.extend(block.take()),
            (Some(block), line) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, _) => {}
        }
    }
    assert!(block.is_none(), "every block of the page is closed");
    blocks
}

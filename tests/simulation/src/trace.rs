//! What happens in a simulation, line by line. Its hash tells whether two runs are the same.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use hypercast_core::hash::mix_parts;

/// The lines of a run.
#[derive(Default)]
pub struct Trace {
    hash: Cell<u64>,
    /// Kept only where somebody will read them.
    lines: RefCell<Option<Vec<String>>>,
}

impl Trace {
    /// Keeps the lines from now on.
    pub fn keep(&self) {
        self.lines.borrow_mut().get_or_insert_default();
    }

    /// Notes what `who` does.
    pub fn line(&self, at: Duration, who: &str, what: impl FnOnce() -> String) {
        let line = format!("{:>12.3} {who} {}", at.as_secs_f64(), what());
        let words = line.as_bytes().chunks(8).map(|word| {
            let mut eight = [0; 8];
            eight[..word.len()].copy_from_slice(word);
            u64::from_le_bytes(eight)
        });
        self.hash.set(words.fold(self.hash.get(), |hash, word| mix_parts(&[hash, word])));
        if let Some(lines) = &mut *self.lines.borrow_mut() {
            lines.push(line);
        }
    }

    /// A number that two equal traces have in common, and no two others.
    pub fn hash(&self) -> u64 {
        self.hash.get()
    }

    /// The lines that were kept.
    pub fn lines(&self) -> Vec<String> {
        self.lines.borrow().clone().unwrap_or_default()
    }
}

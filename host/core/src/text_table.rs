//! Tables for people: columns as wide as their widest cell, so that long names of a team's own
//! surfaces and tasks do not shift what stands beside them.

use std::fmt;

/// Lines of cells under a head. The first columns are names and stand left, the others right.
#[derive(Debug, Clone)]
pub struct TextTable {
    names: usize,
    lines: Vec<Vec<String>>,
}

impl TextTable {
    /// A table with the head alone, whose first `names` columns stand left.
    pub fn new<C: Into<String>>(names: usize, head: impl IntoIterator<Item = C>) -> TextTable {
        let mut table = TextTable { names, lines: Vec::new() };
        table.line(head);
        table
    }

    /// Adds a line. It may have fewer cells than the head.
    pub fn line<C: Into<String>>(&mut self, cells: impl IntoIterator<Item = C>) {
        self.lines.push(cells.into_iter().map(Into::into).collect());
    }

    /// Whether only the head is there.
    pub fn is_empty(&self) -> bool {
        self.lines.len() == 1
    }
}

impl fmt::Display for TextTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.lines.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths = vec![0; columns];
        for line in &self.lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = cell.chars().count().max(*width);
            }
        }
        for line in &self.lines {
            let mut text = String::new();
            for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                text += &if column < self.names {
                    format!("{gap}{cell:<width$}")
                } else {
                    format!("{gap}{cell:>width$}")
                };
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = TextTable::new(2, ["surface", "task", "NE"]);
        assert!(table.is_empty());
        table.line(["home", "a_task_with_a_long_name", "0.9"]);
        table.line(["", "like", "12.25"]);
        let expected = "surface  task                        NE\n\
                        home     a_task_with_a_long_name    0.9\n\
                        \u{20}        like                     12.25\n";
        assert_eq!(table.to_string(), expected);
    }
}

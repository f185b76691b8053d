//! Columns whose cells have several categories: lists, and texts with a character between parts.

use std::collections::HashSet;

use hypercast_data::schema::{MAX_TAGS, category_id};

use super::sample::percent;
use crate::cell::Cell;

/// The most different parts that are counted one by one. A column with more has no tags.
const MAX_DIFFERENT: usize = 1_000;

/// The least share of the cells that have several parts, where a text is taken as a list.
const LEAST_SHARE: f64 = 0.3;

/// The characters that are looked for between the parts of a text, the likeliest first.
const SEPARATORS: [char; 4] = ['|', ';', ',', ' '];

/// The different cells for each different part, at least, where spaces separate: names have spaces,
/// too, but few words make many cells only where each is a tag.
const LEAST_CELLS_A_WORD: usize = 4;

/// What the cells of a column say if each is a list.
#[derive(Debug, Clone, Default)]
pub(super) struct ListSample {
    /// What is between two parts; none of lists.
    separator: Option<char>,
    cells: usize,
    /// Cells with several different parts.
    several: usize,
    /// The most different parts of a cell.
    most: usize,
    parts: usize,
    numbers: usize,
    fractions: usize,
    different: HashSet<u64>,
}

/// What a mapping says of a column of tags, and why.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TagProposal {
    pub(super) separator: Option<char>,
    pub(super) max_values: usize,
    pub(super) reason: String,
}

/// A sample for lists, and one for each character that may separate a text.
pub(super) fn samples() -> Vec<ListSample> {
    let separators = std::iter::once(None).chain(SEPARATORS.map(Some));
    separators.map(|separator| ListSample { separator, ..ListSample::default() }).collect()
}

/// The first way to read a column's cells as lists, of which there are `cells` different ones.
pub(super) fn propose(samples: &[ListSample], cells: usize) -> Option<TagProposal> {
    samples.iter().find_map(|sample| sample.proposal(cells))
}

impl ListSample {
    /// Sees a cell that is not missing.
    pub(super) fn add(&mut self, cell: &Cell<'_>) {
        let is_list = matches!(cell, Cell::List(_));
        if is_list != self.separator.is_none() {
            return;
        }
        self.cells += 1;
        if self.different.len() > MAX_DIFFERENT {
            return;
        }
        let mut own = HashSet::new();
        for part in cell.clone().elements(self.separator) {
            let Ok(Some(text)) = part.category() else { continue };
            let id = category_id(&text);
            self.parts += 1;
            if let Ok(Some(number)) = part.number() {
                self.numbers += 1;
                self.fractions += usize::from(number.fract() != 0.0);
            }
            own.insert(id);
            self.different.insert(id);
        }
        self.several += usize::from(own.len() > 1);
        self.most = self.most.max(own.len());
    }

    fn proposal(&self, cells: usize) -> Option<TagProposal> {
        let share = self.several as f64 / self.cells.max(1) as f64;
        let is_small = self.different.len() <= MAX_DIFFERENT && self.most > 1;
        let is_split = match self.separator {
            // Numbers with a fraction are a vector.
            None => self.fractions == 0,
            // Parts are words that come again in other cells; a decimal comma parts numbers.
            Some(separator) => {
                let least = if separator == ' ' { LEAST_CELLS_A_WORD } else { 1 };
                share >= LEAST_SHARE
                    && least * self.different.len() < cells
                    && self.different.len() < self.cells
                    && 2 * self.numbers < self.parts
            }
        };
        if !(is_small && is_split) {
            return None;
        }
        let what = match self.separator {
            None => "lists".to_owned(),
            Some(' ') => format!("spaces part {} of the cells", percent_of(share)),
            Some(separator) => format!("`{separator}` parts {} of the cells", percent_of(share)),
        };
        let (most, different) = (self.most, self.different.len());
        Some(TagProposal {
            separator: self.separator,
            max_values: most.next_multiple_of(4).min(MAX_TAGS),
            reason: format!(
                "{what}; at most {most} values in a cell, {different} different; of more, the \
                 first ones count"
            ),
        })
    }
}

fn percent_of(share: f64) -> String {
    percent((share * 1e4) as usize, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposed<'a>(cells: impl IntoIterator<Item = Cell<'a>>) -> Option<TagProposal> {
        let (mut samples, mut different) = (samples(), HashSet::new());
        for cell in cells {
            samples.iter_mut().for_each(|sample| sample.add(&cell));
            different.insert(format!("{cell:?}"));
        }
        propose(&samples, different.len())
    }

    fn texts(cells: &[String]) -> Vec<Cell<'_>> {
        cells.iter().map(|cell| Cell::of_text(cell.as_str().into())).collect()
    }

    /// A cell of two or one of five tags.
    fn tags(at: usize, separator: &str) -> String {
        let tag = |at: usize| ["red", "green", "blue", "old", "new"][at % 5];
        if at.is_multiple_of(3) { tag(at).into() } else { [tag(at), tag(at / 5)].join(separator) }
    }

    #[test]
    fn texts_with_separators_and_lists_are_tags() {
        for separator in ["|", ";", ", "] {
            let cells: Vec<String> = (0..200).map(|at| tags(at, separator)).collect();
            let proposal = proposed(texts(&cells)).expect(separator);
            assert_eq!(proposal.separator, separator.chars().next());
            assert_eq!(proposal.max_values, 4);
            assert!(proposal.reason.contains("at most 2 values in a cell, 5 different"));
        }
        let numbers = |at: i128| Cell::List((0..at % 7).map(Cell::Integer).collect());
        let proposal = proposed((0..50).map(numbers)).unwrap();
        assert_eq!((proposal.separator, proposal.max_values), (None, 8));
    }

    #[test]
    fn few_words_that_make_many_cells_are_tags() {
        let genres = ["action", "comedy", "drama", "horror", "western"];
        let cells: Vec<String> = (1..32usize)
            .map(|of| {
                let words = (0..5).filter(|at| of >> at & 1 == 1).map(|at| genres[at]);
                words.collect::<Vec<_>>().join(" ")
            })
            .collect();
        let proposal = proposed(texts(&cells)).unwrap();
        assert_eq!((proposal.separator, proposal.max_values), (Some(' '), 8));
        let jobs = ["sales", "self employed", "home maker", "technician", "tax clerk"];
        let jobs: Vec<String> = (0..200).map(|at| jobs[at % 5].into()).collect();
        assert_eq!(proposed(texts(&jobs)), None);
    }

    #[test]
    fn sentences_prices_and_vectors_are_no_tags() {
        let titles: Vec<String> = (0..200).map(|at| format!("Chair {at}, with legs")).collect();
        let prices: Vec<String> = (0..200).map(|at| format!("{},{}", at % 9, at % 7)).collect();
        for cells in [&titles, &prices] {
            assert_eq!(proposed(texts(cells)), None, "{}", cells[0]);
        }
        let rare: Vec<String> = (0..200)
            .map(|at| if at % 10 == 0 { "a,b".to_owned() } else { tags(3 * at, "") })
            .collect();
        assert_eq!(proposed(texts(&rare)), None, "few cells have several parts");
        let vector = |at: usize| Cell::List(vec![Cell::Number(0.5 * at as f64), Cell::Number(1.0)]);
        assert_eq!(proposed((0..50).map(vector)), None);
    }
}

//! Splits Rust source into code, comments and literals, line by line.

/// What one line of a source file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// The code alone: comments and the contents of literals are blanked.
    pub code: String,
    /// Whether anything but comments and white space is on the line.
    pub has_code: bool,
    /// Whether a comment is on the line.
    pub has_comment: bool,
}

#[derive(Clone, Copy)]
enum State {
    Code,
    LineComment,
    /// With the number of comments that are open.
    BlockComment(usize),
    Text,
    /// With the number of `#` that end it.
    RawText(usize),
}

/// Scans a file. The result has one entry a line.
pub fn scan(text: &str) -> Vec<Line> {
    let chars: Vec<char> = text.chars().collect();
    let mut lines = Vec::new();
    let mut line = Line::default();
    let mut state = State::Code;
    let mut at = 0;
    while at < chars.len() {
        if chars[at] == '\n' {
            if matches!(state, State::LineComment) {
                state = State::Code;
            }
            lines.push(std::mem::take(&mut line));
            at += 1;
            continue;
        }
        let (taken, next) = step(&chars, at, state);
        for &char in &chars[at..at + taken] {
            mark(&mut line, char, state, next);
        }
        state = next;
        at += taken;
    }
    if line != Line::default() {
        lines.push(line);
    }
    lines
}

/// How many characters belong together at `at`, and the state after them. Never crosses a line.
fn step(chars: &[char], at: usize, state: State) -> (usize, State) {
    let here = |ahead: usize| chars.get(at + ahead).copied().unwrap_or('\0');
    match state {
        State::LineComment => (1, state),
        State::BlockComment(open) => match (here(0), here(1)) {
            ('/', '*') => (2, State::BlockComment(open + 1)),
            ('*', '/') if open == 1 => (2, State::Code),
            ('*', '/') => (2, State::BlockComment(open - 1)),
            _ => (1, state),
        },
        State::Text => match here(0) {
            '\\' if here(1) != '\n' && at + 1 < chars.len() => (2, state),
            '"' => (1, State::Code),
            _ => (1, state),
        },
        State::RawText(hashes) => {
            let ends = here(0) == '"' && (1..=hashes).all(|ahead| here(ahead) == '#');
            if ends { (1 + hashes, State::Code) } else { (1, state) }
        }
        State::Code => match (here(0), here(1)) {
            ('/', '/') => (2, State::LineComment),
            ('/', '*') => (2, State::BlockComment(1)),
            ('"', _) => (1, State::Text),
            ('r', '"' | '#') if starts_word(chars, at) => {
                let hashes = chars[at + 1..].iter().take_while(|char| **char == '#').count();
                if here(1 + hashes) == '"' {
                    (2 + hashes, State::RawText(hashes))
                } else {
                    (1, state)
                }
            }
            ('\'', _) => (quoted(chars, at), state),
            _ => (1, state),
        },
    }
}

/// Whether the `r` at `at` begins a word, or follows the `b` or `c` that does.
fn starts_word(chars: &[char], at: usize) -> bool {
    let is_word = |char: char| char.is_alphanumeric() || char == '_';
    let begins = |at: usize| at == 0 || !is_word(chars[at - 1]);
    begins(at) || matches!(chars[at - 1], 'b' | 'c') && begins(at - 1)
}

/// The length of the character literal at `at`; 1 if it is a lifetime.
fn quoted(chars: &[char], at: usize) -> usize {
    let end = if chars.get(at + 1) == Some(&'\\') {
        (at + 3..chars.len().min(at + 13)).find(|end| chars[*end] == '\'')
    } else {
        Some(at + 2).filter(|end| chars.get(*end) == Some(&'\'') && chars[at + 1] != '\n')
    };
    end.map_or(1, |end| end + 1 - at)
}

/// Adds a character to the line, by the state before it and after it.
fn mark(line: &mut Line, char: char, before: State, after: State) {
    let in_comment = |state| matches!(state, State::LineComment | State::BlockComment(_));
    let is_comment = in_comment(before) || in_comment(after);
    let is_visible = !char.is_whitespace();
    line.has_comment |= is_comment && is_visible;
    line.has_code |= !is_comment && is_visible;
    let is_code = matches!((before, after), (State::Code, State::Code));
    line.code.push(if is_code { char } else { ' ' });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<(bool, bool)> {
        scan(text).iter().map(|line| (line.has_code, line.has_comment)).collect()
    }

    #[test]
    fn code_and_comments_are_told_apart() {
        let text = "let a = 1; // one\n\n/* a\n /* b */ c\n */ f()\n/// doc\n}\n";
        let expected = [
            (true, true),
            (false, false),
            (false, true),
            (false, true),
            (true, true),
            (false, true),
            (true, false),
        ];
        assert_eq!(kinds(text), expected);
    }

    #[test]
    fn literals_hide_comment_marks_and_quotes() {
        for text in [
            "let a = \"// no\";",
            "let a = \"\\\"// no\";",
            "let a = r#\"\"// no\"#;",
            "let a = br\"/* no\";",
            "let a = '\"'; let b = \"// no\";",
            "let a = '\\''; let b = \"// no\";",
            "let a = '\\u{1F600}'; let b = \"// no\";",
            "fn f<'a>(a: &'a str) -> &'a str { a }",
        ] {
            assert_eq!(kinds(text), [(true, false)], "{text}");
        }
        assert_eq!(kinds("let a = r#type; // yes"), [(true, true)]);
    }

    #[test]
    fn a_literal_may_span_lines() {
        assert_eq!(
            kinds("a(\"\n // no\n\n\"); // yes"),
            [(true, false), (true, false), (false, false), (true, true)]
        );
        let lines = scan("let b = \"x::y\"; a::b() // c::d");
        assert!(lines[0].code.contains("a::b()"), "{:?}", lines[0]);
        assert!(!lines[0].code.contains("x::y") && !lines[0].code.contains("c::d"));
    }
}

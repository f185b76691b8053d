//! Files of bearer tokens: a line `NAME TOKEN` each, with the word `replay` behind those whose
//! holders may set the time.
//!
//! Tokens are neither stored nor logged: only a MAC of each under a key of this process is kept,
//! and every comparison goes through all of them in constant time.

use std::path::Path;

use hypercast_core::secret_file;
use ring::{hmac, rand::SystemRandom};

use crate::error::{CommonErrors as _, Error, Result};

/// The fewest characters of a token.
const SHORTEST: usize = 24;

/// The word behind a token in its file that gives the right to set the time.
const REPLAY: &str = "replay";

/// Tokens with the names of their holders.
pub(super) struct TokenList {
    key: hmac::Key,
    known: Vec<TokenHolder>,
}

/// A line of a file of tokens.
pub(super) struct TokenHolder {
    pub(super) name: String,
    tag: hmac::Tag,
    /// Whether the line ends with [`REPLAY`].
    pub(super) may_replay: bool,
}

impl TokenList {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = secret_file::read(path)?;
        let text = str::from_utf8(&text).map_err(|_| Error::data(path, "it is not text"))?;
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
            .map_err(|_| Error::internal("the system gives no random bytes"))?;
        let mut known: Vec<TokenHolder> = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            // The message leaves the line out, because it may hold a secret.
            let wrong = |why: &str| Error::data(path, format!("line {}: {why}", at + 1));
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, token, may_replay) = match words[..] {
                [name, token] => (name, token, false),
                [name, token, REPLAY] => (name, token, true),
                _ => {
                    return Err(wrong(
                        "it is not `NAME TOKEN` or `NAME TOKEN replay`; lines that start with # are comments",
                    ));
                }
            };
            if token.len() < SHORTEST || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(wrong(&format!(
                    "the token of {name:?} is too short or not plain ASCII: use at least {SHORTEST} characters, for example from `openssl rand -hex 32`"
                )));
            }
            if known.iter().any(|other| other.name == name) {
                return Err(wrong(&format!(
                    "{name:?} has a token already; give each its own name"
                )));
            }
            let tag = hmac::sign(&key, token.as_bytes());
            known.push(TokenHolder { name: name.to_owned(), tag, may_replay });
        }
        if known.is_empty() {
            return Err(Error::data(path, "it has no token; write one `NAME TOKEN` per line"));
        }
        Ok(Self { key, known })
    }

    /// A token's holder. Always compares with all tokens, to take constant time.
    pub(super) fn holder(&self, token: &str) -> Option<&TokenHolder> {
        let mut found = None;
        for holder in &self.known {
            if hmac::verify(&self.key, token.as_bytes(), holder.tag.as_ref()).is_ok() {
                found = Some(holder);
            }
        }
        found
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const OPS: &str = "0123456789abcdef0123456789abcdef";
    const CALLER: &str = "fedcba9876543210fedcba9876543210";

    /// A file that only its owner can read.
    pub(in crate::http) fn written(dir: &Path, name: &str, text: &str) -> std::path::PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    #[test]
    fn files_of_tokens_are_read_or_refused_without_telling_a_secret() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| TokenList::read(&written(dir.path(), "tokens", text));
        let tokens = read(&format!("# who may\n\nops {OPS}\nci\t{CALLER}\n")).unwrap();
        let holder = |token| tokens.holder(token).map(|holder| holder.name.as_str());
        assert_eq!((holder(OPS), holder(CALLER)), (Some("ops"), Some("ci")));
        assert_eq!((holder(&OPS[1..]), holder("")), (None, None));
        for (text, word) in [
            ("# none\n", "no token"),
            ("ops\n", "line 1"),
            ("a b c\n", "NAME TOKEN replay"),
            (&format!("ops {OPS} replay admin\n"), "line 1"),
            ("ops secretsecret\n", "at least 24"),
            (&format!("ops {OPS}\nops {CALLER}\n"), "line 2"),
        ] {
            let error = read(text).err().expect(text).to_string();
            assert!(error.contains(word) && !error.contains("secretsecret"), "{error}");
            assert!(!error.contains(OPS) && !error.contains(CALLER), "{error}");
        }
        let path = written(dir.path(), "open", &format!("ops {OPS}\n"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = TokenList::read(&path).err().expect("others may read it").to_string();
        assert!(error.contains("chmod 640"), "{error}");
    }
}

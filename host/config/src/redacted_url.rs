//! URLs that may contain a user and a password, which no message shows.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What is shown in place of a user and a password.
const REDACTED: &str = "***@";

/// A server's URL, or several that are separated by commas. Its `Debug` and `Display` forms hide
/// the user and the password; only the configuration file contains them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RedactedUrl(String);

/// The user that a URL names.
#[derive(Clone, PartialEq, Eq)]
pub enum UrlLogin {
    /// `USER:PASSWORD@`, decoded.
    Password {
        /// The user's name.
        user: String,
        /// The password in clear text.
        password: String,
    },
    /// `TOKEN@`, decoded.
    Token(String),
}

/// One URL, cut at its user information.
struct SplitUrl<'a> {
    scheme: &'a str,
    login: Option<&'a str>,
    host: &'a str,
}

impl RedactedUrl {
    /// The URLs without users and passwords.
    pub fn addresses(&self) -> Vec<String> {
        self.split().map(|url| format!("{}{}", url.scheme, url.host)).collect()
    }

    /// Checks that each URL is `HOST`, `HOST:PORT` or `SCHEME://HOST:PORT`, perhaps with a user.
    ///
    /// # Errors
    /// What it must be, without the URL.
    pub(super) fn validate(&self, key: &str) -> Result<(), String> {
        if self.split().all(|url| is_host(url.host)) {
            return Ok(());
        }
        Err(format!(
            "{key} must be nats://HOST:PORT or tls://HOST:PORT, or several separated by commas; in a \
             user or a password, write `,`, `@`, `/` and `:` as %2C, %40, %2F and %3A"
        ))
    }

    /// The user of the first URL that names one. Servers of a cluster share their users.
    pub fn login(&self) -> Option<UrlLogin> {
        let login = self.split().find_map(|url| url.login)?;
        Some(match login.split_once(':') {
            Some((user, password)) => {
                UrlLogin::Password { user: decoded(user), password: decoded(password) }
            }
            None => UrlLogin::Token(decoded(login)),
        })
    }

    fn split(&self) -> impl Iterator<Item = SplitUrl<'_>> {
        self.0.split(',').map(|url| {
            let url = url.trim();
            let start = url.find("://").map_or(0, |at| at + 3);
            let (scheme, rest) = url.split_at(start);
            match rest.rsplit_once('@') {
                Some((login, host)) => SplitUrl { scheme, login: Some(login), host },
                None => SplitUrl { scheme, login: None, host: rest },
            }
        })
    }
}

impl From<String> for RedactedUrl {
    fn from(url: String) -> Self {
        RedactedUrl(url)
    }
}

impl From<&str> for RedactedUrl {
    fn from(url: &str) -> Self {
        RedactedUrl(url.to_owned())
    }
}

impl fmt::Display for RedactedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, SplitUrl { scheme, login, host }) in self.split().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            let login = login.map_or("", |_| REDACTED);
            // Else it may be a part of a password that is not encoded.
            let host = if is_host(host) { host } else { "***" };
            write!(f, "{comma}{scheme}{login}{host}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for RedactedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl fmt::Debug for UrlLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

/// Whether this is a host's name or address, perhaps with a port.
fn is_host(text: &str) -> bool {
    let text = text.strip_suffix('/').unwrap_or(text);
    let name = match text.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() => name,
        _ => text,
    };
    let literal = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    match literal {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)),
    }
}

/// Decodes `%40` and the like.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        let code = behind.get(..2).filter(|_| *first == b'%');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_form_shows_a_password_and_the_client_gets_it_apart() {
        let url = RedactedUrl::from("nats://anna:p%40s%2Cs@one:4222, tls://two:4222");
        assert_eq!(url.to_string(), "nats://***@one:4222,tls://two:4222");
        let shown = format!("{url:?} {:?}", url.login());
        assert!(!shown.contains("anna") && !shown.contains("p%40s"), "{shown}");
        assert_eq!(url.addresses(), ["nats://one:4222", "tls://two:4222"]);
        let (user, password) = ("anna".to_owned(), "p@s,s".to_owned());
        assert!(url.login() == Some(UrlLogin::Password { user, password }));
        let token = RedactedUrl::from("secret@host");
        assert_eq!((token.to_string().as_str(), &token.addresses()[0][..]), ("***@host", "host"));
        assert!(token.login() == Some(UrlLogin::Token("secret".to_owned())));
        assert_eq!(RedactedUrl::from("nats://host:1").login(), None);
    }

    #[test]
    fn a_password_that_is_not_encoded_is_refused_without_being_shown() {
        for url in ["nats://anna:qu,zz@one:4222", "nats://anna:qu/zz", "nats://anna:qu zz"] {
            let url = RedactedUrl::from(url);
            let error = url.validate("engine.nats_url").unwrap_err();
            let shown = format!("{url} {url:?} {error}");
            assert!(!shown.contains("anna") && !shown.contains("zz"), "{shown}");
        }
        for url in ["nats://[::1]:4222", "one, tls://u:p%2F@two:1/", "nats://10.0.0.1:4222"] {
            assert_eq!(RedactedUrl::from(url).validate("engine.nats_url"), Ok(()));
        }
    }

    #[test]
    fn the_configuration_file_keeps_the_whole_url() {
        let url = RedactedUrl::from("nats://anna:pass@one");
        let text = toml::Value::try_from(&url).unwrap();
        assert_eq!(text.as_str(), Some("nats://anna:pass@one"));
    }
}

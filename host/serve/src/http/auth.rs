//! Access control: bearer tokens for the admin routes, and for the other routes if the
//! configuration asks for them.
//!
//! Admin routes need tokens wherever other machines can reach the address. On a loopback address
//! without tokens they are for programs of this machine, so requests that a browser sends for some
//! page are refused.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, HeaderValue, header},
    middleware::{Next, from_fn},
    response::Response,
};
use hypercast_config::ServerSettings;
use prometheus::IntCounterVec;

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::{respond::refuse_with, tokens::TokenList},
    metrics::Metrics,
    threads::Current,
};

/// Who sent a request. Handlers behind a guard find it in the request's extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name of the caller's token.
    pub(crate) name: String,
    /// Whether the caller may set the joiner's time (`clock_ms`), as a replay of the past needs.
    pub(crate) may_replay: bool,
}

/// The routes that access rules are for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GuardedRoutes {
    /// Those of operators.
    Admin,
    /// The others. They are open unless `server.tokens` is set.
    Callers,
}

/// Puts the access rules in front of `router`.
pub(crate) fn guard<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    access: &Arc<AccessControl>,
    routes: GuardedRoutes,
) -> Router<S> {
    let access = access.clone();
    router.route_layer(from_fn(move |request: Request, next: Next| {
        access.clone().check(routes, request, next)
    }))
}

/// The access rules, which a reload replaces while requests run.
pub(crate) struct AccessControl {
    address: IpAddr,
    pub(crate) rules: Current<AccessRules>,
    refused: IntCounterVec,
}

/// Access rules, read completely.
pub(crate) struct AccessRules {
    admin: AdminAccess,
    callers: Option<TokenList>,
    /// Whether only this machine reaches the server.
    local: bool,
}

enum AdminAccess {
    /// Off, with the reason.
    Off(&'static str),
    /// Open to programs of this machine.
    Local,
    /// Open to the holders of these tokens.
    Tokens(TokenList),
}

impl AccessControl {
    /// Reads the rules for a server at several addresses. If other machines reach one of them, the
    /// rules for that apply to all.
    ///
    /// # Errors
    /// As [`AccessControl::read`].
    ///
    /// # Panics
    /// Without an address.
    pub(crate) fn new(
        server: &ServerSettings,
        addresses: &[SocketAddr],
        metrics: &Metrics,
    ) -> Result<Arc<Self>> {
        let all = || addresses.iter().map(SocketAddr::ip);
        let address = all().find(|address| !is_local(*address)).or_else(|| all().next());
        let address = address.expect("a server has an address");
        let refused = metrics.counter(
            "hypercast_unauthorised_total",
            "Requests refused by access control, by kind of route and cause",
            &["routes", "cause"],
        );
        let rules = Current::new(AccessRules::read(server, address)?);
        let access = Self { address, rules, refused };
        if let AdminAccess::Off(why) = &access.rules.now().admin
            && server.admin
        {
            tracing::warn!(%address, "{why}");
        }
        Ok(Arc::new(access))
    }

    /// Reads the rules of another configuration, without applying them.
    ///
    /// # Errors
    /// Token files that are missing, readable by others or malformed; admin routes that would be
    /// unprotected.
    pub(crate) fn read(&self, server: &ServerSettings) -> Result<AccessRules> {
        AccessRules::read(server, self.address)
    }

    async fn check(
        self: Arc<Self>,
        routes: GuardedRoutes,
        mut request: Request,
        next: Next,
    ) -> Response {
        let (routes, verdict) = match routes {
            GuardedRoutes::Admin => ("admin", self.rules.now().admin(request.headers())),
            GuardedRoutes::Callers => ("callers", self.rules.now().caller(request.headers())),
        };
        let denial = match verdict {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                return next.run(request).await;
            }
            Err(denial) => denial,
        };
        self.refused.with_label_values(&[routes, denial.cause]).inc();
        tracing::debug!(routes, cause = denial.cause, "a request is refused");
        let mut response = refuse_with(denial.status, denial.code, &denial.message);
        if denial.status == 401 {
            let challenge = HeaderValue::from_static("Bearer realm=\"hypercast\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl AccessRules {
    fn read(server: &ServerSettings, address: IpAddr) -> Result<Self> {
        let tokens = |path: &Path| {
            let given = !path.as_os_str().is_empty();
            given.then(|| TokenList::read(path)).transpose()
        };
        let (admin, callers) = (tokens(&server.admin_tokens)?, tokens(&server.tokens)?);
        let local = is_local(address);
        let protected = local || server.has_tls() || server.insecure_admin;
        let admin = match admin {
            _ if !server.admin => AdminAccess::Off(
                "admin routes are off (server.admin); set it to true and restart or reload",
            ),
            Some(tokens) if protected => AdminAccess::Tokens(tokens),
            Some(_) => {
                return Err(Error::invalid(format!(
                    "admin tokens would travel in the clear: server.listen is {address}, which others reach. Set server.tls_certificate \
                     and server.tls_key; or server.insecure_admin = true where a proxy in front speaks TLS; or server.admin = false"
                )));
            }
            None if local => AdminAccess::Local,
            None if server.insecure_admin => {
                return Err(Error::invalid(format!(
                    "server.insecure_admin waives TLS, not tokens: server.listen is {address}, which others reach. Set server.admin_tokens"
                )));
            }
            None => AdminAccess::Off(
                "admin routes are not offered on an address that others reach without tokens: set server.admin_tokens, server.tls_certificate and \
                 server.tls_key, or server.admin = false to say that none are wanted",
            ),
        };
        Ok(Self { admin, callers, local })
    }

    fn admin(&self, headers: &HeaderMap) -> std::result::Result<Caller, Denial> {
        match &self.admin {
            AdminAccess::Off(why) => Err(Denial::new(403, "admin_off", why)),
            AdminAccess::Local if !from_a_page(headers) => Ok(Caller::operator("local")),
            AdminAccess::Local => Err(Denial::new(
                403,
                "forbidden",
                "without tokens, admin routes are for programs of this machine, not for pages in a browser: ask localhost or 127.0.0.1 by its name, or set server.admin_tokens",
            )),
            AdminAccess::Tokens(tokens) => match presented(headers) {
                None => Err(Denial::missing("server.admin_tokens")),
                Some(token) => match (tokens.holder(token), &self.callers) {
                    (Some(holder), _) => Ok(Caller::operator(&holder.name)),
                    (None, Some(callers)) if callers.holder(token).is_some() => Err(Denial::new(
                        403,
                        "forbidden",
                        "this token is for rankings and events; admin routes take those of server.admin_tokens",
                    )),
                    (None, _) => Err(Denial::unknown("server.admin_tokens")),
                },
            },
        }
    }

    fn caller(&self, headers: &HeaderMap) -> std::result::Result<Caller, Denial> {
        let token = presented(headers);
        let operator = match (&self.admin, token) {
            (AdminAccess::Tokens(tokens), Some(token)) => tokens.holder(token),
            _ => None,
        };
        let operator = operator.map(|holder| Caller::operator(&holder.name));
        let Some(callers) = &self.callers else {
            if of_another_site(headers) {
                return Err(Denial::new(
                    403,
                    "forbidden",
                    "without server.tokens, requests are for programs, not for pages of other sites",
                ));
            }
            // A proxy on this machine passes on what others send; it names their host.
            let may_replay = self.local && !from_a_page(headers);
            let anyone = Caller { name: "anyone".into(), may_replay };
            return Ok(operator.unwrap_or(anyone));
        };
        let Some(token) = token else {
            return Err(Denial::missing("server.tokens"));
        };
        let holder = callers.holder(token);
        let caller = holder
            .map(|holder| Caller { name: holder.name.clone(), may_replay: holder.may_replay });
        operator.or(caller).ok_or_else(|| Denial::unknown("server.tokens"))
    }
}

impl Caller {
    /// Someone with all rights.
    fn operator(name: &str) -> Caller {
        Caller { name: name.into(), may_replay: true }
    }
}

/// Whether a browser sent the request for a page that another host served.
fn of_another_site(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let own = text(header::HOST).unwrap_or_default();
    headers.contains_key(header::ORIGIN)
        && text(header::ORIGIN).and_then(|origin| origin.split_once("://")).map(|(_, host)| host)
            != Some(own)
}

/// Whether only this machine reaches the address.
fn is_local(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Why a request is refused.
#[derive(Debug)]
struct Denial {
    status: u16,
    code: &'static str,
    cause: &'static str,
    message: String,
}

impl Denial {
    fn new(status: u16, code: &'static str, message: &str) -> Self {
        Self { status, code, cause: code, message: message.into() }
    }

    fn missing(key: &str) -> Self {
        let message = format!(
            "this route needs a token: send `Authorization: Bearer TOKEN` with a token from the file of {key}"
        );
        Self { cause: "missing", ..Self::new(401, "unauthorised", &message) }
    }

    fn unknown(key: &str) -> Self {
        let message = format!(
            "this token is unknown: use one from the file of {key}; after a change of the file, reload (SIGHUP)"
        );
        Self { cause: "unknown", ..Self::new(401, "unauthorised", &message) }
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let given = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = given.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Whether a browser sent the request for a page, or used a host name that is not this machine's
/// (DNS rebinding).
fn from_a_page(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_matches(['[', ']']);
    let own = name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    headers.contains_key(header::ORIGIN) || !own
}

#[cfg(test)]
mod tests {
    use hypercast_config::DaemonTier;

    use super::*;
    use crate::http::{
        reload::{Origin, ReloadedModels, Reloader, Settings},
        tokens::tests::written,
    };

    const OPS: &str = "0123456789abcdef0123456789abcdef";
    const CALLER: &str = "fedcba9876543210fedcba9876543210";
    const OTHER: &str = "00112233445566778899aabbccddeeff";

    fn headers(of: &[(header::HeaderName, &str)]) -> HeaderMap {
        of.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    fn bearer(token: &str) -> HeaderMap {
        headers(&[(header::AUTHORIZATION, &format!("Bearer {token}"))])
    }

    fn refused(server: &ServerSettings, address: &str) -> String {
        AccessRules::read(server, address.parse().unwrap())
            .err()
            .expect("it is refused")
            .to_string()
    }

    #[test]
    fn admin_routes_are_offered_where_they_are_protected() {
        let dir = tempfile::tempdir().unwrap();
        let with_tokens = ServerSettings {
            admin_tokens: written(dir.path(), "admin", &format!("ops {OPS}\n")),
            ..ServerSettings::default()
        };
        let read = |server: &ServerSettings, address: &str| {
            AccessRules::read(server, address.parse().unwrap()).unwrap().admin
        };
        assert!(matches!(read(&ServerSettings::default(), "127.0.0.1"), AdminAccess::Local));
        assert!(matches!(read(&ServerSettings::default(), "::ffff:127.0.0.1"), AdminAccess::Local));
        assert!(matches!(read(&ServerSettings::default(), "0.0.0.0"), AdminAccess::Off(_)));
        assert!(matches!(read(&with_tokens, "::1"), AdminAccess::Tokens(_)));
        let error = refused(&with_tokens, "192.0.2.1");
        assert!(error.contains("server.tls_certificate") && error.contains("192.0.2.1"), "{error}");
        let with_tls = ServerSettings {
            tls_certificate: "c".into(),
            tls_key: "k".into(),
            ..with_tokens.clone()
        };
        assert!(matches!(read(&with_tls, "0.0.0.0"), AdminAccess::Tokens(_)));
        let behind_a_proxy = ServerSettings { insecure_admin: true, ..with_tokens.clone() };
        assert!(matches!(read(&behind_a_proxy, "0.0.0.0"), AdminAccess::Tokens(_)));
        let error = refused(
            &ServerSettings { insecure_admin: true, ..ServerSettings::default() },
            "0.0.0.0",
        );
        assert!(error.contains("server.admin_tokens"), "{error}");
        assert!(matches!(
            read(&ServerSettings { admin: false, ..with_tokens }, "::"),
            AdminAccess::Off(_)
        ));
    }

    /// Nothing listens: only the address counts.
    #[test]
    fn a_reload_waives_tls_for_admin_tokens_and_takes_that_back() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path(), "admin", &format!("ops {OPS}\n"));
        let path = dir.path().join("hypercast.toml");
        let write = |keys: &str| std::fs::write(&path, format!("[server]\n{keys}")).unwrap();
        write("");
        let (listen, probe_listen, tier) = (None, None, DaemonTier::All);
        let origin = Origin { path: path.clone(), listen, probe_listen, tier };
        let (config, metrics) = (origin.read().unwrap(), Metrics::default());
        let address = SocketAddr::from(([192, 0, 2, 1], 8570));
        let access = AccessControl::new(&config.server, &[address], &metrics).unwrap();
        let settings = Arc::new(Settings::new(config));
        let reloader = Reloader::new(origin, settings, access.clone(), None, &metrics);
        let reload = || reloader.reload(|_| Ok(ReloadedModels { experts: false, schema: false }));
        let admin = || access.rules.now().admin(&bearer(OPS)).map_err(|denial| denial.code);
        assert_eq!(admin(), Err("admin_off"));
        write("admin_tokens = 'admin'\n");
        let why = reload().unwrap_err().to_string();
        assert!(why.contains("server.insecure_admin"), "{why}");
        assert_eq!(admin(), Err("admin_off"));
        write("admin_tokens = 'admin'\ninsecure_admin = true\n");
        assert_eq!(reload().unwrap().changed, ["server.admin_tokens", "server.insecure_admin"]);
        assert_eq!(admin(), Ok(Caller::operator("ops")));
        write("");
        reload().unwrap();
        assert_eq!(admin(), Err("admin_off"));
    }

    #[test]
    fn each_kind_of_route_takes_its_own_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let server = ServerSettings {
            admin_tokens: written(dir.path(), "admin", &format!("ops {OPS}\n")),
            tokens: written(dir.path(), "callers", &format!("feed {CALLER}\n")),
            ..ServerSettings::default()
        };
        let rules = AccessRules::read(&server, "127.0.0.1".parse().unwrap()).unwrap();
        assert_eq!(rules.admin(&bearer(OPS)).unwrap(), Caller::operator("ops"));
        let feed = Caller { name: "feed".into(), may_replay: false };
        assert_eq!(rules.caller(&bearer(CALLER)).unwrap(), feed);
        assert_eq!(rules.caller(&bearer(OPS)).unwrap(), Caller::operator("ops"));
        assert_eq!(rules.admin(&bearer(CALLER)).unwrap_err().status, 403);
        assert_eq!(rules.admin(&bearer("0")).unwrap_err().cause, "unknown");
        assert_eq!(rules.admin(&HeaderMap::new()).unwrap_err().cause, "missing");
        assert_eq!(rules.caller(&HeaderMap::new()).unwrap_err().status, 401);
        let basic = headers(&[(header::AUTHORIZATION, "Basic b3BzOm9wcw==")]);
        assert_eq!(rules.admin(&basic).unwrap_err().cause, "missing");
    }

    #[test]
    fn the_right_to_set_the_time_is_a_tokens_own_or_this_machines() {
        let dir = tempfile::tempdir().unwrap();
        let open = ServerSettings {
            tls_certificate: "c".into(),
            tls_key: "k".into(),
            admin_tokens: written(dir.path(), "admin", &format!("ops {OPS}\n")),
            ..ServerSettings::default()
        };
        let lines = format!("feed {OTHER}\nbackfill {CALLER} replay\n");
        let closed =
            ServerSettings { tokens: written(dir.path(), "callers", &lines), ..open.clone() };
        let may = |server: &ServerSettings, address: &str, headers: &HeaderMap| {
            let rules = AccessRules::read(server, address.parse().unwrap()).unwrap();
            rules.caller(headers).unwrap().may_replay
        };
        for address in ["127.0.0.1", "0.0.0.0"] {
            assert!(!may(&closed, address, &bearer(OTHER)), "{address}");
            assert!(may(&closed, address, &bearer(CALLER)), "{address}");
            assert!(may(&closed, address, &bearer(OPS)), "{address}");
            assert!(may(&open, address, &bearer(OPS)), "{address}");
        }
        let own = headers(&[(header::HOST, "127.0.0.1:8570")]);
        assert!(may(&open, "127.0.0.1", &own), "programs of this machine");
        assert!(!may(&open, "0.0.0.0", &own), "anyone else");
        let passed_on = headers(&[(header::HOST, "shop.example")]);
        assert!(!may(&open, "127.0.0.1", &passed_on), "whoever a proxy on this machine lets in");
    }

    #[test]
    fn without_tokens_a_page_in_a_browser_may_not_administer() {
        let rules =
            AccessRules::read(&ServerSettings::default(), "127.0.0.1".parse().unwrap()).unwrap();
        for host in ["127.0.0.1:8570", "localhost:8570", "[::1]:8570", "LOCALHOST"] {
            assert!(rules.admin(&headers(&[(header::HOST, host)])).is_ok(), "{host}");
        }
        for host in ["rebound.example:8570", "", "127.0.0.1.example"] {
            let denial = rules.admin(&headers(&[(header::HOST, host)])).unwrap_err();
            assert_eq!(denial.status, 403, "{host}");
        }
        let page = [(header::HOST, "localhost:8570"), (header::ORIGIN, "http://page.example")];
        assert_eq!(rules.admin(&headers(&page)).unwrap_err().status, 403);
        assert_eq!(rules.caller(&headers(&page)).unwrap_err().status, 403, "of another site");
        let own = [(header::HOST, "localhost:8570"), (header::ORIGIN, "http://localhost:8570")];
        assert!(rules.caller(&headers(&own)).is_ok(), "its own page");
        assert!(rules.caller(&headers(&own[..1])).is_ok(), "other routes are open to programs");
    }
}

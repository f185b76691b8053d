//! Accepts connections: plain HTTP, or TLS if the configuration names a certificate.
//!
//! The number of connections is bounded; further ones wait in the system's queue, except that those
//! of a peer that has its share already are closed ([`super::peers`]). The handshake, the headers
//! of every request and the reading of an answer each have a time limit, so that a client that
//! sends or reads nothing does not occupy a connection for longer. [`super::drain_body`] reads the
//! rest of bodies, [`super::tls`] encrypts, and [`super::auth`] decides who may do what.
//!
//! Probes can have a listener of their own, so that they are answered while requests take all
//! connections of the other one.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use axum::{Router, middleware::map_request};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use hypercast_config::ServerSettings;
use hypercast_core::{
    logging::RepeatedFailures,
    supervised_thread::{OnPanic, PanicWatch},
};
use prometheus::{IntCounter, IntGauge};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::JoinHandle,
};
use tokio_io_timeout::TimeoutStream;

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::{
        drain_body,
        peers::{PeerLimit, PeerPlace},
        tls::Tls,
    },
    metrics::Metrics,
};

/// Pause after a failed accept, which mostly means that the process is out of file descriptors.
const REST: Duration = Duration::from_millis(500);

/// Time limit for a client to read more of an answer.
const UNREAD: Duration = Duration::from_secs(20);

/// How long a stopping server waits for its last answers. The systemd units allow 60 s for all that
/// must be saved.
const LAST_ANSWERS: Duration = Duration::from_secs(30);

/// The size of a connection's read buffer, and so the most that a request's headers may have. With
/// what TLS and the request's task need, a connection stays under 128 KiB.
const READ_BUFFER_BYTES: usize = 32 << 10;

/// The most connections of probes.
const PROBE_CONNECTIONS: usize = 64;

/// Time for a probe to send its headers, and to stay idle between two requests.
const PROBE_HEADERS: Duration = Duration::from_secs(10);

/// The listeners of a process.
pub(crate) struct Listeners {
    /// For requests; it answers probes, too.
    pub(crate) requests: BoundListener,
    /// For probes alone.
    pub(crate) probes: Option<BoundListener>,
}

impl Listeners {
    /// Binds one of the addresses from [`resolve`], and the one for probes if there is one.
    ///
    /// # Errors
    /// As [`BoundListener::new`].
    pub(crate) async fn new(
        server: &ServerSettings,
        addresses: &[SocketAddr],
        metrics: &Metrics,
    ) -> Result<Self> {
        let counts = ConnectionCounts {
            open: metrics
                .gauge("hypercast_connections", "Open connections; at most server.max_connections"),
            refused: metrics
                .counter(
                    "hypercast_connections_refused_total",
                    "Connections that were closed at once, because their peer had server.max_connections_per_peer open",
                    &[],
                )
                .with_label_values::<&str>(&[]),
        };
        let probes = BoundListener::probes(server, counts.refused.clone(), metrics).await?;
        let requests = BoundListener::new(server, addresses, counts, metrics).await?;
        Ok(Self { requests, probes })
    }
}

/// Answers probes until it is stopped or dropped; nothing if they have no listener.
pub(crate) struct ProbeServer(Option<(oneshot::Sender<()>, JoinHandle<()>)>);

impl ProbeServer {
    /// Starts the task that answers.
    pub(crate) fn start(probes: Option<BoundListener>, router: Router) -> Self {
        Self(probes.map(|probes| {
            tracing::info!("probes on {}", probes.url());
            let (stop, stopped) = oneshot::channel();
            let task = tokio::spawn(async move {
                let _watched = PanicWatch::new("probes", OnPanic::EndProcess);
                probes.serve(router, async { drop(stopped.await) }).await;
            });
            (stop, task)
        }))
    }

    /// Finishes what was asked and gives up the router, with all state that it holds.
    pub(crate) async fn stop(self) {
        if let Some((stop, task)) = self.0 {
            drop(stop);
            // A panic ends the process.
            let _ = task.await;
        }
    }
}

/// A bound address, with TLS or without.
pub(crate) struct BoundListener {
    listener: TcpListener,
    /// The address in use.
    address: SocketAddr,
    /// The TLS settings of new connections; none for plain HTTP.
    pub(crate) tls: Option<Arc<Tls>>,
    places: Arc<Semaphore>,
    peers: Arc<PeerLimit>,
    header_timeout: Duration,
    unread: Duration,
    counts: ConnectionCounts,
    failures: RepeatedFailures,
}

/// How many connections there are, and were refused.
#[derive(Clone)]
struct ConnectionCounts {
    open: IntGauge,
    refused: IntCounter,
}

impl BoundListener {
    /// Binds one of the addresses from [`resolve`].
    ///
    /// # Errors
    /// No address can be bound; TLS files are missing or do not fit each other.
    async fn new(
        server: &ServerSettings,
        addresses: &[SocketAddr],
        counts: ConnectionCounts,
        metrics: &Metrics,
    ) -> Result<Self> {
        let tls = server.has_tls().then(|| Tls::new(server, metrics)).transpose()?;
        let cannot = |error: io::Error| cannot_listen(LISTEN, &server.listen, &error);
        let listener = TcpListener::bind(addresses).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        Ok(Self {
            listener,
            address,
            tls: tls.map(Arc::new),
            places: Arc::new(Semaphore::new(server.max_connections)),
            peers: PeerLimit::new(server.connections_per_peer()),
            unread: UNREAD,
            header_timeout: Duration::from_millis(server.header_timeout_ms),
            counts,
            failures: RepeatedFailures::default(),
        })
    }

    /// Binds `server.probe_listen`, if it is set. Probes speak plain HTTP and need no token.
    async fn probes(
        server: &ServerSettings,
        refused: IntCounter,
        metrics: &Metrics,
    ) -> Result<Option<Self>> {
        let address = server.probe_listen.as_str();
        if address.is_empty() {
            return Ok(None);
        }
        let cannot = |error: io::Error| cannot_listen("server.probe_listen", address, &error);
        let listener = TcpListener::bind(address).await.map_err(cannot)?;
        let help = "Open connections of server.probe_listen; at most 64";
        let open = metrics.gauge("hypercast_probe_connections", help);
        Ok(Some(Self {
            address: listener.local_addr().map_err(cannot)?,
            listener,
            tls: None,
            places: Arc::new(Semaphore::new(PROBE_CONNECTIONS)),
            peers: PeerLimit::new(PROBE_CONNECTIONS),
            unread: UNREAD,
            header_timeout: PROBE_HEADERS,
            counts: ConnectionCounts { open, refused },
            failures: RepeatedFailures::default(),
        }))
    }

    /// Its URL: `http://ADDRESS` or `https://ADDRESS`.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Answers requests until `stop` resolves, then finishes what was accepted.
    pub(crate) async fn serve(mut self, router: Router, stop: impl Future<Output = ()> + Send) {
        let router = router.layer(map_request(drain_body::read_on));
        let ending = GracefulShutdown::new();
        let mut stop = pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                accepted = self.accept() => accepted,
            };
            let Some((stream, open)) = accepted else { continue };
            let tls = self.tls.clone();
            let talk = Connection {
                router: router.clone(),
                header_timeout: self.header_timeout,
                unread: self.unread,
                ending: ending.watcher(),
            };
            tokio::spawn(async move {
                let _open = open;
                let Some(tls) = tls else { return talk.over(stream).await };
                if let Some(stream) = tls.handshake(stream).await {
                    talk.over(stream).await;
                }
            });
        }
        // The system refuses new connections from here on instead of queueing them.
        drop(self.listener);
        if tokio::time::timeout(LAST_ANSWERS, ending.shutdown()).await.is_err() {
            tracing::warn!(
                "some clients did not read their last answers in time; their connections are closed"
            );
        }
    }

    /// The next connection, once there is a free slot for it; none if accepting fails or its peer
    /// has too many.
    async fn accept(&mut self) -> Option<(TcpStream, ConnectionSlot)> {
        let place = self.places.clone().acquire_owned().await.ok()?;
        match self.listener.accept().await {
            Ok((stream, from)) => {
                let slot = self.slot(from.ip(), place)?;
                // Answers are written whole, so waiting for more bytes would only delay them.
                let _ = stream.set_nodelay(true);
                Some((stream, slot))
            }
            Err(error) => {
                if self.failures.is_news(&error) {
                    tracing::warn!(%error, "a connection cannot be accepted; trying again");
                }
                tokio::time::sleep(REST).await;
                None
            }
        }
    }

    /// The slot of a connection; none if its peer has too many.
    fn slot(&self, peer: IpAddr, place: OwnedSemaphorePermit) -> Option<ConnectionSlot> {
        let Some(own) = self.peers.enter(peer) else {
            self.counts.refused.inc();
            tracing::debug!(%peer, "a connection is refused; its peer has server.max_connections_per_peer open");
            return None;
        };
        self.counts.open.inc();
        Some(ConnectionSlot { connections: self.counts.open.clone(), _place: place, _own: own })
    }
}

/// The key of the address for requests.
const LISTEN: &str = "server.listen";

/// Resolves `server.listen`, without opening anything.
///
/// # Errors
/// The text is not an address with a port, or the name is unknown.
pub(crate) async fn resolve(server: &ServerSettings) -> Result<Vec<SocketAddr>> {
    let found = tokio::net::lookup_host(&server.listen).await;
    let cannot = |error: io::Error| cannot_listen(LISTEN, &server.listen, &error);
    let addresses: Vec<_> = found.map_err(cannot)?.collect();
    if addresses.is_empty() {
        let why = format!("{:?} (server.listen) is not an address", server.listen);
        return Err(Error::invalid(why));
    }
    Ok(addresses)
}

fn cannot_listen(key: &str, address: &str, error: &io::Error) -> Error {
    Error::invalid(format!("cannot listen on {address:?} ({key}): {error}"))
}

/// Serves the requests of one connection.
struct Connection {
    router: Router,
    header_timeout: Duration,
    unread: Duration,
    ending: Watcher,
}

impl Connection {
    async fn over(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        // Without it, a client that never reads would keep its slot for ever.
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.unread));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_timeout)
            .max_buf_size(READ_BUFFER_BYTES)
            .serve_connection(
                TokioIo::new(Box::pin(stream)),
                TowerToHyperService::new(self.router),
            );
        if let Err(error) = self.ending.watch(connection).await {
            tracing::debug!(%error, "a connection ended before its last answer");
        }
    }
}

/// One of the bounded number of connections, and of those of its peer, counted while it is open.
struct ConnectionSlot {
    connections: IntGauge,
    _place: OwnedSemaphorePermit,
    _own: PeerPlace,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use axum::{
        body::Body,
        http::StatusCode,
        routing::{get, post},
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n";

    async fn started(
        server: ServerSettings,
    ) -> (SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let server = ServerSettings { listen: "127.0.0.1:0".into(), ..server };
        let addresses = resolve(&server).await.unwrap();
        let listeners = Listeners::new(&server, &addresses, &Metrics::default()).await.unwrap();
        let mut bound = listeners.requests;
        bound.unread = Duration::from_millis(300);
        let address = bound.address;
        let (stop, stopped) = oneshot::channel();
        let router = Router::new()
            .route("/", get(|| async { "here" }))
            .route("/little", post(little))
            .route("/much", get(|| async { "x".repeat(32 << 20) }));
        let serving = tokio::spawn(async move {
            bound.serve(router, async { drop(stopped.await) }).await;
        });
        (address, stop, serving)
    }

    #[tokio::test]
    async fn a_refusal_reaches_who_is_still_sending() {
        let (address, _stop, _serving) = started(ServerSettings::default()).await;
        // Far more than the system keeps for a connection, to a route that reads nothing.
        let body = vec![b'x'; 32 << 20];
        for path in ["/", "/nowhere"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // The second time shows that the connection is still good.
            for size in [body.len(), 0] {
                let head =
                    format!("POST {path} HTTP/1.1\r\nhost: here\r\ncontent-length: {size}\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                stream.write_all(&body[..size]).await.unwrap();
                let mut answer = vec![0; 4096];
                let read = stream.read(&mut answer).await.unwrap();
                let answer = String::from_utf8_lossy(&answer[..read]);
                assert!(answer.starts_with("HTTP/1.1 40"), "{answer}");
            }
        }
    }

    #[tokio::test]
    async fn probes_are_answered_until_they_are_stopped_and_keep_nothing_then() {
        let server =
            ServerSettings { probe_listen: "127.0.0.1:0".into(), ..ServerSettings::default() };
        let metrics = Metrics::default();
        let refused = IntCounter::new("refused", "refused").unwrap();
        let probes = BoundListener::probes(&server, refused, &metrics).await.unwrap().unwrap();
        let address = probes.address;
        let state = Arc::new(());
        let held = state.clone();
        let router = Router::new().route("/", get(move || async move { drop(held.clone()) }));
        let probes = ProbeServer::start(Some(probes), router);
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(REQUEST).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        assert!(Arc::strong_count(&state) > 1);
        // The connection is open and idle.
        tokio::time::timeout(Duration::from_secs(20), probes.stop()).await.unwrap();
        assert_eq!(Arc::strong_count(&state), 1);
        assert!(TcpStream::connect(address).await.is_err());
    }

    /// Reads only the beginning of a body.
    async fn little(body: Body) -> StatusCode {
        match axum::body::to_bytes(body, 10).await {
            Ok(_) => StatusCode::OK,
            Err(_) => StatusCode::BAD_REQUEST,
        }
    }

    #[tokio::test]
    async fn a_refusal_reaches_who_was_asked_for_the_body() {
        let (address, _stop, _serving) = started(ServerSettings::default()).await;
        let body = vec![b'x'; 32 << 20];
        let mut stream = TcpStream::connect(address).await.unwrap();
        let size = body.len();
        let head = format!(
            "POST /little HTTP/1.1\r\nhost: here\r\nexpect: 100-continue\r\ncontent-length: {size}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        for (sent, said) in [(0, "HTTP/1.1 100"), (size, "HTTP/1.1 400")] {
            stream.write_all(&body[..sent]).await.unwrap();
            let mut answer = vec![0; 4096];
            let read = stream.read(&mut answer).await.unwrap();
            let answer = String::from_utf8_lossy(&answer[..read]);
            assert!(answer.starts_with(said), "{answer}");
        }
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(REQUEST).await.unwrap();
        let mut answer = vec![0; 4096];
        let size = stream.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..size]).into_owned()
    }

    #[tokio::test]
    async fn who_says_nothing_gives_the_place_back() {
        let server = ServerSettings {
            max_connections: 1,
            header_timeout_ms: 300,
            ..ServerSettings::default()
        };
        let (address, _stop, _serving) = started(server).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET / HTTP/1.1\r\nhost: he").await.unwrap();
        let begun = Instant::now();
        // Accepted by the system; answered once the one place is free.
        let mut next = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut next).await.ends_with("here"));
        assert!(begun.elapsed() >= Duration::from_millis(250), "it has waited for the place");
        let mut rest = Vec::new();
        let _ = silent.read_to_end(&mut rest).await;
        assert!(!String::from_utf8_lossy(&rest).contains("here"));
        // One that rests between requests goes likewise.
        let mut rest = Vec::new();
        next.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
    }

    #[tokio::test]
    async fn one_peer_cannot_take_all_connections() {
        let server = ServerSettings { max_connections: 8, ..ServerSettings::default() };
        assert_eq!(server.connections_per_peer(), 2);
        let (address, _stop, _serving) = started(server).await;
        let mut own = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            assert!(ask(&mut stream).await.ends_with("here"));
            own.push(stream);
        }
        let mut third = TcpStream::connect(address).await.unwrap();
        let mut rest = Vec::new();
        let _ = third.read_to_end(&mut rest).await;
        assert!(rest.is_empty(), "the third is closed without an answer");
        // Another machine is answered: on loopback, another address.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut other = socket.connect(address).await.unwrap();
        assert!(ask(&mut other).await.ends_with("here"));
        drop(own);
        let again = async {
            loop {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let _ = stream.write_all(REQUEST).await;
                let mut answer = [0; 12];
                if stream.read_exact(&mut answer).await.is_ok() {
                    return answer;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let again = tokio::time::timeout(Duration::from_secs(30), again).await;
        assert_eq!(&again.expect("its places are free again"), b"HTTP/1.1 200");
    }

    #[tokio::test]
    async fn probes_are_answered_while_requests_take_all_connections() {
        let server = ServerSettings {
            listen: "127.0.0.1:0".into(),
            probe_listen: "127.0.0.1:0".into(),
            max_connections: 1,
            ..ServerSettings::default()
        };
        let addresses = resolve(&server).await.unwrap();
        let listeners = Listeners::new(&server, &addresses, &Metrics::default()).await.unwrap();
        let Listeners { requests, probes } = listeners;
        let probes = probes.unwrap();
        let (busy, quick) = (requests.address, probes.address);
        let router = Router::new().route("/", get(|| async { "here" }));
        let _probes = ProbeServer::start(Some(probes), router.clone());
        tokio::spawn(requests.serve(router, std::future::pending()));
        let mut all = TcpStream::connect(busy).await.unwrap();
        assert!(ask(&mut all).await.ends_with("here"));
        let mut waits = TcpStream::connect(busy).await.unwrap();
        let asked = tokio::time::timeout(Duration::from_millis(300), ask(&mut waits)).await;
        assert!(asked.is_err(), "the only connection is taken");
        let mut probe = TcpStream::connect(quick).await.unwrap();
        assert!(ask(&mut probe).await.ends_with("here"));
    }

    #[tokio::test]
    async fn who_reads_nothing_gives_the_place_back() {
        let server = ServerSettings { max_connections: 1, ..ServerSettings::default() };
        let (address, _stop, _serving) = started(server).await;
        let mut deaf = TcpStream::connect(address).await.unwrap();
        deaf.write_all(b"GET /much HTTP/1.1\r\nhost: here\r\n\r\n").await.unwrap();
        let mut next = TcpStream::connect(address).await.unwrap();
        let asked = tokio::time::timeout(Duration::from_secs(30), ask(&mut next)).await;
        assert!(asked.expect("the place is free").ends_with("here"));
    }

    #[tokio::test]
    async fn an_end_closes_connections_that_rest_and_refuses_new_ones() {
        let (address, stop, serving) = started(ServerSettings::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut stream).await.ends_with("here"));
        assert!(ask(&mut stream).await.ends_with("here"), "a connection is kept");
        stop.send(()).unwrap();
        serving.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }
}

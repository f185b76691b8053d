//! NATS servers of tests: each is a process that ends with the test.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use hypercast_config::{EngineKind, EngineSettings};
use hypercast_core::prerequisite::skip;

use super::suite;

/// Whether `nats-server` can be started; if not, says that the test is skipped.
pub(super) fn is_installed() -> bool {
    let found = Command::new("nats-server").arg("--version").output().is_ok();
    if !found {
        skip("NATS", "nats-server is not in PATH: apt-get install nats-server");
    }
    found
}

/// A port on which nothing listens. It is below those that the system gives to clients, one of
/// which could take it before the server listens.
pub(super) fn free_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id().wrapping_mul(61).wrapping_add(TAKEN.fetch_add(1, Relaxed));
        let port = 10_000 + (number % 20_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A server with JetStream, whose store is in its folder.
pub(super) struct NatsServer {
    pub(super) dir: PathBuf,
    pub(super) port: u16,
    /// Where it says how it is.
    monitor: u16,
    process: Option<Child>,
}

impl NatsServer {
    /// Starts a server with further lines of configuration.
    pub(super) fn start(dir: &Path, more: &str) -> NatsServer {
        fs::create_dir_all(dir).unwrap();
        let server = NatsServer {
            dir: dir.to_path_buf(),
            port: free_port(),
            monitor: free_port(),
            process: None,
        };
        let NatsServer { port, monitor, .. } = server;
        let store = server.store();
        let text = format!(
            "listen: 127.0.0.1:{port}\nhttp: 127.0.0.1:{monitor}\n\
             jetstream {{ store_dir: {store:?}, max_file_store: 1GB }}\n{more}"
        );
        fs::write(dir.join("server.conf"), text).unwrap();
        let mut server = server;
        server.begin();
        server
    }

    pub(super) fn begin(&mut self) {
        assert!(self.process.is_none());
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let process = Command::new("nats-server")
            .arg("-c")
            .arg(self.dir.join("server.conf"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.process = Some(process.unwrap());
    }

    pub(super) fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    pub(super) fn restart(&mut self) {
        self.kill();
        self.begin();
    }

    /// Sends a signal: STOP cuts the server off from all others, CONT brings it back.
    pub(super) fn signal(&self, name: &str) {
        let id = self.process.as_ref().unwrap().id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap();
        assert!(sent.success());
    }

    pub(super) fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Waits until the server and its part of every stream are up to date.
    pub(super) fn wait_until_healthy(&self) {
        let start = Instant::now();
        let mut last = String::new();
        while start.elapsed() < Duration::from_secs(120) {
            last = self.health().unwrap_or_else(|error| error.to_string());
            if last.contains("\"ok\"") {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n");
        panic!("the server at port {} is not healthy: {last}\n{end}", self.port);
    }

    fn health(&self) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.monitor))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Settings for a client of it.
    pub(super) fn settings(&self) -> EngineSettings {
        EngineSettings {
            kind: EngineKind::Nats,
            nats_url: format!("nats://127.0.0.1:{}", self.port).into(),
            nats_prefix: "test".into(),
            remembered_ids: suite::REMEMBERED,
            ..EngineSettings::default()
        }
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let killed = process.kill().and_then(|()| process.wait());
            assert!(killed.is_ok() || thread::panicking());
        }
    }
}

/// Writes a file that only its owner can read; returns its path.
pub(super) fn write_secret(path: PathBuf, text: &str) -> PathBuf {
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// A certificate of this machine that is its own authority, in files.
pub(super) struct TestCertificate {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

impl TestCertificate {
    pub(super) fn make(dir: &Path) -> TestCertificate {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let certificate = dir.join("server.crt");
        fs::write(&certificate, made.cert.pem()).unwrap();
        let key = write_secret(dir.join("server.key"), &made.signing_key.serialize_pem());
        TestCertificate { certificate, key }
    }

    /// The lines of a server's configuration that use it.
    pub(super) fn lines(&self) -> String {
        let TestCertificate { certificate, key } = self;
        format!("cert_file: {certificate:?}, key_file: {key:?}, ca_file: {certificate:?}")
    }
}

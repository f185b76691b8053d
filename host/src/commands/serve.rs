//! `hypercast serve`: the daemon.

use std::path::PathBuf;

use tokio::signal::unix::{SignalKind, signal};

use hypercast_config::DaemonTier;
use hypercast_serve::{http, reload::Origin};

/// Serve rankings over HTTP
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// Address and port instead of `server.listen`
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Address and port for probes instead of `server.probe_listen`; "" for none
    #[arg(long, value_name = "ADDRESS")]
    pub probe_listen: Option<String>,
    /// The tier that this process runs
    #[arg(long, value_enum, default_value_t)]
    pub tier: DaemonTier,
}

/// Serves until SIGTERM or SIGINT, and reads its configuration again on SIGHUP. When it is ready it
/// prints `listening on http://ADDRESS`, or `https://` where it has a certificate.
pub fn run(args: Args) -> anyhow::Result<()> {
    hypercast_fm::threads::start_shared_pool()?;
    let Args { config: path, listen, probe_listen, tier } = args;
    let origin = Origin { path, listen, probe_listen, tier };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping: finishing accepted requests");
        };
        let ready = |url: &str| println!("listening on {url}");
        http::serve(origin, stop, ready).await?;
        Ok(())
    })
}

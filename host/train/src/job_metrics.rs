//! What a job without an HTTP server of its own counts: the trainers and the logging tier.
//! Prometheus' text, at `/metrics` of an address that the operator gives, if any; `/readyz` there
//! says whether more records are set aside than now and then.
//!
//! The daemon has metrics of its own (`serve::metrics`). Nothing is sent anywhere.

use std::{net::SocketAddr, sync::Arc, thread::JoinHandle};

use axum::{Router, http::StatusCode, routing::get};
use hypercast_config::OnGap;
use hypercast_core::supervised_thread::{self, OnPanic};
use hypercast_stream::dead_letters::SetAsideRate;
use hypercast_stream::streams::{GapHandling, Topic};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder, core::Collector,
};
use tokio::sync::oneshot;

use crate::error::{CommonErrors as _, Error, Result};

/// The metrics of a job.
#[derive(Debug)]
pub struct JobMetrics {
    registry: Registry,
    /// The records that it sets aside.
    pub set_aside: Arc<SetAsideRate>,
    set_aside_total: IntCounter,
    sets_aside_many: Gauge,
}

impl Default for JobMetrics {
    fn default() -> Self {
        let registry = Registry::new();
        Self {
            set_aside: Arc::default(),
            set_aside_total: counter(
                &registry,
                "hypercast_examples_set_aside_total",
                "Records that could not be used, or whose learning would harm the model: they were \
                 set aside; `hypercast dead-letters list` says which and why",
            ),
            sets_aside_many: gauge(
                &registry,
                "hypercast_sets_aside_many",
                "1 while more than a few records a minute are set aside; `/readyz` says so, too",
            ),
            registry,
        }
    }
}

impl JobMetrics {
    /// A histogram of seconds, from a millisecond to nine hours, doubling.
    ///
    /// # Panics
    /// As all of these: if the name is taken or not valid.
    pub fn seconds(&self, name: &str, help: &str) -> Histogram {
        let buckets = prometheus::exponential_buckets(1e-3, 2.0, 26).expect("a valid range");
        let options = HistogramOpts::new(name, help).buckets(buckets);
        register(&self.registry, Histogram::with_opts(options).expect("a valid name"))
    }

    /// A counter that starts at 0.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        counter(&self.registry, name, help)
    }

    /// What is done about missing records of the streams that the job follows: they are counted
    /// here.
    pub fn gaps(&self, policy: OnGap) -> GapHandling {
        let options = Opts::new(
            "hypercast_stream_gaps_total",
            "Times that records of a stream were missing: deleted before they were read, or the stream was cut or made anew",
        );
        let gaps = IntCounterVec::new(options, &["stream"]).expect("a valid name");
        let gaps = register(&self.registry, gaps);
        let count = Arc::new(move |topic: &Topic| {
            gaps.with_label_values(&[topic.name()]).inc();
        });
        GapHandling { policy, count }
    }

    /// A value that goes up and down.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        gauge(&self.registry, name, help)
    }

    /// Gauges with the given label names.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        let gauges = GaugeVec::new(Opts::new(name, help), labels);
        register(&self.registry, gauges.expect("a valid name"))
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> String {
        let new = self.set_aside.total().saturating_sub(self.set_aside_total.get());
        self.set_aside_total.inc_by(new);
        self.sets_aside_many.set(f64::from(u8::from(self.set_aside.warning().is_some())));
        let text = TextEncoder::new().encode_to_string(&self.registry.gather());
        text.unwrap_or_else(|error| format!("# metrics could not be written: {error}\n"))
    }

    /// Answers `GET /metrics` and `GET /readyz` at `address`.
    ///
    /// # Errors
    /// An address that cannot be had.
    pub fn serve(self: &Arc<Self>, address: SocketAddr) -> Result<MetricsServer> {
        let (metrics, set_aside) = (self.clone(), self.set_aside.clone());
        serve(address, move || metrics.render(), move || set_aside.warning())
    }
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help).expect("a valid name"))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Gauge {
    register(registry, Gauge::new(name, help).expect("a valid name"))
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> C {
    registry.register(Box::new(metric.clone())).expect("registered once");
    metric
}

/// Answers about the metrics of a job on a thread of its own. Dropping it ends that, and frees the
/// address for the next run of the job.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    /// The address in use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        // If it panicked, the process has ended.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Answers `GET /metrics` at `address` with what `render` gives, and `GET /readyz` with 503 and
/// what `warning` says, if anything.
///
/// # Errors
/// An address that cannot be had.
pub fn serve(
    address: SocketAddr,
    render: impl Fn() -> String + Clone + Send + Sync + 'static,
    warning: impl Fn() -> Option<String> + Clone + Send + Sync + 'static,
) -> Result<MetricsServer> {
    let cannot = |error: std::io::Error| Error::invalid(format!("metrics at {address}: {error}"));
    let listener = std::net::TcpListener::bind(address).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let bound = listener.local_addr().map_err(cannot)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let ready = move || async move {
        match warning() {
            Some(warning) => (StatusCode::SERVICE_UNAVAILABLE, format!("{warning}\n")),
            None => (StatusCode::OK, "ready\n".to_owned()),
        }
    };
    let app = Router::new()
        .route("/metrics", get(move || async move { render() }))
        .route("/readyz", get(ready));
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = move || {
        let served = runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tokio::select! {
                served = axum::serve(listener, app).into_future() => served,
                // Its sender says nothing and is dropped.
                _ = stopped => Ok(()),
            }
        });
        if let Err(error) = served {
            tracing::warn!(%error, "metrics are no longer answered");
        }
    };
    let thread = supervised_thread::spawn("metrics", OnPanic::EndProcess, serve)?;
    Ok(MetricsServer { address: bound, stop: Some(stop), thread: Some(thread) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_told_over_http() {
        let telemetry = Arc::new(JobMetrics::default());
        telemetry.counter("hypercast_test_total", "A test's").inc_by(3);
        telemetry.seconds("hypercast_test_seconds", "A test's").observe(0.5);
        let server = telemetry.serve(([127, 0, 0, 1], 0).into()).unwrap();
        let address = server.address();
        let mut answer = ureq::get(&format!("http://{address}/metrics")).call().unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert!(text.contains("hypercast_test_total 3"), "{text}");
        assert!(text.contains("hypercast_test_seconds_count 1"), "{text}");
        drop(server);
        let again = telemetry.serve(address).unwrap();
        assert_eq!(again.address(), address, "the address is free for the next run");
    }

    #[test]
    fn a_job_that_sets_many_records_aside_says_so_and_goes_on() {
        let telemetry = Arc::new(JobMetrics::default());
        let server = telemetry.serve(([127, 0, 0, 1], 0).into()).unwrap();
        let address = server.address();
        let get = |path: &str| {
            let agent = ureq::Agent::config_builder().http_status_as_error(false).build();
            let agent = ureq::Agent::new_with_config(agent);
            let mut answer = agent.get(format!("http://{address}{path}")).call().unwrap();
            (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
        };
        assert_eq!(get("/readyz"), (200, "ready\n".into()));
        assert!(get("/metrics").1.contains("hypercast_sets_aside_many 0"));
        telemetry.set_aside.add(9);
        let (status, text) = get("/readyz");
        assert!(status == 503 && text.contains("dead-letters list"), "{status} {text}");
        let (_, text) = get("/metrics");
        assert!(text.contains("hypercast_sets_aside_many 1"), "{text}");
        assert!(text.contains("hypercast_examples_set_aside_total 9"), "{text}");
    }
}

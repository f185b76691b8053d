//! What a job without an HTTP server of its own counts: the trainers and the logging tier.
//! Prometheus' text, at `/metrics` of an address that the operator gives, if any.
//!
//! The daemon has metrics of its own (`serve::metrics`). Nothing is sent anywhere.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, routing::get};
use hypercast_config::OnGap;
use hypercast_stream::streams::{GapHandling, Topic};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder, core::Collector,
};

use crate::error::{CommonErrors as _, Error, Result};

/// The metrics of a job.
#[derive(Debug, Default)]
pub struct JobMetrics {
    registry: Registry,
}

impl JobMetrics {
    /// A histogram of seconds, from a millisecond to nine hours, doubling.
    ///
    /// # Panics
    /// As all of these: if the name is taken or not valid.
    pub fn seconds(&self, name: &str, help: &str) -> Histogram {
        let buckets = prometheus::exponential_buckets(1e-3, 2.0, 26).expect("a valid range");
        let options = HistogramOpts::new(name, help).buckets(buckets);
        self.register(Histogram::with_opts(options).expect("a valid name"))
    }

    /// A counter that starts at 0.
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help).expect("a valid name"))
    }

    /// What is done about missing records of the streams that the job follows: they are counted
    /// here.
    pub fn gaps(&self, policy: OnGap) -> GapHandling {
        let options = Opts::new(
            "hypercast_stream_gaps_total",
            "Times that records of a stream were missing: deleted before they were read, or the stream was cut or made anew",
        );
        let gaps = IntCounterVec::new(options, &["stream"]).expect("a valid name");
        let gaps = self.register(gaps);
        let count = Arc::new(move |topic: &Topic| {
            gaps.with_label_values(&[topic.name()]).inc();
        });
        GapHandling { policy, count }
    }

    /// A value that goes up and down.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::new(name, help).expect("a valid name"))
    }

    /// Gauges with the given label names.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(Opts::new(name, help), labels).expect("a valid name"))
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: C) -> C {
        self.registry.register(Box::new(metric.clone())).expect("registered once");
        metric
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> String {
        let text = TextEncoder::new().encode_to_string(&self.registry.gather());
        text.unwrap_or_else(|error| format!("# metrics could not be written: {error}\n"))
    }

    /// Answers `GET /metrics` at `address`, on a thread that ends with the process; gives the
    /// address in use.
    ///
    /// # Errors
    /// An address that cannot be had.
    pub fn serve(self: &Arc<Self>, address: SocketAddr) -> Result<SocketAddr> {
        let own = self.clone();
        serve(address, move || own.render())
    }
}

/// Answers `GET /metrics` at `address` with what `render` gives, on a thread that ends with the
/// process; gives the address in use.
///
/// # Errors
/// An address that cannot be had.
pub fn serve(
    address: SocketAddr,
    render: impl Fn() -> String + Clone + Send + Sync + 'static,
) -> Result<SocketAddr> {
    let cannot = |error: std::io::Error| Error::invalid(format!("metrics at {address}: {error}"));
    let listener = std::net::TcpListener::bind(address).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let bound = listener.local_addr().map_err(cannot)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let app = Router::new().route("/metrics", get(move || async move { render() }));
    let serve = move || {
        let served = runtime.block_on(async {
            axum::serve(tokio::net::TcpListener::from_std(listener)?, app).await
        });
        if let Err(error) = served {
            tracing::warn!(%error, "metrics are no longer answered");
        }
    };
    std::thread::Builder::new().name("metrics".into()).spawn(serve).map_err(cannot)?;
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_told_over_http() {
        let telemetry = Arc::new(JobMetrics::default());
        telemetry.counter("hypercast_test_total", "A test's").inc_by(3);
        telemetry.seconds("hypercast_test_seconds", "A test's").observe(0.5);
        let address = telemetry.serve(([127, 0, 0, 1], 0).into()).unwrap();
        let mut answer = ureq::get(&format!("http://{address}/metrics")).call().unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        assert!(text.contains("hypercast_test_total 3"), "{text}");
        assert!(text.contains("hypercast_test_seconds_count 1"), "{text}");
    }
}

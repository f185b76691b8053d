//! How metrics are created: registered under their name, with help text and labels.

use prometheus::{
    CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    core::Collector,
};

/// Registers metrics. Their names are constants of this crate, so a name that is taken or not valid
/// is a bug and panics.
pub(super) struct MetricRegistrar<'a>(pub(super) &'a Registry);

impl MetricRegistrar<'_> {
    pub(super) fn add<M: Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let metric = metric.expect("the name is valid");
        self.0.register(Box::new(metric.clone())).expect("the name is free");
        metric
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn float_counters(&self, name: &str, help: &str, labels: &[&str]) -> CounterVec {
        self.add(CounterVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn float_gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &Buckets,
    ) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(buckets.bounds());
        self.add(HistogramVec::new(options, labels))
    }
}

/// Exponential buckets of a histogram.
pub(super) struct Buckets {
    /// Upper bound of the first one, in seconds or whatever is observed.
    pub(super) first: f64,
    /// Each bound over the one before.
    pub(super) factor: f64,
    /// How many there are.
    pub(super) count: usize,
}

impl Buckets {
    pub(super) fn bounds(&self) -> Vec<f64> {
        prometheus::exponential_buckets(self.first, self.factor, self.count)
            .expect("the range is valid")
    }
}

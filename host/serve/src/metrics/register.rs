//! How metrics are created: registered under their name, with help text and labels.

use prometheus::{
    HistogramOpts, HistogramVec, Opts, Registry,
    core::{Atomic, Collector, GenericCounterVec, GenericGaugeVec},
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

    pub(super) fn counters<P: Atomic + 'static>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> GenericCounterVec<P> {
        self.add(GenericCounterVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn gauges<P: Atomic + 'static>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> GenericGaugeVec<P> {
        self.add(GenericGaugeVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(HistogramVec::new(options, labels))
    }
}

//! Reads the bodies of requests. All bodies in flight share one budget of bytes, so that no number
//! of callers makes the daemon run out of memory.
//!
//! A body takes of the budget what it has sent, not what it announces: a caller that announces much
//! and sends nothing keeps nothing from others. What was decoded from a body keeps its part, also
//! in a queue and after the caller has left.

use std::{future::poll_fn, ops::Deref, pin::Pin, sync::Arc, time::Duration};

use axum::body::{Body, Bytes, HttpBody as _};
use prometheus::IntGauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    metrics::Metrics,
    request::api::{Refusal, RequestResult},
};

/// Time limit for reading a body; it leaves time for a push of many megabytes. Requests with a
/// deadline end earlier.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// The first share of the budget that a body takes, in KiB; it doubles what it has from there.
const FIRST_KIB: usize = 16;

/// The memory that the bodies of requests may have together.
pub(crate) struct BodyBudget {
    /// What is left, in KiB.
    left_kib: Arc<Semaphore>,
    in_flight: IntGauge,
}

impl BodyBudget {
    /// A budget of so many bytes.
    pub(crate) fn new(bytes: usize, metrics: &Metrics) -> Self {
        let in_flight = metrics.gauge(
            "hypercast_inflight_body_bytes",
            "Memory of the bodies of requests in flight; at most server.max_inflight_body_mib",
        );
        let most_kib = (bytes >> 10).min(Semaphore::MAX_PERMITS);
        Self { left_kib: Arc::new(Semaphore::new(most_kib)), in_flight }
    }

    /// Reads a body of at most `most` bytes.
    ///
    /// # Errors
    /// The body is longer, breaks off, or does not arrive within [`BODY_TIMEOUT`]; the budget is
    /// spent.
    pub(crate) async fn read(&self, body: Body, most: usize) -> RequestResult<ReceivedBody> {
        let reading = tokio::time::timeout(BODY_TIMEOUT, self.collect(body, most));
        reading.await.unwrap_or_else(|_| {
            let waited_s = BODY_TIMEOUT.as_secs();
            Err(Refusal::BadRequest(format!("the body did not arrive within {waited_s} s")))
        })
    }

    async fn collect(&self, mut body: Body, most: usize) -> RequestResult<ReceivedBody> {
        let too_long =
            || Refusal::BadRequest(format!("the body is over {most} bytes (max_body_bytes)"));
        let announced = body.size_hint().exact();
        if announced.is_some_and(|bytes| bytes > most as u64) {
            return Err(too_long());
        }
        let expected = announced.map_or(most, |bytes| bytes as usize);
        let mut read = ReceivedBody { bytes: Vec::new(), reserved: self.nothing() };
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            let broken = |error| Refusal::BadRequest(format!("the body broke off: {error}"));
            let frame = frame.map_err(broken)?;
            let chunk = frame.data_ref().map_or(&[][..], Bytes::as_ref);
            let needed = read.bytes.len() + chunk.len();
            if needed > most {
                return Err(too_long());
            }
            if needed > read.bytes.capacity() {
                let doubled = (2 * read.bytes.capacity()).max(FIRST_KIB << 10);
                let capacity = doubled.min(expected).max(needed);
                self.reserve(&mut read.reserved, capacity)?;
                read.bytes.reserve_exact(capacity - read.bytes.len());
            }
            read.bytes.extend_from_slice(chunk);
        }
        Ok(read)
    }

    fn nothing(&self) -> ReservedMemory {
        ReservedMemory { kib: None, in_flight: self.in_flight.clone() }
    }

    /// Extends what is reserved to `bytes`.
    fn reserve(&self, reserved: &mut ReservedMemory, bytes: usize) -> RequestResult<()> {
        let more_kib = bytes.div_ceil(1 << 10) - reserved.kib();
        let full = || Refusal::BodiesFull { retry_after_ms: 1000 };
        let more_kib = u32::try_from(more_kib).map_err(|_| full())?;
        let more = self.left_kib.clone().try_acquire_many_owned(more_kib).map_err(|_| full())?;
        self.in_flight.add(i64::from(more_kib) << 10);
        match &mut reserved.kib {
            Some(kib) => kib.merge(more),
            unset @ None => *unset = Some(more),
        }
        Ok(())
    }
}

/// A body with its part of the budget.
pub(crate) struct ReceivedBody {
    bytes: Vec<u8>,
    reserved: ReservedMemory,
}

impl ReceivedBody {
    /// Frees the bytes and keeps their part of the budget, for what was decoded from them.
    pub(crate) fn into_reserved(self) -> ReservedMemory {
        self.reserved
    }
}

impl Deref for ReceivedBody {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A part of the budget, given back on drop: it goes wherever the bytes go.
pub(crate) struct ReservedMemory {
    kib: Option<OwnedSemaphorePermit>,
    in_flight: IntGauge,
}

impl ReservedMemory {
    fn kib(&self) -> usize {
        self.kib.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }
}

impl Drop for ReservedMemory {
    fn drop(&mut self) {
        self.in_flight.sub((self.kib() as i64) << 10);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(read: RequestResult<ReceivedBody>) -> Refusal {
        match read {
            Ok(body) => panic!("{} bytes were read", body.len()),
            Err(refusal) => refusal,
        }
    }

    #[tokio::test]
    async fn bodies_share_the_budget_and_give_it_back() {
        let budget = BodyBudget::new(1 << 20, &Metrics::default());
        let (half, most) = (vec![7; 512 << 10], 1 << 20);
        let first = budget.read(half.clone().into(), most).await.unwrap();
        assert_eq!(*first, *half);
        let second = budget.read(half.clone().into(), most).await.unwrap();
        assert_eq!(budget.in_flight.get(), 1 << 20);
        let refusal = refused(budget.read("x".into(), most).await);
        assert!(matches!(refusal, Refusal::BodiesFull { .. }), "{refusal}");
        assert_eq!(refusal.code(), (503, "overloaded"));
        // A body without content needs nothing.
        assert!(budget.read(Body::empty(), most).await.unwrap().is_empty());
        let kept = second.into_reserved();
        drop(first);
        assert!(budget.read(half.clone().into(), most).await.is_ok());
        drop(kept);
        assert_eq!(budget.in_flight.get(), 0);
        assert!(budget.read(vec![7; 1 << 20].into(), most).await.is_ok());
    }

    #[tokio::test]
    async fn a_body_that_is_too_long_takes_nothing() {
        let budget = BodyBudget::new(1 << 20, &Metrics::default());
        let refusal = refused(budget.read(vec![7; 101].into(), 100).await);
        assert!(refusal.to_string().contains("over 100 bytes"), "{refusal}");
        assert_eq!(budget.in_flight.get(), 0);
    }
}

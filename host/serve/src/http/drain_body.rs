//! Reads the rest of a request's body that its handler did not read.
//!
//! A request may be refused before its body is read. If the connection were closed then, a client
//! that is still writing would fail and lose the answer that says why. So the rest is read and
//! discarded while the answer is sent, up to a number of bytes and a time. Handlers decide how
//! large a body may be.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::header,
};
use hyper::body::{Frame, SizeHint};
use tokio::runtime::Handle;

/// Limit of what is discarded of one body, in bytes. Pushes are up to `rollout.max_push_mib`, 128
/// by default.
const MOST_BYTES: usize = 128 << 20;

/// Time limit for discarding one body.
const MOST_TIME: Duration = Duration::from_secs(10);

/// Wraps a request's body so that what is left of it is drained when it is dropped.
pub(crate) async fn read_on(request: Request) -> Request {
    let waits = request.headers().contains_key(header::EXPECT);
    request.map(|body| Body::new(DrainedBody { body, waits }))
}

struct DrainedBody {
    body: Body,
    /// Whether the client waits for `100 Continue` and has not got it: it has sent no body then.
    waits: bool,
}

impl HttpBody for DrainedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.waits = false;
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for DrainedBody {
    fn drop(&mut self) {
        if self.waits || self.body.is_end_stream() {
            return;
        }
        // At most one per connection, because its next request comes after this body.
        if let Ok(runtime) = Handle::try_current() {
            let rest = std::mem::take(&mut self.body);
            runtime.spawn(tokio::time::timeout(MOST_TIME, read_in_vain(rest)));
        }
    }
}

async fn read_in_vain(mut body: Body) {
    let mut left = MOST_BYTES;
    while let Some(Ok(frame)) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        let Some(rest) = left.checked_sub(bytes) else { return };
        left = rest;
    }
}

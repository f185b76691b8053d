//! What is left of a request's body that nobody read.
//!
//! A request may be refused before its body was read. Closing its connection then would make a client that still writes
//! fail at that, and lose the answer which says why. So the rest is read and thrown away, beside the answer, for a bounded
//! number of bytes and time. What a body may hold is decided by who reads it.

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

/// The most that is read in vain of one body. Pushes are up to `rollout.max_push_mib`, 128 by default.
const MOST_BYTES: usize = 128 << 20;

/// How long a body is read in vain.
const MOST_TIME: Duration = Duration::from_secs(10);

/// The same request, whose body is read to its end, within bounds, also where nobody wants it.
pub(crate) async fn read_on(request: Request) -> Request {
    let waits = request.headers().contains_key(header::EXPECT);
    request.map(|body| Body::new(DrainedBody { body, waits }))
}

struct DrainedBody {
    body: Body,
    /// Whether the client waits to be asked for its body, and was not: it has sent none.
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
        // One at most for a connection: its next request comes after this body.
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

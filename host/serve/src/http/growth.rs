//! Takes over a schema that has grown, while requests are answered.

use std::{sync::Arc, time::Duration};

use hypercast_core::{
    logging::RepeatedFailures,
    supervised_thread::{OnPanic, PanicWatch},
};

use crate::error::Result;

/// How often it looks whether the schema has grown.
const LOOK: Duration = Duration::from_millis(200);

/// Back-off after a growth could not be taken over.
const REST: Duration = Duration::from_secs(5);

/// Calls `take_over` for as long as the process lives. It blocks, returns whether the schema had
/// grown, and none once the process ends.
pub(crate) fn follow(take_over: impl Fn() -> Option<Result<bool>> + Send + Sync + 'static) {
    let take_over = Arc::new(take_over);
    tokio::spawn(async move {
        let _watched = PanicWatch::new("schema", OnPanic::NotReady);
        let (mut failures, mut pause) = (RepeatedFailures::default(), LOOK);
        loop {
            tokio::time::sleep(pause).await;
            let take_over = take_over.clone();
            pause = match tokio::task::spawn_blocking(move || take_over()).await {
                Ok(None) => return,
                Ok(Some(Ok(_))) => LOOK,
                Ok(Some(Err(error))) => {
                    if failures.is_news(&error) {
                        tracing::error!(%error, "requests are answered under the schema of before, and features stand still; trying again");
                    }
                    REST
                }
                Err(error) => {
                    tracing::error!(%error, "taking a schema over failed inside the host");
                    REST
                }
            };
        }
    });
}

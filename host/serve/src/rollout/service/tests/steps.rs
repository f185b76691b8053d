//! Rollouts that a test steps.

use hypercast_expert::wasm::contract::Verdict;

use super::*;
use crate::rollout::MeasuredArm;

/// The rollouts of a daemon, which a test steps.
fn opened(
    dir: &Path,
    streams: Arc<dyn Streams>,
    serving: Arc<dyn VersionLookup>,
) -> RolloutService {
    let (config, context) = context(dir, streams, serving, slow);
    RolloutService::open(&config, context).unwrap()
}

#[test]
fn a_rollback_that_could_not_be_decided_is_made_up_for_with_its_cause() {
    let dir = tempfile::tempdir().unwrap();
    let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
    files.write(&watched()).unwrap();
    let rollouts = opened(dir.path(), undecidable(), Arc::new(Nothing));
    rollouts.step().unwrap();
    let rollout = rollouts.rollout("feed", "1.0.0").unwrap();
    assert_eq!(rollout.cause, None, "a decision that nobody knows ends no rollout");
    assert!(rollouts.roll_back("feed").is_err());
    let rollouts = opened(dir.path(), serving_feed(), Arc::new(Nothing));
    rollouts.step().unwrap();
    let rollout = rollouts.rollout("feed", "1.0.0").unwrap();
    assert_eq!(
        (rollout.step, rollout.cause.as_deref()),
        (RolloutStep::RolledBack, Some("asked to"))
    );
}

/// Has every version loaded, and each answers everybody.
struct Loaded;

impl VersionLookup for Loaded {
    fn arm(&self, _: &str, _: &str) -> Option<Arc<ExpertArm>> {
        None
    }

    fn measured(&self, _: &str, _: &str) -> Option<MeasuredArm> {
        let (stats, evaluate) = (Arc::default(), Box::new(|_: &_| Ok(Verdict::Publish)));
        Some(MeasuredArm { share: 1.0, stats, evaluate })
    }

    fn problem(&self) -> Option<String> {
        None
    }

    fn slices(&self, _: &str, _: &str, _: Option<&str>) -> Vec<MeasuredSlice> {
        Vec::new()
    }
}

#[test]
fn a_step_lasts_as_long_as_daemons_looked_at_it_whatever_the_wall_clock_says() {
    for (lasted_ms, is_over) in [(0, false), (900_000, true)] {
        let dir = tempfile::tempdir().unwrap();
        let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
        files.write(&Rollout { since_ms: 1, lasted_ms, ..watched() }).unwrap();
        let rollouts = opened(dir.path(), serving_feed(), Arc::new(Loaded));
        rollouts.step().unwrap();
        assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().settled, is_over, "{lasted_ms}");
    }
}

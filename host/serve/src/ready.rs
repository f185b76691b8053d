//! Whether a process is ready: every version that is to serve is loaded, as the registry has it now.
//!
//! A process that cannot load a promotion is not ready, although what it served before goes on: who asks
//! `/readyz` wants the versions that were decided. A balancer that must keep replicas through a bad promotion asks
//! `/readyz/serving` instead.

use super::set::ServingSet;
use hypercast_stream::registry::{Registry, VersionState};

/// Versions that are loaded.
pub(super) struct Known {
    fms: Vec<String>,
    /// Name, version and pinned FM; none in a process without experts.
    experts: Option<Vec<[String; 3]>>,
}

impl Known {
    /// Those of a set; `ranks` says whether the process runs experts.
    pub(super) fn of(set: &ServingSet, ranks: bool) -> Self {
        let fms = set.fms().map(|fm| fm.version().to_owned()).collect();
        let arms =
            || set.arms().iter().map(|arm| [&arm.name, &arm.version, &arm.fm].map(String::clone));
        Self { fms, experts: ranks.then(|| arms().collect()) }
    }
}

/// What is active in the registry and not loaded: versions of experts, and FMs that they pin.
pub(super) fn missing(registry: &Registry, known: &Known) -> Vec<String> {
    let mut missing = Vec::new();
    for (name, expert) in registry.experts() {
        for version in expert.in_order() {
            if version.state != VersionState::Active {
                continue;
            }
            let of = [name, &version.version, &version.fm];
            if known.experts.as_ref().is_some_and(|all| !all.iter().any(|one| *one == of)) {
                missing.push(format!("expert {name} {} on FM {}", version.version, version.fm));
            }
            let fm = format!("FM {}", version.fm);
            if !known.fms.contains(&version.fm) && !missing.contains(&fm) {
                missing.push(fm);
            }
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_stream::registry::{Change, Decision, ExpertVersion, WeightsLocation};

    fn registry(state: VersionState) -> Registry {
        let expert = ExpertVersion {
            name: "feed".into(),
            version: "1.1.0".into(),
            state: VersionState::Training,
            parent: None,
            plugin: "feed.wasm".into(),
            plugin_hash: "1".into(),
            plugin_version: "0.1.0".into(),
            accepts_fm: "*".into(),
            fm: "2.0.0".into(),
            schema: "a".into(),
            tae_dim: 32,
            without_tae: false,
            surfaces: vec!["feed".into()],
            created_ms: 1,
            trained_ms: 1,
            weights: WeightsLocation::Published,
        };
        let (name, version) = (expert.name.clone(), expert.version.clone());
        let mut registry = Registry::default();
        let changes = vec![
            Change::ExpertRegistered { expert: Box::new(expert) },
            Change::ExpertState { name, version, state },
        ];
        registry.apply(&Decision { at_ms: 1, changes }).unwrap();
        registry
    }

    fn known(fms: &[&str], experts: Option<[&str; 3]>) -> Known {
        Known {
            fms: fms.iter().map(|fm| fm.to_string()).collect(),
            experts: Some(experts.into_iter().map(|of| of.map(str::to_owned)).collect()),
        }
    }

    #[test]
    fn active_versions_and_the_fms_they_pin_must_be_loaded() {
        let active = registry(VersionState::Active);
        let loaded = Some(["feed", "1.1.0", "2.0.0"]);
        assert_eq!(missing(&active, &known(&["1.0.0", "2.0.0"], loaded)), [""; 0]);
        let expert = "expert feed 1.1.0 on FM 2.0.0";
        assert_eq!(missing(&active, &known(&["2.0.0"], None)), [expert]);
        assert_eq!(missing(&active, &known(&["1.0.0"], None)), [expert, "FM 2.0.0"]);
        // The same version on another FM is another thing.
        let repinned = Some(["feed", "1.1.0", "1.0.0"]);
        assert_eq!(missing(&active, &known(&["1.0.0", "2.0.0"], repinned)), [expert]);
        let tier = Known { experts: None, ..known(&["1.0.0"], None) };
        assert_eq!(missing(&active, &tier), ["FM 2.0.0"]);
        for state in [VersionState::Shadow, VersionState::Training] {
            assert_eq!(missing(&registry(state), &known(&[], None)), [""; 0]);
        }
    }
}

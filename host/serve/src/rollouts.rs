//! What serves, as rollouts look at it: a version's counts, and how good its predictions were.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    service::Service,
    settings::Settings,
    window::{Quality, Window},
};
use crate::error::Result;
use crate::rollout::{Acceptor, ArmNow, Rollouts, Serving, Tools};
use hypercast_expert::{
    Engine,
    wasm::contract::{Quality as Measured, Slice},
};
use hypercast_stream::streams::StreamEngine as Streams;

/// Starts the rollouts of a daemon with experts.
pub(super) fn start(
    settings: Arc<Settings>,
    service: Arc<Service>,
    (wasm, streams): (Engine, Arc<dyn Streams>),
) -> Result<Rollouts> {
    let schema = Arc::new(service.schema().clone());
    let config = settings.now();
    let trusted = Box::new(move || Ok(settings.now().rollout.keys()?));
    let acceptor = Acceptor::new((&config, trusted), schema.clone(), (wasm, streams.clone()))?;
    let acceptor = Arc::new(acceptor);
    Rollouts::start(&config, Tools { acceptor, serving: service, streams, schema })
}

impl Serving for Service {
    fn arm(&self, name: &str, version: &str) -> Option<ArmNow> {
        let set = self.models().set();
        let arm = set.arms().iter().find(|arm| arm.name == name && arm.version == version)?;
        Some(ArmNow {
            state: arm.state(),
            share: arm.share,
            tally: arm.tally().clone(),
            expert: arm.expert(),
            without_tae: arm.without_tae(),
        })
    }

    fn problem(&self) -> Option<String> {
        self.models().problem()
    }

    fn slices(&self, name: &str, version: &str, before: Option<&str>) -> Vec<Slice> {
        let label = |version: &str| format!("{name}@{version}");
        let (own, before) = (label(version), before.map(label));
        // By task and surface: the version's window, and that of the one before.
        let mut pairs: BTreeMap<(String, u16), [Option<Window>; 2]> = BTreeMap::new();
        for ((surface, task, arm), window) in self.served().windows() {
            let place = match &arm {
                arm if *arm == own => 0,
                arm if Some(arm) == before.as_ref() => 1,
                _ => continue,
            };
            pairs.entry((task, surface)).or_default()[place] = Some(window);
        }
        let mut slices = Vec::new();
        let mut whole: BTreeMap<String, [Vec<Window>; 2]> = BTreeMap::new();
        for ((task, surface), [own, before]) in pairs {
            let Some(own) = own else { continue };
            slices.push(Slice {
                task: task.clone(),
                surface: Some(self.schema().surfaces[usize::from(surface)].clone()),
                examples: own.quality().n,
                candidate: measured(own.quality()),
                serving: before.as_ref().map(|before| measured(before.quality())),
            });
            let [owns, befores] = whole.entry(task).or_default();
            owns.push(own);
            befores.extend(before);
        }
        slices.extend(whole.into_iter().map(|(task, [owns, befores])| {
            let own = Window::together(owns.iter());
            Slice {
                task,
                surface: None,
                examples: own.n,
                candidate: measured(own),
                serving: (!befores.is_empty()).then(|| measured(Window::together(befores.iter()))),
            }
        }));
        slices
    }
}

fn measured(quality: Quality) -> Measured {
    // Users are not kept with outcomes, and regressions are not followed here.
    let (ne, calibration) = (quality.ne, quality.calibration);
    Measured { ne, auc: None, gauc: None, calibration, mse: None }
}

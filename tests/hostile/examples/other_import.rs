//! A component that imports a clock.

#![allow(missing_docs, clippy::too_many_arguments, reason = "generated bindings")]

use hypercast_hostile::ValidExpert;
use hypercast_sdk::Component;
use hypercast_sdk::raw::Guest as Contract;

wit_bindgen::generate!({
    inline: "
        package hypercast:hostile;

        interface clock {
            now: func() -> u64;
        }

        world other-import {
            include hypercast:expert/expert@3.0.0;
            import clock;
        }
    ",
    path: "../../sdk/wit",
    world: "hypercast:hostile/other-import",
    with: {
        "hypercast:expert/types@3.0.0": hypercast_sdk::raw::types,
        "hypercast:hostile/clock": generate,
    },
});

struct OtherImport;

impl Guest for OtherImport {
    fn describe(info: HostInfo) -> Description {
        <Component<ValidExpert> as Contract>::describe(info)
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        <Component<ValidExpert> as Contract>::network(info)
    }

    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        let request = RankRequest { time_ms: hypercast::hostile::clock::now() as i64, ..request };
        <Component<ValidExpert> as Contract>::rank(request, predictions, columns)
    }

    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        <Component<ValidExpert> as Contract>::labels(info, batch)
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        <Component<ValidExpert> as Contract>::sample(info, batch)
    }

    fn schedule(step: TrainingStep) -> f32 {
        <Component<ValidExpert> as Contract>::schedule(step)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        <Component<ValidExpert> as Contract>::evaluate(info, evaluation)
    }
}

export!(OtherImport);

//! A component that wants a clock of its host.

#![allow(missing_docs, clippy::too_many_arguments, reason = "generated bindings")]

use hypercast_hostile::Good;
use hypercast_sdk::Component;
use hypercast_sdk::raw::Guest as Contract;

wit_bindgen::generate!({
    inline: "
        package hypercast:hostile;

        interface clock {
            now: func() -> u64;
        }

        world other-import {
            include hypercast:expert/expert@2.0.0;
            import clock;
        }
    ",
    path: "../../sdk/wit",
    world: "hypercast:hostile/other-import",
    with: {
        "hypercast:expert/types@2.0.0": hypercast_sdk::raw::types,
        "hypercast:hostile/clock": generate,
    },
});

struct OtherImport;

impl Guest for OtherImport {
    fn describe(info: HostInfo) -> Description {
        <Component<Good> as Contract>::describe(info)
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        <Component<Good> as Contract>::network(info)
    }

    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        let request = RankRequest { time_ms: hypercast::hostile::clock::now() as i64, ..request };
        <Component<Good> as Contract>::rank(request, predictions, columns)
    }

    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        <Component<Good> as Contract>::labels(info, batch)
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        <Component<Good> as Contract>::sample(info, batch)
    }

    fn schedule(step: TrainingStep) -> f32 {
        <Component<Good> as Contract>::schedule(step)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        <Component<Good> as Contract>::evaluate(info, evaluation)
    }
}

export!(OtherImport);

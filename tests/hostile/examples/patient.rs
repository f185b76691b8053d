//! Learns its items by heart, and ends its passes before that hurts: by the log loss of `like`
//! where the schema has it, and by the host's mean NE elsewhere. This is valid.

use hypercast_sdk::{
    Description, Embedding, Evaluation, EvaluationRows, Expert, Graph, HostInfo, Linear,
};

struct Patient;

impl Expert for Patient {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe(env!("CARGO_CRATE_NAME"), info).early_stop(2)
    }

    fn network(g: &Graph) {
        let item = Embedding::new("item", 5_000, 4).apply(g.id("item_id"));
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(item));
        }
    }

    fn validation_score(
        _: &HostInfo,
        _: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Option<f64>, String> {
        let Ok(like) = rows.task("like") else { return Ok(None) };
        let said = like.candidate.iter().zip(&like.labels);
        let of_row = |(said, label): (&f32, &f32)| {
            let said = if *label > 0.5 { *said } else { 1.0 - *said };
            f64::from(said).max(1e-9).ln()
        };
        let counted = said.zip(&like.mask).filter(|(_, mask)| **mask != 0);
        let losses: Vec<f64> = counted.map(|(row, _)| of_row(row)).collect();
        Ok(Some(losses.iter().sum::<f64>() / losses.len().max(1) as f64))
    }
}

hypercast_sdk::export!(Patient);

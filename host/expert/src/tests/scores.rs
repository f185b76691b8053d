//! Ranking scores of the plugins of this repository.

use super::components::{TASKS, components, log, loss, trained};

#[test]
fn a_ranking_score_is_the_prediction_less_the_users_level() {
    let log = log(200);
    for path in components("HYPERCAST_PLUGINS") {
        let (blueprint, mut trainer) = trained(&path, &log);
        let has_scores = path.ends_with("mlp-fusion.wasm") || path.ends_with("short-term.wasm");
        let scored = blueprint.graph.scores.iter().filter(|score| score.is_some()).count();
        assert_eq!(scored, if has_scores { TASKS } else { 0 }, "{}", path.display());
        (0..3).for_each(|_| _ = loss(&mut trainer, &log));
        let predictions = trainer.predict_scored(log.chunk()).unwrap();
        let mut levels = Vec::new();
        for task in predictions.tasks.iter().filter(|_| has_scores) {
            let scores = predictions.score(&task.task).unwrap();
            let mut row = 0;
            for example in &log.examples {
                let rows = row..row + example.targets.len();
                row = rows.end;
                let level = |row: usize| {
                    let probability = task.values[row];
                    (probability / (1.0 - probability)).ln() - scores[row]
                };
                let first = level(rows.start);
                let is_same = rows.clone().all(|row| (level(row) - first).abs() < 1e-3);
                assert!(is_same, "{:?}", rows.map(level).collect::<Vec<_>>());
                levels.push(first);
            }
        }
        let spread = levels.iter().map(|level| (level - levels[0]).abs()).fold(0.0, f32::max);
        assert_eq!(spread > 1e-2, has_scores, "users differ in what was learned: {spread}");
    }
}

//! An expert that reads nothing but content vectors, in its network, its labels and its ranking,
//! and explores. It is not hostile.

use hypercast_sdk::{
    ActionBatch, Description, Expert, Graph, HostInfo, Linear, Ranked, Request, TaskLabels, labels,
};

struct ContentVector;

impl Expert for ContentVector {
    fn describe(info: &HostInfo) -> Description {
        Description::new("content_vector", "1.0.0")
            .all_tasks(info)
            .rank_vector("content")
            .training_vector("content")
            .training_request()
            .training_time()
    }

    fn network(g: &Graph) {
        let content = g.vector("content");
        for task in g.tasks() {
            let hidden = Linear::new(&format!("{}/hidden", task.name), 8).apply(content).silu();
            g.output(&task.name, Linear::new(&task.name, 1).apply(hidden));
        }
    }

    /// Items without a vector do not count.
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        let rows = batch.surface.len();
        if batch.time_ms()?.len() != rows || batch.requests()?.len() != rows {
            return Err("a time and a request for each row".into());
        }
        let vectors = batch.vector("content")?;
        let mut all = labels::from_schema(Self::describe(info).tasks(), info, batch)?;
        for own in &mut all {
            for (mask, vector) in own.mask.iter_mut().zip(vectors.chunks(vectors.len() / rows)) {
                *mask *= u8::from(vector.iter().any(|number| *number != 0.0));
            }
        }
        Ok(all)
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let vectors = request.vector("content")?;
        let first = vectors.chunks(vectors.len() / request.candidates.len());
        let scores: Vec<f32> = first.map(|vector| vector[0]).collect();
        Ok(request.softmax(&scores, 1.0))
    }
}

hypercast_sdk::export!(ContentVector);

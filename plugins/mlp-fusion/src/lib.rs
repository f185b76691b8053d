//! `mlp-fusion`: an expert that fuses everything the host's schema offers with an MLP.
//!
//! It fits any surface and data set: it reads all numeric features, an embedding of each id column
//! and the FM's embedding. It has no sequence model of its own; see `short-term` for one that has.

use hypercast_sdk::{
    Description, Dropout, Embedding, Expert, ExpertFusion, FmEmbedding, FmFusion, Graph, HostInfo,
    Squash, TaskHeads, Tensor,
};

/// The expert; its tasks are those of the host's schema.
pub struct MlpFusion;

impl Expert for MlpFusion {
    fn describe(info: &HostInfo) -> Description {
        Description::new("mlp-fusion", env!("CARGO_PKG_VERSION")).all_tasks(info)
    }

    fn network(g: &Graph) {
        // First-order parts reach the logits directly, so the expert is at least as good as a
        // linear model. That is most of what a surface with few logs can learn; the MLP adds the
        // rest.
        let mut heads = TaskHeads::new("heads");
        let mut parts: Vec<_> = embeddings(g).into_iter().collect();
        if !g.info().features.is_empty() {
            let numbers = g.features(&g.info().features);
            parts.push(Squash::new("numeric").apply(numbers));
            heads = heads.direct(numbers).ranking_scores();
        }
        if g.info().tae_dim > 0 {
            let fm = FmEmbedding::new("fm", 32).value_dropout(0.0).apply(g.tae());
            parts.extend([fm.values, FmFusion::new("fusion", 32).apply(fm, None)]);
            heads = heads.fm(fm).from_fm();
        }
        if parts.is_empty() {
            g.fail("the schema has no input for this expert: no id and no numeric feature, and the host has no FM");
            return;
        }
        let bottom = ExpertFusion::mlp("expert", [64, 32]).dropout(0.2).apply(g.concat(&parts));
        heads.apply(g, bottom);
    }
}

// Leaves out `user_id`: a user has few rows, so an embedding would memorise them. The FM's
// embedding describes users better.
fn embeddings(g: &Graph) -> Option<Tensor<'_>> {
    let ids = g.info().ids.iter().filter(|id| *id != "user_id");
    let embed = |id: &String| {
        let rows = if id.ends_with("_id") { 10_000 } else { 1_000 };
        Embedding::new(&format!("embed_{id}"), rows, 8).apply(g.id(id))
    };
    let embedded: Vec<_> = ids.map(embed).collect();
    (!embedded.is_empty()).then(|| Dropout::new(0.1).apply(g.concat(&embedded)))
}

hypercast_sdk::export!(MlpFusion);

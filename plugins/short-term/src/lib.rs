//! `short-term`: an expert that fuses a sequence model of the user's last events on this surface
//! with the FM's embedding, and ranks a diverse feed.
//!
//! It fits any surface of a data set with item ids in the history.

use hypercast_sdk::{
    Description, Diversity, Dropout, Embedding, Expert, ExpertFusion, FmEmbedding, FmFusion, Graph,
    HostInfo, Hstu, Ranked, Request, Squash, TaskHeads, Tensor,
};

/// The keys of the diversity rule: the first id column of these that the schema has.
const DIVERSITY_KEYS: [&str; 3] = ["author_id", "tag", "genre"];

/// The expert; its tasks are those of the host's schema.
pub struct ShortTerm;

impl Expert for ShortTerm {
    fn describe(info: &HostInfo) -> Description {
        let expert = Description::new("short-term", env!("CARGO_PKG_VERSION"))
            .all_tasks(info)
            .history_len(32);
        let key = DIVERSITY_KEYS.iter().find(|key| info.ids.iter().any(|id| id == *key));
        key.map_or(expert.clone(), |key| expert.rank_id(key))
    }

    fn network(g: &Graph) {
        let tables = item_tables(g);
        if tables.is_empty() {
            g.fail("the schema has no id column that both candidates and history have");
            return;
        }
        let sequence: Vec<_> = tables.iter().map(|(id, table)| (*id, table)).collect();
        let short = Hstu::new("short", 32).heads(2).dropout(0.1).apply(g, &sequence);
        let items = tables.iter().map(|(id, table)| table.apply(g.id(id)));
        let embedded: Vec<_> = items.chain(context(g, &tables)).collect();
        let mut parts = vec![Dropout::new(0.1).apply(g.concat(&embedded))];
        let mut heads = TaskHeads::new("heads");
        if !g.info().features.is_empty() {
            let numbers = g.features(&g.info().features);
            parts.push(Squash::new("numeric").apply(numbers));
            heads = heads.direct(numbers).ranking_scores();
        }
        if g.info().tae_dim > 0 {
            let fm = FmEmbedding::new("fm", 32).value_dropout(0.0).apply(g.tae());
            parts.extend([fm.values, FmFusion::new("fusion", 32).apply(fm, Some(short))]);
            heads = heads.fm(fm).from_fm();
        } else {
            parts.push(short);
        }
        let bottom = ExpertFusion::mlp("expert", [64, 32]).dropout(0.2).apply(g.concat(&parts));
        heads.apply(g, bottom);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let scores = request.weighted_sum(value);
        let rule = Diversity { at_most: 2, window: 6 };
        match DIVERSITY_KEYS.iter().find_map(|key| request.id(key).ok()) {
            Some(keys) => Ok(request.top_diverse(&scores, keys, rule)),
            None => Ok(request.top(&scores)),
        }
    }
}

/// The value model: the worth of one unit of each prediction to this surface.
fn value(task: &str) -> f32 {
    match task {
        "is_like" | "like" | "finish" => 2.0,
        "love" | "is_profile_enter" => 3.0,
        "dislike" => -2.0,
        "watch" | "watch_ratio" => 0.5,
        _ => 1.0,
    }
}

// One table for each id column that both candidates and past events have, except the surface.
fn item_tables(g: &Graph) -> Vec<(&str, Embedding<'_>)> {
    let info = g.info();
    let shared = info.history_ids.iter().filter(|id| info.ids.contains(id) && *id != "surface");
    let table = |id: &String| {
        let rows = if id.ends_with("_id") { 10_000 } else { 1_000 };
        Embedding::new(&format!("embed_{id}"), rows, 12)
    };
    shared.map(|id| (id.as_str(), table(id))).collect()
}

// Embeddings of the other id columns (hour, surface, user segments), which have few values. Leaves
// out `user_id`, because the FM's embedding describes users better.
fn context<'g>(g: &'g Graph, tables: &[(&str, Embedding<'g>)]) -> Vec<Tensor<'g>> {
    let is_item = |id: &str| tables.iter().any(|(table, _)| *table == id);
    let others = g.info().ids.iter().filter(|id| *id != "user_id" && !is_item(id));
    let embed = |id: &String| Embedding::new(&format!("embed_{id}"), 1_000, 4).apply(g.id(id));
    others.map(embed).collect()
}

hypercast_sdk::export!(ShortTerm);

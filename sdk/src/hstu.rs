//! A lightweight HSTU over the user's last events on the expert's surface. It models short-term,
//! real-time interests (paper sections 3.1.2 and 3.2).
//!
//! It is the FM's sequence model at the size of an expert. The token of a past event is
//! `f(ids) + actions + age`, that of a candidate is `f(ids)`, and each request is one joint
//! sequence of both. Besides ids, the contract offers only an event's actions and its age.

use crate::graph::{Graph, Tensor};
use crate::layers::{Dropout, Embedding, LayerNorm, Linear};
use crate::ops::{Attention, Projections};

/// The ages at which the effect of an event bends, as log2 of seconds: about a minute, an hour, a
/// day and a week.
const AGES: [f32; 4] = [6.0, 12.0, 16.5, 19.0];

/// HSTU layers over the short history, with the candidates as target tokens.
pub struct Hstu {
    name: String,
    width: u32,
    heads: u32,
    layers: u32,
    dropout: f32,
}

/// The projections of one layer. `W_uvqk` is split into two matrices, because the last layer needs
/// only the keys and values of the history.
struct ShortTermLayer<'g> {
    norm: LayerNorm<'g>,
    uq: Linear<'g>,
    kv: Linear<'g>,
    out_norm: LayerNorm<'g>,
    out: Linear<'g>,
}

impl Hstu {
    /// An HSTU with one layer of one head, `width` wide.
    pub fn new(name: &str, width: u32) -> Self {
        Self { name: name.into(), width, heads: 1, layers: 1, dropout: 0.0 }
    }

    /// Sets the number of attention heads, which must divide the width.
    pub fn heads(self, heads: u32) -> Self {
        Self { heads, ..self }
    }

    /// Sets the number of layers, at least one.
    pub fn layers(self, layers: u32) -> Self {
        Self { layers, ..self }
    }

    /// Sets the dropout rate of each layer's attention output, in [0, 1).
    pub fn dropout(self, rate: f32) -> Self {
        Self { dropout: rate, ..self }
    }

    /// Returns the candidates' short-term representation, `[rows, width]`. Each entry of `tables`
    /// is an id column and its embedding, which past items and candidates share.
    pub fn apply<'g>(&self, g: &'g Graph, tables: &[(&str, &Embedding<'g>)]) -> Tensor<'g> {
        // Apply the tables outside our scope: their parameters belong to the caller's layers.
        let history: Vec<_> =
            tables.iter().map(|(id, table)| table.apply(g.history_id(id))).collect();
        let rows: Vec<_> = tables.iter().map(|(id, table)| table.apply(g.id(id))).collect();
        g.scope(&self.name, || {
            let (mut history, mut rows) = self.tokens(g, &history, &rows);
            let layers = self.layers.max(1);
            for index in 1..=layers {
                (history, rows) = g.scope(&format!("layer_{index}"), || {
                    self.layer(ShortTermLayer::new(self.width), history, rows, index == layers)
                });
            }
            rows
        })
    }

    // Equations 1 and 2: `f` is shared; actions and age are added to the tokens of past events.
    fn tokens<'g>(
        &self,
        g: &'g Graph,
        history: &[Tensor<'g>],
        rows: &[Tensor<'g>],
    ) -> (Tensor<'g>, Tensor<'g>) {
        let f = Linear::new("f", self.width);
        let actions = Linear::new("actions", self.width).no_bias().apply(g.history_actions());
        let age = Linear::new("age", self.width).no_bias().apply(age(g));
        let events = f.apply(g.concat(history)) + actions + age;
        (events, f.apply(g.concat(rows)))
    }

    fn layer<'g>(
        &self,
        layer: ShortTermLayer<'g>,
        history: Tensor<'g>,
        rows: Tensor<'g>,
        last: bool,
    ) -> (Tensor<'g>, Tensor<'g>) {
        let g = rows.graph();
        let attention = Attention { heads: self.heads, max_len: g.history_len() };
        let (row_u, row) = layer.project(rows, self.width);
        // The last layer computes rows only. The op then ignores the history's queries, so the keys
        // take their place.
        let (history_u, events) = if last {
            let (k, v) = layer.keys_values(layer.norm.apply(history), self.width);
            (None, Projections { q: k, k, v })
        } else {
            let (u, events) = layer.project(history, self.width);
            (Some(u), events)
        };
        let next_rows = self.finish(&layer, rows, row_u, g.hstu_attention(events, row, attention));
        let next_history = history_u.map_or(history, |u| {
            self.finish(&layer, history, u, g.hstu_history(events, attention))
        });
        (next_history, next_rows)
    }

    // Y = X + dropout(LN(A V) * U) W_o
    fn finish<'g>(
        &self,
        layer: &ShortTermLayer<'g>,
        x: Tensor<'g>,
        u: Tensor<'g>,
        attended: Tensor<'g>,
    ) -> Tensor<'g> {
        let gated = layer.out_norm.apply(attended) * u;
        x + layer.out.apply(Dropout::new(self.dropout).apply(gated))
    }
}

// `[history, 5]`. A linear layer over it is piecewise linear in log2 of seconds, with a bend at
// each of `AGES`. Ages go up to about 25, so a tenth of them has the scale of an embedding.
fn age(g: &Graph) -> Tensor<'_> {
    let age = g.history_age();
    let bend = |at: &f32| (age - *at).relu();
    let pieces: Vec<_> = std::iter::once(age).chain(AGES.iter().map(bend)).collect();
    g.concat(&pieces) * 0.1
}

impl<'g> ShortTermLayer<'g> {
    fn new(width: u32) -> Self {
        Self {
            norm: LayerNorm::new("norm"),
            uq: Linear::new("uq", width.saturating_mul(2)),
            kv: Linear::new("kv", width.saturating_mul(2)),
            out_norm: LayerNorm::new("out_norm"),
            out: Linear::new("out", width),
        }
    }

    // U, V, Q, K = split(SiLU(LN(X) W_uvqk + b))
    fn project(&self, x: Tensor<'g>, width: u32) -> (Tensor<'g>, Projections<'g>) {
        let normed = self.norm.apply(x);
        let uq = self.uq.apply(normed).silu();
        let (k, v) = self.keys_values(normed, width);
        (uq.slice(0, width), Projections { q: uq.slice(width, width.saturating_mul(2)), k, v })
    }

    fn keys_values(&self, normed: Tensor<'g>, width: u32) -> (Tensor<'g>, Tensor<'g>) {
        let kv = self.kv.apply(normed).silu();
        (kv.slice(0, width), kv.slice(width, width.saturating_mul(2)))
    }
}

//! Attention over histories whose keys and values are kept between passes: serving encodes a user's
//! history once, and every candidate then attends to it.
//!
//! Each backend chooses the form in which it keeps keys and values. Results equal the op over whole
//! histories up to rounding. There are no gradients. The caller decides whose history is kept and
//! for how long.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::ops::FloatTensor;

use crate::attention::{HstuAttention, HstuBackend, HstuInputs, primitive, tensor};

/// A request's kept history at one layer.
#[derive(Debug)]
pub struct KeptHistory<'a, K> {
    /// The keys and values in the backend's form.
    pub layer: &'a K,
    /// `[n]`: the times of its tokens, in seconds; not read without a time bias.
    pub times_s: &'a [i64],
}

/// Keys and values of one request's history at one layer, in a backend's form.
pub trait KeptLayer<B: HstuBackend>: Clone + Default + Debug + Send + Sync + 'static {
    /// Appends each request's history rows of `k` `[H + R, heads * qk_dim]` and `v`
    /// `[H + R, heads * v_dim]` to its kept history.
    ///
    /// # Panics
    /// If `kept` has another number of requests than `shape`, or other widths than `k` and `v`.
    fn keep(k: FloatTensor<B>, v: FloatTensor<B>, shape: &HstuAttention, kept: &mut [&mut Self]);

    /// The number of kept tokens.
    fn tokens(&self) -> usize;

    /// Bytes of memory in use.
    fn bytes(&self) -> usize;

    /// Removes all but the oldest `tokens`.
    fn truncate(&mut self, tokens: usize);

    /// The op: `[H + R, heads * v_dim]`. The batch's history rows are the newest tokens of each
    /// request and must already be in `kept`; its targets see all kept tokens.
    ///
    /// # Panics
    /// As [`HstuBackend::hstu_attention`], and if `kept` does not match the batch.
    fn attend(
        inputs: HstuInputs<FloatTensor<B>>,
        kept: &[KeptHistory<'_, Self>],
        shape: &Arc<HstuAttention>,
    ) -> FloatTensor<B>;
}

/// Kept keys and values as tensors, for backends whose kernel reads whole histories; every pass
/// concatenates them.
#[derive(Debug, Clone, Default)]
pub struct JoinedHistory<B: HstuBackend>(Option<[Tensor<B, 2>; 2]>);

impl<B: HstuBackend> KeptLayer<B> for JoinedHistory<B> {
    fn tokens(&self) -> usize {
        self.0.as_ref().map_or(0, |[k, _]| k.dims()[0])
    }

    fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor<B, 2>| tensor.shape().num_elements() * size_of::<f32>();
        self.0.iter().flatten().map(bytes).sum()
    }

    fn truncate(&mut self, tokens: usize) {
        let keep = tokens.min(self.tokens());
        // No tensor has no rows: that is no history.
        let parts = self.0.take().filter(|_| keep > 0);
        self.0 = parts.map(|parts| parts.map(|part| part.narrow(0, 0, keep)));
    }

    fn keep(k: FloatTensor<B>, v: FloatTensor<B>, shape: &HstuAttention, kept: &mut [&mut Self]) {
        assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
        let new = [k, v].map(tensor::<B, 2>);
        for (b, kept) in kept.iter_mut().enumerate() {
            let rows = shape.request(b).history;
            if rows.is_empty() {
                continue;
            }
            let own = new.each_ref().map(|x| x.clone().narrow(0, rows.start, rows.len()));
            kept.0 = Some(match kept.0.take() {
                Some([k, v]) => {
                    let [new_k, new_v] = own;
                    [Tensor::cat(vec![k, new_k], 0), Tensor::cat(vec![v, new_v], 0)]
                }
                None => own,
            });
        }
    }

    fn attend(
        inputs: HstuInputs<FloatTensor<B>>,
        kept: &[KeptHistory<'_, Self>],
        shape: &Arc<HstuAttention>,
    ) -> FloatTensor<B> {
        assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
        let whole = Self::whole(kept, shape);
        let (history, targets) = (whole.history_rows(), whole.rows() - whole.history_rows());
        let newest = shape.history_rows();
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|x| tensor::<B, 2>(x.clone()));
        let own = |x: &Tensor<B, 2>| x.clone().narrow(0, newest, targets);
        // Kept tokens need queries too, but their outputs are dropped.
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (b, kept) in kept.iter().enumerate() {
            let rows = shape.request(b).history;
            let old = kept.layer.tokens() - rows.len();
            if old > 0 {
                queries.push(Tensor::zeros([old, q.dims()[1]], &q.device()));
            }
            if !rows.is_empty() {
                queries.push(q.clone().narrow(0, rows.start, rows.len()));
            }
            if let Some([k, v]) = &kept.layer.0 {
                keys.push(k.clone());
                values.push(v.clone());
            }
        }
        for (parts, x) in [(&mut queries, &q), (&mut keys, &k), (&mut values, &v)] {
            if targets > 0 {
                parts.push(own(x));
            }
        }
        if history + targets == 0 {
            return inputs.v;
        }
        let joint = |parts: Vec<Tensor<B, 2>>| primitive(Tensor::cat(parts, 0));
        let inputs = HstuInputs { q: joint(queries), k: joint(keys), v: joint(values), ..inputs };
        let out = tensor::<B, 2>(B::hstu_attention(inputs, whole.clone()));
        let mut parts = Vec::new();
        for b in 0..shape.requests() {
            let (rows, all) = (shape.request(b).history, whole.request(b).history);
            if !rows.is_empty() {
                parts.push(out.clone().narrow(0, all.end - rows.len(), rows.len()));
            }
        }
        if targets > 0 {
            parts.push(out.narrow(0, history, targets));
        }
        joint(parts)
    }
}

impl<B: HstuBackend> JoinedHistory<B> {
    /// The layout of the whole histories with the batch's targets.
    fn whole(kept: &[KeptHistory<'_, Self>], shape: &HstuAttention) -> Arc<HstuAttention> {
        let mut offsets = vec![0];
        for kept in kept {
            offsets.push(offsets[offsets.len() - 1] + kept.layer.tokens() as u32);
        }
        let times_s = shape.times_s.as_ref().map(|own| {
            let history = kept.iter().flat_map(|kept| kept.times_s.iter().copied());
            history.chain(own[shape.history_rows()..].iter().copied()).collect()
        });
        Arc::new(HstuAttention {
            history_offsets: offsets.into(),
            times_s,
            targets_only: shape.history_rows() == 0,
            ..shape.clone()
        })
    }
}

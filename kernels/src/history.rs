//! Attention over histories that are kept between passes: what a server
//! computes once a user, and every candidate then attends to.
//!
//! A backend keeps keys and values in the form that it attends to. Equal to the
//! op over whole histories up to rounding. Without gradients. Whose history it is, and for how
//! long it is kept, is decided above.

use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

use crate::attention::{HstuAttention, HstuBackend, HstuInputs};

/// A request's history at one layer, as a backend keeps it.
#[derive(Debug)]
pub struct KeptHistory<'a, K> {
    /// Keys and values.
    pub layer: &'a K,
    /// `[n]`: when its tokens happened, in seconds; empty without a time bias.
    pub times_s: &'a [i64],
}

impl<K> Clone for KeptHistory<'_, K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K> Copy for KeptHistory<'_, K> {}

/// How much is kept of a history at one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptSize {
    /// Tokens.
    pub tokens: usize,
    /// Bytes.
    pub bytes: usize,
}

/// A backend that can keep histories.
pub trait HistoryBackend: HstuBackend {
    /// Keys and values of one request's history at one layer.
    type Kept: Clone + Default + std::fmt::Debug + Send + Sync + 'static;

    /// Appends each request's history rows of `k` `[H + R, heads * qk_dim]` and `v` `[H + R, heads * v_dim]` to
    /// what is kept of it.
    ///
    /// # Panics
    /// Where `kept` has another number of requests than `shape`, or is of another layer.
    fn keep(
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        shape: &HstuAttention,
        kept: &mut [&mut Self::Kept],
    );

    /// How much is kept.
    fn kept_size(kept: &Self::Kept) -> KeptSize;

    /// Forgets all but the oldest `tokens`.
    fn truncate(kept: &mut Self::Kept, tokens: usize);

    /// The op: `[H + R, heads * v_dim]`. The batch's history rows are the newest tokens of each request, and in
    /// `kept` already; its targets see all that is kept.
    ///
    /// # Panics
    /// As [`HstuBackend::hstu_attention`], and where `kept` does not fit the batch.
    fn attend(
        inputs: HstuInputs<FloatTensor<Self>>,
        kept: &[KeptHistory<'_, Self::Kept>],
        shape: &Arc<HstuAttention>,
    ) -> FloatTensor<Self>;
}

/// [`HistoryBackend::keep`] on tensors.
///
/// # Panics
/// As there.
pub fn keep<B: HistoryBackend>(
    k: Tensor<B, 2>,
    v: Tensor<B, 2>,
    shape: &HstuAttention,
    kept: &mut [&mut B::Kept],
) {
    B::keep(k.into_primitive().tensor(), v.into_primitive().tensor(), shape, kept);
}

/// [`HistoryBackend::attend`] on tensors.
///
/// # Panics
/// As there.
pub fn attend<B: HistoryBackend>(
    inputs: HstuInputs<Tensor<B, 2>, Tensor<B, 1>>,
    kept: &[KeptHistory<'_, B::Kept>],
    shape: &Arc<HstuAttention>,
) -> Tensor<B, 2> {
    let inputs = inputs.into_primitives();
    Tensor::from_primitive(TensorPrimitive::Float(B::attend(inputs, kept, shape)))
}

/// Keys and values as tensors, for a backend whose kernel reads them so: they are joined anew in each pass.
#[derive(Debug, Clone)]
pub struct Joined<B: HstuBackend>(Option<[Tensor<B, 2>; 2]>);

impl<B: HstuBackend> Default for Joined<B> {
    fn default() -> Self {
        Self(None)
    }
}

impl<B: HstuBackend> Joined<B> {
    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.0.as_ref().map_or(0, |[k, _]| k.dims()[0])
    }

    /// See [`HistoryBackend::kept_size`].
    pub fn size(&self) -> KeptSize {
        let bytes = |tensor: &Tensor<B, 2>| tensor.shape().num_elements() * size_of::<f32>();
        KeptSize { tokens: self.tokens(), bytes: self.0.iter().flatten().map(bytes).sum() }
    }

    /// See [`HistoryBackend::truncate`].
    pub fn truncate(&mut self, tokens: usize) {
        let keep = tokens.min(self.tokens());
        self.0 = self.0.take().map(|parts| parts.map(|part| part.narrow(0, 0, keep)));
        if keep == 0 {
            self.0 = None;
        }
    }

    /// See [`HistoryBackend::keep`].
    ///
    /// # Panics
    /// As there.
    pub fn keep(
        k: FloatTensor<B>,
        v: FloatTensor<B>,
        shape: &HstuAttention,
        kept: &mut [&mut Self],
    ) {
        assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
        let new = [k, v].map(|x| Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(x)));
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

    /// See [`HistoryBackend::attend`].
    ///
    /// # Panics
    /// As there.
    pub fn attend(
        inputs: HstuInputs<FloatTensor<B>>,
        kept: &[KeptHistory<'_, Self>],
        shape: &Arc<HstuAttention>,
    ) -> FloatTensor<B> {
        assert_eq!(kept.len(), shape.requests(), "a kept history for each request");
        let tensor =
            |x: &FloatTensor<B>| Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(x.clone()));
        let whole = Self::whole(kept, shape);
        let (history, targets) = (whole.history_rows(), whole.rows() - whole.history_rows());
        let newest = shape.history_rows();
        let (q, k, v) = (tensor(&inputs.q), tensor(&inputs.k), tensor(&inputs.v));
        let own = |x: &Tensor<B, 2>| x.clone().narrow(0, newest, targets);
        // Queries of tokens that are kept only: nobody reads what they give.
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
        let joint = |parts: Vec<Tensor<B, 2>>| Tensor::cat(parts, 0).into_primitive().tensor();
        let inputs = HstuInputs { q: joint(queries), k: joint(keys), v: joint(values), ..inputs };
        let out = B::hstu_attention(inputs, whole.clone());
        let out = Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(out));
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

    /// The layout of whole histories with the batch's targets.
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

#[cfg(feature = "cuda")]
impl HistoryBackend for burn_cuda::Cuda {
    type Kept = Joined<Self>;

    fn keep(
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        shape: &HstuAttention,
        kept: &mut [&mut Self::Kept],
    ) {
        Joined::keep(k, v, shape, kept);
    }

    fn kept_size(kept: &Self::Kept) -> KeptSize {
        kept.size()
    }

    fn truncate(kept: &mut Self::Kept, tokens: usize) {
        kept.truncate(tokens);
    }

    fn attend(
        inputs: HstuInputs<FloatTensor<Self>>,
        kept: &[KeptHistory<'_, Self::Kept>],
        shape: &Arc<HstuAttention>,
    ) -> FloatTensor<Self> {
        Joined::attend(inputs, kept, shape)
    }
}

//! HSTU attention over jagged batches, as Burn operations with hand-written backward passes.
//!
//! The crate computes: it has the attention op, the layer and the network around it, and their
//! gradients, for each backend. It holds no weights and knows nothing of models, features, training
//! loops or servers.
//!
//! ```text
//!                      attention: layout, options, the HstuBackend trait
//!                                          │
//!        ┌───────────────┬─────────────────┼──────────────────┬──────────────┐
//!   training          serving         implementations                    tests
//!   autodiff          history         cpu    fused, Flex backend         oracle  plain f64 loops
//!   layer             dense           gpu    fused, CUDA and wgpu
//!   mlp               prepared_mlp    plain  primitive Burn ops, any backend
//!   embedding_bag
//! ```
//!
//! `pairs` sums over the pairs of rows of a request, on the host of any backend. `layer` is a whole
//! HSTU layer as one op, `mlp` a network of two linear layers, and `embedding_bag` lays out the
//! rows of tokens. `history` attends to keys and values that are kept between passes, `dense` is
//! the rest of a layer with prepared weights, and `prepared_mlp` the network; `serving` says which
//! form a backend has. `device_trace` records what a GPU is asked for.
//!
//! Two requests, the first with two history tokens and both with one target:
//!
//! ```
//! use burn::tensor::Tensor;
//! use burn_flex::Flex;
//! use hypercast_kernels::attention::{HstuAttention, HstuInputs, hstu_attention};
//!
//! let layout = HstuAttention {
//!     history_offsets: [0, 2, 2].into(),
//!     target_offsets: [0, 1, 2].into(),
//!     heads: 1,
//!     alpha: 1.0,
//!     norm: 2.0,
//!     window: None,
//!     targets_only: false,
//!     times_s: None,
//! }
//! .checked()?;
//! let device = Default::default();
//! let ones = || Tensor::<Flex, 2>::ones([4, 8], &device); // [H + R, heads * width]
//! let inputs = HstuInputs { q: ones(), k: ones(), v: ones(), position: None, time: None };
//! let output = hstu_attention(inputs, &layout);
//! assert_eq!(output.dims(), [4, 8]);
//! # Ok::<(), hypercast_kernels::attention::Error>(())
//! ```

pub mod attention;
mod autodiff;
pub mod cpu;
pub mod dense;
pub mod device_trace;
pub mod embedding_bag;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod gpu;
pub mod history;
pub mod layer;
pub mod mlp;
pub mod oracle;
pub mod pairs;
pub mod plain;
pub mod prepared_mlp;
pub mod serving;
mod transfer;

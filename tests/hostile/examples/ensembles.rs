//! An expert that `cargo hypercast from-onnx` made of ensembles of trees. It is not hostile: what
//! it predicts and learns is tested in `tests/tests/onnx_models`.

#[rustfmt::skip]
#[path = "../../onnx/ensembles/src/lib.rs"]
mod ensembles;

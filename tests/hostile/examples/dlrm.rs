//! An expert that `cargo hypercast from-onnx` made of a model of PyTorch. It is not hostile: what
//! it predicts is tested in `tests/tests/onnx_models`.

#[rustfmt::skip]
#[path = "../../onnx/dlrm/src/lib.rs"]
mod dlrm;

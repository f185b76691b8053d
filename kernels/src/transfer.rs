//! Values of tensors to the host and back, for ops that some backends compute there.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, TensorData, read_sync};

pub(crate) fn download<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
    let data = read_sync(B::float_into_data(tensor)).expect("the device is alive");
    data.convert::<f32>().into_vec().expect("the data was converted to f32")
}

pub(crate) fn upload<B: Backend>(
    values: Vec<f32>,
    dims: &[usize],
    device: &B::Device,
) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, Shape::from(dims.to_vec())), device)
}

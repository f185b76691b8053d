//! Invalid updates of a serving model. Each must be refused, or the model must still answer.

use arbitrary::{Result, Unstructured};
use hypercast_fm::inference::{self, FmServingOptions};
use hypercast_fm::update::{TensorSlice, WeightUpdate};

use crate::model::{FuzzModel, model};
use crate::world;

/// Changes a real update and applies it to the serving model.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let FuzzModel { served, whole, dir, .. } = model();
    let mut update = WeightUpdate { complete: u.arbitrary()?, ..whole.clone() };
    for _ in 0..u.int_in_range(1..=4)? {
        change(u, &mut update)?;
    }
    if u.ratio(1, 8)? {
        let made = dir.join("made");
        if update.checkpoint(&made).is_ok() {
            // Loading may fail, because the checkpoint may lack a tensor.
            let _ = inference::load(&made, FmServingOptions::default());
        }
    }
    if served.update(update).is_ok() {
        let example = world::example(3, 4, 3);
        let output = served.infer(&[&example]).expect("the model answers");
        assert!(!output.tae.is_empty());
        served.update(whole.clone()).expect("the previous weights are valid");
    }
    Ok(())
}

fn change(u: &mut Unstructured, update: &mut WeightUpdate) -> Result<()> {
    let size = *u.choose(&[0, 1, 2, 7, 1 << 20, 1 << 40, usize::MAX, usize::MAX / 2 + 1])?;
    let number = *u.choose(&[0.0, -1.0, 1e30, f32::MAX, f32::NAN, f32::INFINITY, 1e-40])?;
    if update.dense.is_empty() {
        return Ok(());
    }
    let at = u.choose_index(update.dense.len())?;
    match u.int_in_range(0..=11)? {
        0 => drop(update.dense.remove(at)),
        1 => update.dense.push(update.dense[at].clone()),
        2 => update.dense[at].start = size,
        3 => {
            let shape = &mut update.dense[at].shape;
            if !shape.is_empty() && u.arbitrary()? {
                let dim = u.choose_index(shape.len())?;
                shape[dim] = size;
            } else {
                shape.push(size.max(1));
            }
        }
        4 => update.dense[at].values.truncate(size),
        5 => {
            // Dense weights may be split into pieces of any size.
            let TensorSlice { name, shape, start, values } = update.dense[at].clone();
            let cut = u.int_in_range(0..=values.len())?;
            let rest = TensorSlice {
                name,
                shape,
                start: start.saturating_add(cut),
                values: values[cut..].into(),
            };
            update.dense[at].values.truncate(cut);
            update.dense.push(rest);
        }
        6 => {
            let values = &mut update.dense[at].values;
            if !values.is_empty() {
                let value = u.choose_index(values.len())?;
                values[value] = number;
            }
        }
        7 => update.dense[at].name = u.arbitrary::<&str>()?.to_owned(),
        8 => {
            let id = u.arbitrary()?;
            update.row_ids.push(id);
            if u.arbitrary()? {
                let dim = update.manifest.config.embedding_dim;
                update.rows.extend(std::iter::repeat_n(number, dim));
            }
        }
        9 => {
            let from = u.choose_index(update.row_ids.len().max(1))?;
            update.removed_row_ids.extend(update.row_ids.get(from));
            update.removed_row_ids.push(u.arbitrary()?);
            if u.arbitrary()? && from < update.row_ids.len() {
                let dim = update.manifest.config.embedding_dim;
                update.row_ids.remove(from);
                update.rows.drain(
                    (from * dim).min(update.rows.len())..((from + 1) * dim).min(update.rows.len()),
                );
            }
        }
        10 => {
            let text = serde_json::to_string(&update.manifest).expect("a manifest is plain values");
            let mut bytes = text.into_bytes();
            crate::edit::edit(u, &mut bytes)?;
            if let Ok(manifest) = serde_json::from_slice(&bytes) {
                update.manifest = manifest;
            }
        }
        _ => {
            if !update.rows.is_empty() {
                let value = u.choose_index(update.rows.len())?;
                update.rows[value] = number;
            }
        }
    }
    Ok(())
}

//! Invalid updates of a serving model. Each must be refused, or the model must still answer.

use arbitrary::{Result, Unstructured};
use hypercast_fm::inference::{self, Serving};
use hypercast_fm::update::{Piece, Update};

use crate::model::{FuzzModel, model};
use crate::world;

/// Changes a real update and applies it to the serving model.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let FuzzModel { served, whole, dir, .. } = model();
    let mut update = Update { whole: u.arbitrary()?, ..whole.clone() };
    for _ in 0..u.int_in_range(1..=4)? {
        change(u, &mut update)?;
    }
    if u.ratio(1, 8)? {
        let made = dir.join("made");
        if update.checkpoint(&made).is_ok() {
            // Loading may fail, because the checkpoint may lack a tensor.
            let _ = inference::load(&made, Serving::default());
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

fn change(u: &mut Unstructured, update: &mut Update) -> Result<()> {
    let size = *u.choose(&[0, 1, 2, 7, 1 << 20, 1 << 40, usize::MAX, usize::MAX / 2 + 1])?;
    let number = *u.choose(&[0.0, -1.0, 1e30, f32::MAX, f32::NAN, f32::INFINITY, 1e-40])?;
    if update.pieces.is_empty() {
        return Ok(());
    }
    let at = u.choose_index(update.pieces.len())?;
    match u.int_in_range(0..=11)? {
        0 => drop(update.pieces.remove(at)),
        1 => update.pieces.push(update.pieces[at].clone()),
        2 => update.pieces[at].start = size,
        3 => {
            let shape = &mut update.pieces[at].shape;
            if !shape.is_empty() && u.arbitrary()? {
                let dim = u.choose_index(shape.len())?;
                shape[dim] = size;
            } else {
                shape.push(size.max(1));
            }
        }
        4 => update.pieces[at].values.truncate(size),
        5 => {
            // Dense weights may be split into pieces of any size.
            let Piece { name, shape, start, values } = update.pieces[at].clone();
            let cut = u.int_in_range(0..=values.len())?;
            let rest = Piece {
                name,
                shape,
                start: start.saturating_add(cut),
                values: values[cut..].into(),
            };
            update.pieces[at].values.truncate(cut);
            update.pieces.push(rest);
        }
        6 => {
            let values = &mut update.pieces[at].values;
            if !values.is_empty() {
                let value = u.choose_index(values.len())?;
                values[value] = number;
            }
        }
        7 => update.pieces[at].name = u.arbitrary::<&str>()?.to_owned(),
        8 => {
            let id = u.arbitrary()?;
            update.ids.push(id);
            if u.arbitrary()? {
                let dim = update.manifest.config.embedding_dim;
                update.rows.extend(std::iter::repeat_n(number, dim));
            }
        }
        9 => {
            let from = u.choose_index(update.ids.len().max(1))?;
            update.removed.extend(update.ids.get(from));
            update.removed.push(u.arbitrary()?);
            if u.arbitrary()? && from < update.ids.len() {
                let dim = update.manifest.config.embedding_dim;
                update.ids.remove(from);
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

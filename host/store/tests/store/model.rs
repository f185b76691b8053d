//! What a store should hold, in a hash map, by the documented formulas.

use std::collections::HashMap;

use hypercast_store::{Adagrad, Store, StoreOptions, StoreReader};

/// Values and accumulator by id.
#[derive(Clone)]
pub struct Model {
    pub rows: HashMap<u64, (Vec<f32>, f32)>,
    /// Knows initial values only; that they do not depend on order has its own test.
    init: std::rc::Rc<std::cell::RefCell<Scratch>>,
}

struct Scratch {
    store: Store,
    _dir: tempfile::TempDir,
}

impl Model {
    pub fn new(options: &StoreOptions) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path(), options).unwrap();
        let init = std::rc::Rc::new(std::cell::RefCell::new(Scratch { store, _dir: dir }));
        Model { rows: HashMap::new(), init }
    }

    pub fn init(&mut self, ids: &[u64]) {
        let store = &mut self.init.borrow_mut().store;
        for &id in ids {
            self.rows.entry(id).or_insert_with(|| {
                let mut values = vec![0.0; store.dim()];
                store.gather_or_init(&[id], &mut values).unwrap();
                (values, 0.0)
            });
        }
    }

    pub fn adagrad(&mut self, ids: &[u64], grads: &[f32], adagrad: &Adagrad) {
        self.init(ids);
        if ids.is_empty() {
            return;
        }
        let dim = grads.len() / ids.len();
        for (id, grad) in ids.iter().zip(grads.chunks(dim)) {
            let (values, state) = self.rows.get_mut(id).unwrap();
            *state += grad.iter().map(|g| g * g).sum::<f32>() / dim as f32;
            let step = adagrad.learning_rate / (state.sqrt() + adagrad.epsilon);
            for (value, g) in values.iter_mut().zip(grad) {
                *value -= step * g;
            }
        }
    }

    /// Panics unless `ids` and `gather` give exactly this, bit for bit.
    pub fn check(
        &self,
        ids: impl Iterator<Item = u64>,
        dim: usize,
        gather: impl Fn(&[u64], &mut [f32]) -> usize,
    ) {
        let ids: Vec<u64> = ids.collect();
        assert_eq!(ids.len(), self.rows.len(), "as many rows");
        let mut out = vec![f32::NAN; ids.len() * dim];
        assert_eq!(gather(&ids, &mut out), 0, "every listed id is found");
        for (id, values) in ids.iter().zip(out.chunks(dim)) {
            let expected = &self.rows.get(id).unwrap_or_else(|| panic!("id {id} is foreign")).0;
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(values), bits(expected), "id {id}");
        }
        let absent = (0..).find(|id| !self.rows.contains_key(id)).unwrap();
        let mut out = vec![f32::NAN; dim];
        assert_eq!(gather(&[absent], &mut out), 1);
        assert_eq!(out, vec![0.0; dim]);
    }

    pub fn check_store(&self, store: &Store) {
        assert_eq!(store.len(), self.rows.len());
        self.check(store.ids(), store.dim(), |ids, out| store.gather(ids, out).unwrap());
    }

    pub fn check_reader(&self, reader: &StoreReader) {
        assert_eq!(reader.len(), self.rows.len());
        self.check(reader.ids(), reader.dim(), |ids, out| reader.gather(ids, out).unwrap());
    }

    /// Panics unless `store` has this optimizer state too, which shows in
    /// the result of a further step. The step is not committed.
    pub fn check_state(&self, store: &mut Store) {
        let mut next = self.clone();
        let ids: Vec<u64> = store.ids().collect();
        let grads = vec![0.5; ids.len() * store.dim()];
        let step = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };
        next.adagrad(&ids, &grads, &step);
        store.adagrad(&ids, &grads, &step).unwrap();
        next.check_store(store);
    }
}

/// Gradients whose squares and sums are exact in f32, in any order of summation.
pub fn exact_grads(rng: &mut impl rand::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-16..=16) as f32 / 8.0).collect()
}

//! Takes a model over to data that has grown: more surfaces, actions, values, tasks or columns.
//!
//! A weight that reads a new column begins at zero, and a new task at its base rate, so the model
//! predicts what it predicted before, and learns the new from there. Rows of the store keep their
//! keys, because every field of a token keeps its number. Optimizer state goes along.
//!
//! A new task is learned without disturbing the main tasks: its own weights learn at once, and what
//! it shares with those follows slowly (`SHARED_LABELS`). Auxiliary tasks of one surface share a
//! hidden layer besides, which a new one of them moves at once. A moving average of the weights
//! takes new weights for young (`ema`).
//!
//! The alignment modules that surfaces' teams declare may also change otherwise, or go: a module
//! whose inputs or size are others, or that no longer predicts a task, begins anew, and so do its
//! moments. The TAE then follows what its tasks say on that surface as slowly as an added task,
//! because a module that knows nothing yet would disturb it. Other surfaces learn those tasks as
//! ever, and nothing else of a model reads the modules, so it predicts what it predicted.
//!
//! Which columns are the same the caller says; see [`SpecGrowth`].

use crate::{
    Result,
    batch::ColumnStatistics,
    checkpoint::{FmManifest, TensorMap},
    example::Example,
    label_scale::LabelScale,
    resume::{MOMENTS, TrainingState},
    row_keys::GROWN_FORMAT,
    spec::{FmSpec, TaskSpec},
    trainer::StepOutput,
    update::{TensorSlice, WeightTensor, WeightUpdate, refused},
};

/// From what models were made for to what data is now. The width of content vectors is not data's
/// to grow: it is that of each model.
#[derive(Debug, Clone, PartialEq)]
pub struct SpecGrowth {
    /// What models were made for. What alignment modules they have each of them says itself.
    pub from: FmSpec,
    /// What the data is now; for a trainer, with the alignment modules that it is to have.
    pub to: FmSpec,
    /// The present index of each of the earlier `Target::features`.
    pub features: Vec<usize>,
    /// The present index of each of the earlier categorical features of users and requests.
    pub profiles: Vec<usize>,
}

/// How the axes of a tensor of rank 2, or the one of a vector, have grown: the present index of
/// each earlier index. `None` is an axis that stayed.
#[derive(Debug, Default)]
struct GrownAxes {
    rows: Option<Vec<usize>>,
    columns: Option<Vec<usize>>,
}

/// The labels of predicted rows, of a task that is new to the model or to a surface's module, after
/// which its whole gradient reaches what tasks share.
const SHARED_LABELS: u64 = 10_000;

impl TrainingState {
    /// `[surfaces][tasks]`: how much of a task's gradient reaches what tasks share. Of a main task
    /// that is the same on all surfaces.
    pub(crate) fn gradient_shares(&self) -> Vec<Vec<f32>> {
        let of_surface = |surface: &String| {
            let realigned = self.realigned_tasks.get(surface);
            let share = |task: &TaskSpec| {
                let realigned = realigned.and_then(|tasks| tasks.get(&task.name));
                let labels = self.added_tasks.get(&task.name).into_iter().chain(realigned).min();
                labels.map_or(1.0, |&labels| labels as f32 / SHARED_LABELS as f32)
            };
            self.spec.tasks.iter().map(share).collect()
        };
        self.spec.surfaces.iter().map(of_surface).collect()
    }

    /// Counts the labels of tasks that are new, until they are as the others. It counts those of
    /// all rows of `examples` that were predicted, also of negatives that no step learns from.
    pub(crate) fn count_added(&mut self, examples: &[&Example], said: &StepOutput) {
        let Self { spec, added_tasks, realigned_tasks, .. } = self;
        let surfaces = examples.iter().flat_map(|example| {
            std::iter::repeat_n(usize::from(example.surface), example.targets.len())
        });
        for (surface, mask) in surfaces.zip(said.mask.chunks_exact(spec.tasks.len())) {
            let mut realigned = realigned_tasks.get_mut(&spec.surfaces[surface]);
            for (task, _) in spec.tasks.iter().zip(mask).filter(|&(_, &known)| known) {
                let realigned = realigned.as_mut().and_then(|tasks| tasks.get_mut(&task.name));
                let counts = added_tasks.get_mut(&task.name).into_iter().chain(realigned);
                counts.for_each(|labels| *labels += 1);
            }
        }
        let is_new = |_: &String, labels: &mut u64| *labels < SHARED_LABELS;
        added_tasks.retain(is_new);
        realigned_tasks.retain(|_, tasks| {
            tasks.retain(is_new);
            !tasks.is_empty()
        });
    }
}

/// The growth that a model of `spec` has to be taken through; none if it is of the present. What
/// only training knew when the model was made tells no layout: a feature may be retired since, and
/// alignment modules may have changed.
pub(crate) fn growth_of(growths: &[SpecGrowth], spec: &FmSpec) -> Option<SpecGrowth> {
    let served = spec.served();
    let growth = |growth: &SpecGrowth| {
        let training_only = spec.training_only.clone();
        let from = FmSpec { content: spec.content, training_only, ..growth.from.served() };
        let to = FmSpec { content: spec.content, ..growth.to.clone() };
        let is_own = from == served && to != *spec;
        is_own.then(|| SpecGrowth { from: spec.clone(), to, ..growth.clone() })
    };
    growths.iter().find_map(growth)
}

impl SpecGrowth {
    /// The tensors of a model of `to`, from those of a model of `from`. `like` are the tensors of a
    /// new model: their shapes, and the values of modules that did not exist.
    pub(crate) fn tensors(&self, dim: usize, old: TensorMap, like: Vec<WeightTensor>) -> TensorMap {
        // A module that is new begins as it was drawn, and what it reads besides at zero.
        self.grown(dim, old, like, |new, is_drawn| match is_drawn {
            true => new,
            false => vec![0.0; new.len()],
        })
    }

    /// The values of `old` at their present places in tensors of the shapes of `like`. `fresh`
    /// gives the others, from the values in `like`, and whether a module is new with them.
    pub(crate) fn grown(
        &self,
        dim: usize,
        mut old: TensorMap,
        like: Vec<WeightTensor>,
        fresh: impl Fn(Vec<f32>, bool) -> Vec<f32>,
    ) -> TensorMap {
        old.retain(|name, _| !self.begins_anew(name));
        let grown = like.into_iter().map(|new| {
            let WeightTensor { name, shape, values } = new;
            let is_alignment = surface_of(&name).is_some();
            let Some((from, earlier)) = old.remove(&name) else {
                return (name, (shape, fresh(values, is_alignment)));
            };
            let Some(places) = self.axes(&name, dim).places(&from, &shape) else {
                // Not a tensor of such a model; what assigns it says so.
                return (name, (from, earlier));
            };
            let mut values = fresh(values, false);
            for (at, value) in earlier.into_iter().enumerate() {
                values[places.of(at)] = value;
            }
            (name, (shape, values))
        });
        grown.collect()
    }

    /// An optimizer's moments of a network of `to`, whose tensors are `like`. Those of new weights
    /// are zeros; a weight without moments still has none.
    pub(crate) fn moments(&self, dim: usize, old: TensorMap, like: Vec<WeightTensor>) -> TensorMap {
        let mut all = TensorMap::new();
        for moment in MOMENTS {
            let of_weight = |(name, tensor): (&String, &(Vec<usize>, Vec<f32>))| {
                let weight = name.strip_suffix(moment)?.strip_suffix('.')?;
                Some((weight.to_owned(), tensor.clone()))
            };
            let mut own: TensorMap = old.iter().filter_map(of_weight).collect();
            own.retain(|weight, _| !self.begins_anew(weight));
            let like = like.iter().filter(|weight| own.contains_key(&weight.name)).cloned();
            let like = like.collect();
            let grown = self.tensors(dim, own, like);
            all.extend(grown.into_iter().map(|(name, of)| (format!("{name}.{moment}"), of)));
        }
        all
    }

    /// Takes the state of a training over.
    pub(crate) fn training(&self, state: &mut TrainingState) {
        self.statistics(&mut state.statistics);
        self.alignment_statistics(&mut state.statistics);
        state.field_numbers = self.field_numbers(&state.field_numbers);
        state.format = grown_format(state.format, &state.field_numbers);
        let added = self.to.tasks.iter().filter(|task| self.is_added(&task.name));
        state.added_tasks.extend(added.map(|task| (task.name.clone(), 0)));
        state.added_tasks.retain(|name, _| self.to.tasks.iter().any(|task| task.name == *name));
        for surface in (0..self.from.surfaces.len()).filter(|&own| !self.keeps_alignment(own)) {
            let tasks = aligned_tasks(&self.to, surface).into_iter();
            let valid = tasks.filter(|task| task.surfaces[surface]);
            let counts = valid.map(|task| (task.name.clone(), 0)).collect();
            state.realigned_tasks.insert(self.to.surfaces[surface].clone(), counts);
        }
        state.moment_steps.retain(|weight, _| !self.begins_anew(weight));
        state.spec = self.to.clone();
    }

    /// Takes a manifest over.
    pub(crate) fn manifest(&self, manifest: &mut FmManifest) {
        self.statistics(&mut manifest.statistics);
        manifest.field_numbers = self.field_numbers(&manifest.field_numbers);
        manifest.format = grown_format(manifest.format, &manifest.field_numbers);
        manifest.spec = self.to.clone();
    }

    /// Takes an update over, so that a model which was taken over can apply it. `like` are that
    /// model's tensors.
    ///
    /// # Errors
    /// A slice that is not of a model of `from`.
    pub(crate) fn update(&self, update: &mut WeightUpdate, like: &TensorMap) -> Result<()> {
        let dim = update.manifest.config.embedding_dim;
        if update.complete {
            let like = like.iter().map(|(name, (shape, values))| WeightTensor {
                name: name.clone(),
                shape: shape.clone(),
                values: vec![0.0; values.len()],
            });
            let tensors = self.tensors(dim, update.tensors()?, like.collect());
            let whole = |(name, (shape, values))| TensorSlice { name, shape, start: 0, values };
            update.dense = tensors.into_iter().map(whole).collect();
        } else {
            let slices = std::mem::take(&mut update.dense);
            for slice in slices {
                let Some((shape, _)) = like.get(&slice.name) else {
                    return refused(format!("the model has no tensor {}", slice.name));
                };
                let Some(places) = self.axes(&slice.name, dim).places(&slice.shape, shape) else {
                    let TensorSlice { name, shape, .. } = slice;
                    return refused(format!("{name} of shape {shape:?} is of no earlier model"));
                };
                update.dense.extend(runs(&slice, shape, &places));
            }
        }
        self.manifest(&mut update.manifest);
        Ok(())
    }

    /// The numbers of the fields of a grown model: of earlier fields what they had, and of new ones
    /// the next that are free. Empty if each is the field's index.
    fn field_numbers(&self, earlier: &[u8]) -> Vec<u8> {
        let count = |spec: &FmSpec| spec.token_fields() + spec.profile_fields();
        let (was, is) = (count(&self.from), count(&self.to));
        let number = |at: usize| earlier.get(at).copied().unwrap_or(at as u8);
        let mut numbers: Vec<Option<u8>> = vec![None; is];
        for (at, place) in self.fields().into_iter().enumerate() {
            numbers[place] = Some(number(at));
        }
        let first_free = (0..was).map(number).max().map_or(0, |last| usize::from(last) + 1);
        let mut free = first_free..;
        let numbers = numbers
            .into_iter()
            .map(|known| known.unwrap_or_else(|| free.next().map_or(0, |next| next as u8)));
        let numbers: Vec<u8> = numbers.collect();
        let is_index = numbers.iter().enumerate().all(|(at, &number)| at == usize::from(number));
        if is_index { Vec::new() } else { numbers }
    }

    /// The present index of each earlier field: those of tokens, then the profile's.
    fn fields(&self) -> Vec<usize> {
        let profile = self.profiles.iter().map(|&place| self.to.token_fields() + place);
        self.token_fields().into_iter().chain(profile).collect()
    }

    /// The present index of each earlier field of a token. The last three are of the event.
    fn token_fields(&self) -> Vec<usize> {
        let (was, is) = (self.from.token_fields(), self.to.token_fields());
        (0..was - 3).chain(is - 3..is).collect()
    }

    /// The present index of each earlier number of an item.
    fn item_numbers(&self) -> Vec<usize> {
        let (from, to) = (&self.from, &self.to);
        let place = |feature| to.item_optional.iter().position(|other| other == feature);
        let flags = from.item_optional.iter().filter_map(place);
        (0..from.item_dense).chain(flags.map(|flag| to.item_dense + flag)).collect()
    }

    fn is_added(&self, task: &str) -> bool {
        self.from.tasks.iter().all(|earlier| earlier.name != task)
    }

    fn statistics(&self, statistics: &mut ColumnStatistics) {
        let fresh = ColumnStatistics::new(&self.to).labels;
        let rate = LabelScale::of_rate_beside(&statistics.labels);
        statistics.labels.extend(fresh.into_iter().filter(|(name, _)| self.is_added(name)).map(
            |(name, scale)| match scale {
                LabelScale::Rate(_) => (name, rate.clone()),
                value => (name, value),
            },
        ));
        let numbers = self.item_numbers();
        statistics.item_dense = statistics.item_dense.grown(&numbers, self.to.item_numbers());
        statistics.features = statistics.features.grown(&self.features, self.to.features);
    }

    /// The same of what only trainers have: tasks that surfaces have taken out of their alignment
    /// modules, and the columns of those.
    fn alignment_statistics(&self, statistics: &mut ColumnStatistics) {
        statistics.labels.retain(|name, _| self.to.tasks.iter().any(|task| task.name == *name));
        let fresh = ColumnStatistics::new(&self.to).alignments;
        let is_kept = |name: &String| {
            let surface = self.to.surfaces.iter().position(|surface| surface == name);
            surface.is_some_and(|surface| self.keeps_alignment(surface))
        };
        statistics.alignments.retain(|name, _| is_kept(name));
        fresh.into_iter().for_each(|(surface, fresh)| {
            statistics.alignments.entry(surface).or_insert(fresh);
        });
    }

    /// Whether a surface's alignment module of before is of use now.
    fn keeps_alignment(&self, surface: usize) -> bool {
        let Some(name) = self.from.surfaces.get(surface) else { return false };
        let alignments = [&self.from, &self.to].map(|spec| spec.alignments.get(name));
        match alignments {
            [None, None] => true,
            [Some(was), Some(is)] => {
                let now = aligned_tasks(&self.to, surface);
                let is_predicted = |task: &&TaskSpec| now.iter().any(|now| now.name == task.name);
                let mut before = aligned_tasks(&self.from, surface).into_iter();
                was.has_inputs_and_size_of(is) && before.all(|task| is_predicted(&task))
            }
            _ => false,
        }
    }

    /// Whether a tensor is of an alignment module that begins anew.
    fn begins_anew(&self, name: &str) -> bool {
        surface_of(name).is_some_and(|surface| !self.keeps_alignment(surface))
    }

    /// How a tensor of the model or of a whole network has grown.
    fn axes<'a>(&'a self, name: &str, dim: usize) -> GrownAxes {
        let rows = |rows| GrownAxes { rows: Some(rows), columns: None };
        let columns = |was: Vec<&TaskSpec>, now: Vec<&TaskSpec>| {
            let place = |task: &TaskSpec| now.iter().position(|other| other.name == task.name);
            GrownAxes { rows: None, columns: was.into_iter().map(place).collect() }
        };
        if let Some(surface) = surface_of(name) {
            return match name.rsplit_once(".hidden.weight") {
                Some(_) => GrownAxes { rows: self.alignment_rows(surface, dim), columns: None },
                None if name.contains(".output.") => {
                    let tasks = |spec| aligned_tasks(spec, surface);
                    columns(tasks(&self.from), tasks(&self.to))
                }
                None => GrownAxes::default(),
            };
        }
        match name.strip_prefix("model.").unwrap_or(name) {
            "token_hidden.weight" => rows(self.token_rows(dim)),
            "outcome.weight" => rows(self.outcome_rows()),
            "candidate.hidden.weight" | "candidate.direct.weight" => rows(self.candidate_rows(dim)),
            "head.output.weight" | "head.output.bias" | "head.direct.weight" => {
                let tasks = |spec: &'a FmSpec| spec.main_tasks().iter().collect();
                columns(tasks(&self.from), tasks(&self.to))
            }
            _ => GrownAxes::default(),
        }
    }

    fn token_rows(&self, dim: usize) -> Vec<usize> {
        let (from, to) = (&self.from, &self.to);
        let dense = to.token_fields() * dim;
        let content = dense + to.item_numbers();
        wide(&self.token_fields(), dim)
            .chain(self.item_numbers().into_iter().map(|place| dense + place))
            .chain(content..content + from.content)
            .collect()
    }

    fn outcome_rows(&self) -> Vec<usize> {
        let values = 2 * self.to.actions;
        (0..2 * self.from.actions).chain(values..values + 2 * self.from.values).collect()
    }

    fn candidate_rows(&self, dim: usize) -> Vec<usize> {
        let profiles = wide(&self.profiles, dim).map(|row| self.to.features + row);
        self.features.iter().copied().chain(profiles).collect()
    }

    /// The TAE's rows come first; their number is what is left, and none of them moves. A module
    /// with numeric columns of its own has rows for nothing else of the model.
    fn alignment_rows(&self, surface: usize, dim: usize) -> Option<Vec<usize>> {
        let own = self.to.alignment(surface as u16);
        if own.is_some_and(|own| own.features.is_some()) {
            return None;
        }
        let embedded = own.map_or(0, |own| own.ids.len() * dim);
        let embedded = self.to.features..self.to.features + embedded;
        Some(self.features.iter().copied().chain(embedded).collect())
    }
}

/// How the tensors of the alignment modules begin in a network, before the index of the surface.
const ALIGNMENTS: &str = "alignments.modules.";

/// The surface of whose alignment module a tensor of a network is.
fn surface_of(name: &str) -> Option<usize> {
    name.strip_prefix(ALIGNMENTS)?.split('.').next()?.parse().ok()
}

/// The tasks that a surface's alignment module predicts.
fn aligned_tasks(spec: &FmSpec, surface: usize) -> Vec<&TaskSpec> {
    spec.aligned_tasks(surface as u16).into_iter().map(|task| &spec.tasks[task]).collect()
}

/// The indices of blocks of `dim` at `places`.
fn wide(places: &[usize], dim: usize) -> impl Iterator<Item = usize> + '_ {
    places.iter().flat_map(move |&place| place * dim..(place + 1) * dim)
}

/// Builds of before field numbers would read other rows than the model's, and refuse the format.
/// A model of format 1 keeps it, because it also says how the keys are made: such a build must not
/// read it.
fn grown_format(format: u32, field_numbers: &[u8]) -> u32 {
    if field_numbers.is_empty() || format < 2 { format } else { GROWN_FORMAT }
}

/// The present places of the values of a tensor.
struct GrownPlaces {
    rows: Vec<usize>,
    columns: Vec<usize>,
    width: usize,
}

impl GrownPlaces {
    /// The present flat index of the value that had the flat index `at`.
    fn of(&self, at: usize) -> usize {
        let (row, column) = (at / self.columns.len(), at % self.columns.len());
        self.rows[row] * self.width + self.columns[column]
    }
}

impl GrownAxes {
    /// The places in a tensor of shape `to` of the values of one of shape `from`; `None` if it has
    /// not grown from that.
    fn places(&self, from: &[usize], to: &[usize]) -> Option<GrownPlaces> {
        let (was, is) = match (from, to) {
            ([was], [is]) => ([1, *was], [1, *is]),
            ([rows, columns], [now_rows, now_columns]) => {
                ([*rows, *columns], [*now_rows, *now_columns])
            }
            _ => return None,
        };
        let along = |map: &Option<Vec<usize>>, axis: usize| -> Option<Vec<usize>> {
            let (was, is): (usize, usize) = (was[axis], is[axis]);
            let Some(map) = map else { return (was == is).then(|| (0..is).collect()) };
            // What stands before the mapped indices stays.
            let kept = was.checked_sub(map.len()).filter(|_| was <= is)?;
            let places: Vec<usize> =
                (0..kept).chain(map.iter().map(|place| kept + place)).collect();
            places.iter().all(|&place| place < is).then_some(places)
        };
        let (rows, columns) = (along(&self.rows, 0)?, along(&self.columns, 1)?);
        Some(GrownPlaces { rows, columns, width: is[1] })
    }
}

/// A slice at its present places, as slices of what stayed together.
fn runs(slice: &TensorSlice, shape: &[usize], places: &GrownPlaces) -> Vec<TensorSlice> {
    let mut runs: Vec<TensorSlice> = Vec::new();
    for (at, &value) in (slice.start..).zip(&slice.values) {
        let place = places.of(at);
        match runs.last_mut().filter(|run| run.start + run.values.len() == place) {
            Some(run) => run.values.push(value),
            None => runs.push(TensorSlice {
                name: slice.name.clone(),
                shape: shape.to_vec(),
                start: place,
                values: vec![value],
            }),
        }
    }
    runs
}

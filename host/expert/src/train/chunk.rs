//! Requests that a trainer is given together, with what the FM says of them.

use std::ops::Range;

use hypercast_data::ranked_place::RankedPlace;
use hypercast_fm::example::Example;

use super::hooks::TrainingRequest;
use crate::Error;

/// Examples with their TAEs, as in a feature log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chunk<'a> {
    /// Requests with at least one target each.
    pub examples: &'a [Example],
    /// `[targets, tae_dim]` over all examples, in order; empty without an FM.
    pub tae: &'a [f32],
    /// `[targets, main tasks]`, the FM's own predictions, in the schema's order of main tasks. NaN
    /// where there is none; empty for none at all.
    pub predictions: &'a [f32],
    /// `[targets]`, where each was ranked before it was shown; empty if nothing is known of any.
    pub ranked: &'a [Option<RankedPlace>],
}

/// What an expert's training reads of the FM.
#[derive(Clone, Copy)]
pub(super) struct FmNeeds<'n> {
    /// The expert's name, for messages.
    pub(super) name: &'n str,
    /// The TAE's width; 0 if it is not read.
    pub(super) tae_dim: usize,
    /// The number of main tasks; 0 if no prediction is read.
    pub(super) tasks: usize,
}

impl<'a> Chunk<'a> {
    /// The requests that have targets, all kept, with what is needed of the FM.
    ///
    /// # Errors
    /// The chunk lacks it.
    pub(super) fn requests(self, needs: FmNeeds) -> Result<Vec<TrainingRequest<'a>>, Error> {
        let FmNeeds { name, tae_dim, .. } = needs;
        let targets: usize = self.examples.iter().map(|example| example.targets.len()).sum();
        if tae_dim > 0 && self.tae.len() != targets * tae_dim {
            let have = self.tae.len();
            let why = format!(
                "the log has {have} TAE values for {targets} targets, which need {tae_dim} each"
            );
            return Err(Error::misfit(name, why));
        }
        let mut start = 0;
        let request = |(index, example): (usize, &'a Example)| {
            let rows = start..start + example.targets.len();
            start = rows.end;
            Ok(TrainingRequest {
                example,
                tae: if tae_dim > 0 { &self.tae[cells(&rows, tae_dim)] } else { &[] },
                predictions: self.predictions_of(example, &rows, needs)?,
                ranked: self.ranked.get(rows.clone()).unwrap_or_default(),
                index,
                row: rows.start,
                kept: true,
            })
        };
        let requests = self.examples.iter().enumerate().map(request);
        let has_targets = |request: &Result<TrainingRequest, Error>| {
            request.as_ref().map_or(true, |request| !request.example.targets.is_empty())
        };
        requests.filter(has_targets).collect()
    }

    /// The FM's predictions for a request's rows, if they are needed. Logs of before are refused:
    /// the expert would learn from what it is not served with. Those of before a task was added
    /// have the predictions of the others.
    fn predictions_of(
        self,
        example: &Example,
        rows: &Range<usize>,
        FmNeeds { name, tasks, .. }: FmNeeds,
    ) -> Result<&'a [f32], Error> {
        let own = self.predictions.get(cells(rows, tasks)).unwrap_or_default();
        if tasks > 0 && !rows.is_empty() && own.iter().all(|prediction| prediction.is_nan()) {
            let request = example.request;
            let why = format!(
                "it reads the FM's predictions (`fm-logit`), and the log has none of request \
                 {request}: make the logs anew (`hypercast train fm`, or `hypercast materialise` \
                 for what its checkpoint has not learned from)"
            );
            return Err(Error::misfit(name, why));
        }
        Ok(own)
    }
}

/// Where rows of `width` values are.
fn cells(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

//! Inputs that are hidden from an arm of an experiment: the host removes parts of requests and of
//! their logs before a foundation model or an expert reads them, so that no arm needs a model or
//! plugin of its own.

use std::{borrow::Cow, sync::Arc};

use hypercast_data::logs::LoggedRequest;
use hypercast_fm::example::{Example, Item};

/// What is hidden; nothing by default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InputMask {
    /// Of the logged embeddings.
    pub tae: TaeMask,
    /// Of the users' past events.
    pub history: HistoryMask,
    /// The content vectors of candidates, for experts; an FM without them is made for none.
    pub content: bool,
    /// Numeric columns by place, which are 0 in each row instead.
    pub features: Vec<usize>,
}

/// What is hidden of the logged embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TaeMask {
    /// Nothing.
    #[default]
    Nothing,
    /// What it tells: each row has the same one. An expert still knows that the FM answered, and
    /// reads its predictions.
    Values,
    /// All of it: each row has zeros, as where the FM did not answer.
    All,
}

/// What is hidden of the users' past events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HistoryMask {
    /// Nothing.
    #[default]
    Nothing,
    /// Impressions that no action followed.
    Negatives,
    /// All events.
    All,
}

impl InputMask {
    /// Hides it of a request.
    pub fn hide(&self, example: &mut Example) {
        match self.history {
            HistoryMask::Nothing => {}
            HistoryMask::Negatives => {
                example.history.retain(|event| event.outcome.has_action());
            }
            HistoryMask::All => example.history.clear(),
        }
        for target in &mut example.targets {
            for &at in &self.features {
                target.features[at] = 0.0;
            }
            if self.content && !target.item.content.is_empty() {
                let content = Item::default().content;
                target.item = Arc::new(Item { content, ..(*target.item).clone() });
            }
        }
    }

    /// Hides it of a request that was logged.
    pub fn hide_of_log(&self, logged: &mut LoggedRequest) {
        self.hide(&mut logged.example);
        match self.tae {
            TaeMask::Nothing => {}
            TaeMask::Values => logged.tae.fill(1.0),
            TaeMask::All => logged.tae.fill(0.0),
        }
    }

    /// Some requests without it.
    pub fn hidden<'a>(&self, examples: &'a [Example]) -> Cow<'a, [Example]> {
        if *self == InputMask::default() {
            return examples.into();
        }
        let mut examples = examples.to_vec();
        examples.iter_mut().for_each(|example| self.hide(example));
        examples.into()
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example::{Event, Outcome, Target, User};

    use super::*;

    #[test]
    fn what_is_hidden_is_gone_and_the_rest_stays() {
        let item = Arc::new(Item { content: [0.6, 0.8].into(), ..Item::default() });
        let event = |actions: u64, known: u64| Event {
            item: item.clone(),
            surface: 0,
            time_ms: 5,
            outcome: Outcome { actions, known, ..Outcome::UNKNOWN },
        };
        let target = Target {
            item: item.clone(),
            ids: vec![1, 2],
            features: vec![3.0, 4.0, 5.0],
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        };
        let example = Example {
            request: 1,
            user: Arc::new(User::default()),
            surface: 0,
            time_ms: 9,
            history: vec![event(0b01, 0b11), event(0b00, 0b11), event(0b10, 0b01)],
            targets: vec![target],
        };
        let logged = LoggedRequest {
            example,
            tae: vec![0.5; 4],
            predictions: vec![0.1],
            ranked: Vec::new(),
            correction: false,
            ingested_ms: 0,
        };
        let seen = |mask: InputMask| {
            let mut own = logged.clone();
            mask.hide_of_log(&mut own);
            assert_eq!(own.predictions, [0.1]);
            let Target { item, ids, features, .. } = own.example.targets.remove(0);
            assert_eq!(ids, [1, 2]);
            (own.example.history.len(), features, item.content.len(), own.tae)
        };
        let whole = (3, vec![3.0, 4.0, 5.0], 2, vec![0.5; 4]);
        assert_eq!(seen(InputMask::default()), whole);
        let history = |history| InputMask { history, ..InputMask::default() };
        assert_eq!(seen(history(HistoryMask::Negatives)), (1, whole.1.clone(), 2, whole.3.clone()));
        assert_eq!(seen(history(HistoryMask::All)).0, 0);
        let tae = |tae| seen(InputMask { tae, ..InputMask::default() }).3;
        assert_eq!(tae(TaeMask::Values), [1.0; 4]);
        assert_eq!(tae(TaeMask::All), [0.0; 4]);
        let rest = InputMask { content: true, features: vec![0, 2], ..InputMask::default() };
        assert_eq!(seen(rest), (3, vec![0.0, 4.0, 0.0], 0, vec![0.5; 4]));
    }
}

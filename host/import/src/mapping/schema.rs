//! The schema that a mapping makes, and the rules that a mapping must satisfy.

use hypercast_data::schema::{Feature, FeatureKind, Schema, ValueRange};

use super::source::logarithm;
use super::{EntityMapping, FeatureDefault, FeatureMapping, ImpressionMapping, Mapping};
use crate::error::{CommonErrors as _, Error, Result};

impl Mapping {
    /// The schema of the data set that the mapping makes, with the ranges that it names.
    ///
    /// # Errors
    /// The mapping or the schema contradicts itself; the error names the entry.
    pub fn schema(&self) -> Result<Schema> {
        self.impressions.check()?;
        self.check_surfaces()?;
        for action in &self.actions {
            if action.range().is_some() && !action.one_of.is_empty() {
                let reason = "it has one_of beside at_least or at_most";
                return fail(&format!("action `{}`", action.name), reason);
            }
        }
        let entities = [&self.items, &self.users].into_iter().flatten();
        let features = self.context_features.iter().chain(entities.flat_map(|of| &of.features));
        features.clone().try_for_each(FeatureMapping::check)?;
        if self.users.as_ref().is_some_and(|users| users.name.is_some()) {
            return fail("users", "only items have a `name`");
        }
        let of_values = self.values.iter().map(|value| (&value.name, value.clip));
        let clips = of_values.chain(features.map(|feature| (&feature.name, feature.stored_clip())));
        let range = |(name, clip): (&String, Option<[f32; 2]>)| {
            clip.map(|[low, high]| ValueRange::new(name, low, high))
        };
        let schema = Schema {
            surfaces: self.surfaces.clone(),
            actions: self.actions.iter().map(|action| action.name.clone()).collect(),
            values: self.values.iter().map(|value| value.name.clone()).collect(),
            tasks: self.tasks.clone(),
            item_features: features_of(self.items.as_ref()),
            user_features: features_of(self.users.as_ref()),
            context_features: self.context_features.iter().map(FeatureMapping::feature).collect(),
            counters: self.counters.clone(),
            ids: self.ids,
            retired: Vec::new(),
            owned: Default::default(),
            alignment: Default::default(),
            earlier: Vec::new(),
            ranges: clips.filter_map(range).collect(),
        };
        schema.validate()?;
        Ok(schema)
    }

    fn check_surfaces(&self) -> Result<()> {
        let ImpressionMapping { surface, surface_map, surface_default, .. } = &self.impressions;
        if surface.is_none() && self.surfaces.len() > 1 {
            let reason = "there are several surfaces; name the column `surface` that says which";
            return fail("impressions", reason);
        }
        for to in surface_map.values().chain(surface_default) {
            if !self.surfaces.contains(to) {
                let has = self.surfaces.join(", ");
                return fail(
                    "impressions",
                    &format!("no surface is called `{to}`; there are {has}"),
                );
            }
        }
        Ok(())
    }
}

impl ImpressionMapping {
    fn check(&self) -> Result<()> {
        let place = "impressions";
        if self.request.is_none() && self.request_within_s.is_none() {
            let reason = "nothing says which rows are one request; name the column `request`, or \
                          set `request_within_s` to the seconds within which rows of a user and \
                          surface are one";
            return fail(place, reason);
        }
        if self.outcome_time.is_none() && self.outcome_delay_s.is_none() {
            let reason = "nothing says when an outcome was known, and models must not see it \
                          before; name the column `outcome_time`, or set `outcome_delay_s`";
            return fail(place, reason);
        }
        if self.request_rows == Some(0) {
            return fail(place, "request_rows is 0; a request has at least one row");
        }
        let seconds = [
            ("request_within_s", self.request_within_s),
            ("outcome_delay_s", self.outcome_delay_s),
        ];
        for (name, seconds) in seconds {
            if seconds.is_some_and(|seconds| !(0.0..1e9).contains(&seconds)) {
                return fail(place, &format!("{name} is no number of seconds from 0 on"));
            }
        }
        Ok(())
    }
}

impl FeatureMapping {
    fn feature(&self) -> Feature {
        let FeatureMapping { optional, max_values, training_only, .. } = *self;
        Feature { optional, max_values, training_only, ..Feature::new(&self.name, self.kind) }
    }

    /// The bounds of what is stored. Those of a logarithm are said of its number.
    fn stored_clip(&self) -> Option<[f32; 2]> {
        self.clip.map(|bounds| if self.log { bounds.map(logarithm) } else { bounds })
    }

    fn check(&self) -> Result<()> {
        let place = format!("feature `{}`", self.name);
        match (self.kind, &self.default) {
            (FeatureKind::Categorical, _) if self.clip.is_some() => {
                fail(&place, "a category cannot be clipped")
            }
            (FeatureKind::Categorical, _) if self.log => {
                fail(&place, "a category has no logarithm")
            }
            (FeatureKind::Dense, _) if !self.map.is_empty() => {
                fail(&place, "`map` is for categories")
            }
            _ if self.list.is_some() && self.max_values.is_some() => {
                fail(&place, "it has `max_values` beside `list`; one of them says what is taken")
            }
            _ if self.separator.is_some() && self.list.is_none() && self.max_values.is_none() => {
                let reason = "`separator` is for a list; say with `max_values` or `list` what is \
                              taken of it";
                fail(&place, reason)
            }
            (FeatureKind::Dense, Some(FeatureDefault::Text(text))) => {
                fail(&place, &format!("its default `{text}` is not a number"))
            }
            _ => Ok(()),
        }
    }
}

fn features_of(entity: Option<&EntityMapping>) -> Vec<Feature> {
    entity.into_iter().flat_map(|entity| &entity.features).map(FeatureMapping::feature).collect()
}

fn fail<T>(place: &str, reason: &str) -> Result<T> {
    Err(Error::invalid(format!("{place}: {reason}")))
}

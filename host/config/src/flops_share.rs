//! What an expert's network may cost, as a share of the one-stage model that it stands for.

use std::fmt;

use crate::{PluginLimits, check};

/// The network of an expert beside a one-stage model, in floating-point operations a candidate (see
/// [`hypercast_fm::cost::one_stage_flops`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlopsShare {
    /// Of the expert's network.
    pub network: u64,
    /// Of the one-stage model.
    pub one_stage: u64,
}

/// A network that costs more than its surfaces allow: the figures, and the key that allows more.
#[derive(Debug, Clone, PartialEq)]
pub struct OverFlopsShare {
    cost: FlopsShare,
    most: f64,
    key: String,
}

impl FlopsShare {
    /// The network's cost as a fraction of the one-stage model's.
    pub fn share(self) -> f64 {
        self.network as f64 / self.one_stage.max(1) as f64
    }
}

impl OverFlopsShare {
    /// Why a new version is refused, with what its author and operators do.
    pub fn refusal(&self) -> String {
        format!(
            "{self}. Its author makes the network smaller (`cargo hypercast check` shows what each \
             layer holds); operators raise that key if the surface is worth it, or one surface's \
             alone (plugin_limits.surface_flops_share), and restart the daemon or trainer that \
             refused it. Until then the version of before serves, or the FM's ranking answers"
        )
    }
}

/// As `its network takes 81498 FLOPs a candidate, 83.1 % of ...`.
impl fmt::Display for OverFlopsShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OverFlopsShare { cost, most, key } = self;
        let FlopsShare { network, one_stage } = cost;
        let (share, most) = (cost.share() * 100.0, most * 100.0);
        write!(
            f,
            "its network takes {network} FLOPs a candidate, {share:.1} % of the {one_stage} of a \
             one-stage model of its FM's size, more than the {most:.1} % of {key}"
        )
    }
}

impl PluginLimits {
    /// Checks what an expert costs that serves `surfaces`: the strictest of them decides.
    ///
    /// # Errors
    /// It costs more.
    pub fn check_flops_share(
        &self,
        surfaces: &[String],
        cost: FlopsShare,
    ) -> Result<(), OverFlopsShare> {
        let (most, key) = self.flops_share_of(surfaces);
        if cost.share() <= most { Ok(()) } else { Err(OverFlopsShare { cost, most, key }) }
    }

    /// The share that an expert of `surfaces` may have, and the key that says it.
    pub fn flops_share_of(&self, surfaces: &[String]) -> (f64, String) {
        let of_all = || (self.max_flops_share, "plugin_limits.max_flops_share".to_owned());
        let of = |surface: &String| match self.surface_flops_share.get(surface) {
            Some(share) => (*share, format!("plugin_limits.surface_flops_share.{surface}")),
            None => of_all(),
        };
        let strictest = surfaces.iter().map(of).min_by(|(a, _), (b, _)| a.total_cmp(b));
        strictest.unwrap_or_else(of_all)
    }

    pub(super) fn validate_flops_shares(&self) -> Result<(), String> {
        let valid = |share: f64, key: &str| {
            check(
                share > 0.0 && share.is_finite(),
                key,
                share,
                "above 0; 1 is as much as that model",
            )
        };
        valid(self.max_flops_share, "plugin_limits.max_flops_share")?;
        let of_surfaces = self.surface_flops_share.iter();
        of_surfaces.into_iter().try_for_each(|(surface, share)| {
            valid(*share, &format!("plugin_limits.surface_flops_share.{surface}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strictest_of_its_surfaces_decides_and_the_refusal_names_its_key() {
        let surface_flops_share = [("search".to_owned(), 0.6), ("feed".to_owned(), 0.2)].into();
        let limits = PluginLimits { surface_flops_share, ..PluginLimits::default() };
        let check = |surfaces: &[&str], network: u64| {
            let surfaces: Vec<String> = surfaces.iter().map(|&name| name.to_owned()).collect();
            let over = limits.check_flops_share(&surfaces, FlopsShare { network, one_stage: 1000 });
            over.map_err(|over| over.to_string())
        };
        assert_eq!(check(&["search"], 600), Ok(()), "more than others may have");
        assert_eq!(check(&["stories"], 400), Ok(()), "40 % by default");
        assert_eq!(check(&[], 400), Ok(()), "of any surface");
        for (surfaces, network, key) in [
            (
                &["search"][..],
                601,
                "60.1 % of the 1000 of a one-stage model of its FM's size, more than the 60.0 % of \
                 plugin_limits.surface_flops_share.search",
            ),
            (&["stories"], 401, "more than the 40.0 % of plugin_limits.max_flops_share"),
            (&["search", "stories"], 401, "plugin_limits.max_flops_share"),
            (&["search", "feed"], 201, "plugin_limits.surface_flops_share.feed"),
            (&[], 401, "plugin_limits.max_flops_share"),
        ] {
            let why = check(surfaces, network).unwrap_err();
            assert!(why.ends_with(key), "{why}");
        }
    }

    #[test]
    fn a_share_that_allows_nothing_is_refused_by_key() {
        let all = PluginLimits { max_flops_share: 0.0, ..PluginLimits::default() };
        let own = [("feed".to_owned(), f64::NAN)].into();
        let own = PluginLimits { surface_flops_share: own, ..PluginLimits::default() };
        for (limits, key) in [(all, "max_flops_share"), (own, "surface_flops_share.feed")] {
            let why = limits.validate_flops_shares().unwrap_err();
            assert!(why.contains(&format!("plugin_limits.{key} is ")), "{why}");
        }
    }
}

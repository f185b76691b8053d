//! Times of contenders that do the same work, taken in turns, so that other load on the machine
//! affects all of them alike.

use std::{hint::black_box, time::Instant};

use hypercast_core::quantile::quantile;

use super::BenchReport;
use crate::error::Result;

/// Does the work, and adds the seconds that it took.
pub type Contender<'a> = Box<dyn FnMut(&mut Vec<f64>) -> Result<()> + 'a>;

/// A contender that ours is compared with.
pub struct Rival<'a> {
    /// The rival's name in figures.
    pub name: &'static str,
    /// Runs once and adds its seconds to a list.
    pub run: Contender<'a>,
}

/// A contender that does `work` twice and counts the second run: the first warms up memory and
/// threads that another contender left cold.
pub fn timed<'a, T>(mut work: impl FnMut() -> Result<T> + 'a) -> Contender<'a> {
    Box::new(move |times_s| {
        black_box(work()?);
        let start = Instant::now();
        black_box(work()?);
        times_s.push(start.elapsed().as_secs_f64());
        Ok(())
    })
}

/// The unit of a figure, and how seconds become one.
pub struct Scale<F> {
    /// As the report prints it.
    pub unit: &'static str,
    /// The figure of a number of seconds.
    pub of_seconds: F,
}

/// Figures in milliseconds of time.
pub const MS: Scale<fn(f64) -> f64> = Scale { unit: "ms", of_seconds: |s| s * 1e3 };

/// Figures in microseconds of time.
pub const US: Scale<fn(f64) -> f64> = Scale { unit: "us", of_seconds: |s| s * 1e6 };

impl BenchReport {
    /// Times ours and its rivals in `runs` turns, after one that warms up, and adds a figure once
    /// for each rival; alone without rivals. It is a contender's median
    /// seconds in `scale`; the medians themselves are returned.
    ///
    /// # Errors
    /// Those of the contenders.
    pub fn race<'a>(
        &mut self,
        name: &str,
        scale: Scale<impl Fn(f64) -> f64>,
        runs: usize,
        ours: Contender<'a>,
        rivals: Vec<Rival<'a>>,
    ) -> Result<Vec<f64>> {
        let Scale { unit, of_seconds } = scale;
        let names: Vec<&str> = rivals.iter().map(|rival| rival.name).collect();
        let theirs = rivals.into_iter().map(|rival| rival.run);
        let mut contenders: Vec<_> = std::iter::once(ours).chain(theirs).collect();
        let mut times_s = vec![Vec::new(); contenders.len()];
        for run in 0..=runs {
            for (times_s, contender) in times_s.iter_mut().zip(&mut contenders) {
                if run == 1 {
                    times_s.clear();
                }
                contender(times_s)?;
            }
        }
        let medians_s: Vec<f64> =
            times_s.into_iter().map(|mut times_s| quantile(&mut times_s, 0.5)).collect();
        let own = of_seconds(medians_s[0]);
        if names.is_empty() {
            self.figure(name, own, unit);
        }
        for (rival, theirs_s) in names.into_iter().zip(&medians_s[1..]) {
            self.versus(name, own, unit, rival, of_seconds(*theirs_s));
        }
        Ok(medians_s)
    }
}

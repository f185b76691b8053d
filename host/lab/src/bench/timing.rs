//! Times of contenders that do the same work, taken in turns, so that other load on the machine
//! affects all of them alike.

use std::time::Instant;

use hypercast_core::quantile::quantile;

/// Does the work and returns the seconds that it took.
pub type Contender<'a> = Box<dyn FnMut() -> f64 + 'a>;

/// A contender that does `work` twice and counts the second run: the first warms up memory and
/// threads that another contender left cold.
pub fn timed<'a>(mut work: impl FnMut() + 'a) -> Contender<'a> {
    Box::new(move || {
        work();
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    })
}

/// The median seconds of each contender over `runs` turns.
pub fn medians_s(runs: usize, contenders: &mut [Contender<'_>]) -> Vec<f64> {
    let mut times_s = vec![Vec::with_capacity(runs); contenders.len()];
    for _ in 0..runs {
        for (times_s, contender) in times_s.iter_mut().zip(contenders.iter_mut()) {
            times_s.push(contender());
        }
    }
    times_s.into_iter().map(|mut times_s| quantile(&mut times_s, 0.5)).collect()
}

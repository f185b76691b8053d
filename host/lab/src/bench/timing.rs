//! Times of things that do the same work, taken in turns, so that what else the
//! machine does meets all of them alike. Each run that counts follows one that does
//! not, so that no contender pays for the memory and the threads that another left cold.

use std::time::Instant;

use hypercast_core::quantile::quantile;

/// Something to time.
pub type Contender<'a> = Box<dyn FnMut() + 'a>;

/// The median seconds of each.
pub fn medians_s(runs: usize, contenders: &mut [Contender<'_>]) -> Vec<f64> {
    let mut took = vec![Vec::with_capacity(runs); contenders.len()];
    for _ in 0..runs {
        for (took, contender) in took.iter_mut().zip(contenders.iter_mut()) {
            contender();
            let start = Instant::now();
            contender();
            took.push(start.elapsed().as_secs_f64());
        }
    }
    took.into_iter().map(|mut took| quantile(&mut took, 0.5)).collect()
}

/// The median seconds of one.
pub fn median_s(runs: usize, contender: impl FnMut()) -> f64 {
    medians_s(runs, &mut [Box::new(contender)])[0]
}

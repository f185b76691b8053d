//! Rankings that explore have the distributions that their propensities say, over many seeds.

use hypercast_sdk::{Cap, RankRequest, Ranked, Request};

const SCORES: [f32; 5] = [0.2, 0.9, -0.4, 0.5, 0.1];
const SEEDS: u64 = 40_000;

/// A request for the best three of five.
fn request(seed: u64) -> Request {
    let candidates = (10..15).collect();
    let request = RankRequest { seed, candidates, limit: 3, ..RankRequest::default() };
    Request::new(request, Vec::new(), Vec::new())
}

/// Checks that a share of all seeds is what it should be, by five standard deviations.
#[track_caller]
fn assert_share(hits: u64, of: u64, expected: f64, what: &str) {
    let (share, of) = (hits as f64 / of as f64, of as f64);
    let deviation = (expected * (1.0 - expected) / of).sqrt();
    assert!((share - expected).abs() <= 5.0 * deviation, "{what}: {share}, not {expected}");
}

fn propensity(place: &Ranked) -> f64 {
    f64::from(place.propensity.expect("it explores"))
}

#[test]
fn epsilon_greedy_gives_each_place_with_its_propensity() {
    let epsilon = 0.3;
    let mut hits = [[0u64; 5]; 3];
    let mut told = [[0.0f64; 5]; 3];
    for seed in 0..SEEDS {
        let ranked = request(seed).epsilon_greedy(&SCORES, epsilon);
        assert_eq!(ranked.len(), 3);
        for (place, entry) in ranked.iter().enumerate() {
            let candidate = entry.candidate as usize;
            assert_eq!(entry.score, SCORES[candidate]);
            hits[place][candidate] += 1;
            told[place][candidate] = propensity(entry);
        }
    }
    for place in 0..3 {
        for candidate in 0..5 {
            let what = format!("candidate {candidate} at {place}");
            assert_share(hits[place][candidate], SEEDS, told[place][candidate], &what);
        }
        let total: f64 = told[place].iter().sum();
        assert!((total - 1.0).abs() < 1e-6, "the propensities of place {place} sum to {total}");
    }
    // By score: 1, 3, 0.
    assert!((told[0][1] - 0.76).abs() < 1e-6 && (told[1][1] - 0.06).abs() < 1e-6);
}

#[test]
fn without_exploration_the_order_is_by_score() {
    for seed in 0..100 {
        let ranked = request(seed).epsilon_greedy(&SCORES, 0.0);
        let order: Vec<u32> = ranked.iter().map(|place| place.candidate).collect();
        assert_eq!(order, [1, 3, 0]);
        assert!(ranked.iter().all(|place| place.propensity == Some(1.0)));
        let cold = request(seed).softmax(&SCORES, 0.0);
        assert_eq!(cold.iter().map(|place| place.candidate).collect::<Vec<_>>(), order);
        assert!(cold.iter().all(|place| place.propensity.is_none()));
    }
}

#[test]
fn softmax_draws_each_place_given_those_before() {
    let temperature = 0.5;
    let weight = |candidate: usize| (f64::from(SCORES[candidate]) / temperature).exp();
    let mut first = [0u64; 5];
    let mut second = [0u64; 5];
    for seed in 0..SEEDS {
        let ranked = request(seed).softmax(&SCORES, temperature as f32);
        assert_eq!(ranked.len(), 3);
        let mut left: f64 = (0..5).map(weight).sum();
        for place in &ranked {
            let own = weight(place.candidate as usize);
            assert!((propensity(place) - own / left).abs() < 1e-5, "{place:?}");
            left -= own;
        }
        first[ranked[0].candidate as usize] += 1;
        if ranked[0].candidate == 1 {
            second[ranked[1].candidate as usize] += 1;
        }
    }
    let total: f64 = (0..5).map(weight).sum();
    for candidate in 0..5 {
        let what = format!("candidate {candidate} first");
        assert_share(first[candidate], SEEDS, weight(candidate) / total, &what);
        let given = if candidate == 1 { 0.0 } else { weight(candidate) / (total - weight(1)) };
        assert_share(second[candidate], first[1], given, &format!("{candidate} after 1"));
    }
}

/// The probability that a normal number of `own` is the largest, by a sum over fine steps, each
/// with the others' probabilities by sums of their own.
fn probability_of_most(own: usize, means: &[f32], deviations: &[f32]) -> f64 {
    const STEPS: usize = 4000;
    let x = |step: usize| -6.0 + 12.0 * step as f64 / STEPS as f64;
    let density = |of: usize, x: f64| {
        let (mean, deviation) = (f64::from(means[of]), f64::from(deviations[of]));
        let z = (x - mean) / deviation;
        (-0.5 * z * z).exp() / (deviation * std::f64::consts::TAU.sqrt()) * 12.0 / STEPS as f64
    };
    let mut below = vec![0.0; means.len()];
    let mut probability = 0.0;
    for step in 0..STEPS {
        let others = (0..means.len()).filter(|of| *of != own);
        probability += density(own, x(step)) * others.map(|of| below[of]).product::<f64>();
        below.iter_mut().enumerate().for_each(|(of, sum)| *sum += density(of, x(step)));
    }
    probability
}

#[test]
fn thompson_tries_each_candidate_as_often_as_it_may_be_the_best() {
    let deviations = [0.5, 0.2, 1.0, 0.3, 0.05];
    let mut first = [0u64; 5];
    let mut told = [0.0f64; 5];
    for seed in 0..SEEDS {
        let ranked = request(seed).slate(&SCORES).thompson(&deviations);
        assert!(ranked.len() == 3 && ranked.is_sorted_by(|a, b| a.score >= b.score));
        assert!(ranked[1..].iter().all(|place| place.propensity.is_none()));
        first[ranked[0].candidate as usize] += 1;
        told[ranked[0].candidate as usize] = propensity(&ranked[0]);
    }
    for candidate in 0..5 {
        let expected = probability_of_most(candidate, &SCORES, &deviations);
        assert_share(first[candidate], SEEDS, expected, &format!("candidate {candidate} first"));
        let told = told[candidate];
        assert!((told - expected).abs() < 2e-3, "{candidate}: {told}, not {expected}");
    }
    let certain = request(3).slate(&SCORES).thompson(&[]);
    assert_eq!(certain.iter().map(|place| place.candidate).collect::<Vec<_>>(), [1, 3, 0]);
    assert_eq!(certain[0].propensity, Some(1.0));
}

#[test]
fn exploration_under_filters_and_caps_has_the_propensities_that_it_tells() {
    // Without 3, and of the even ones only one among the first two.
    let keys = [1, 2, 1, 2, 1];
    let mut first = [0u64; 5];
    let mut second = [0u64; 5];
    let mut told = [0.0f64; 5];
    for seed in 0..SEEDS {
        let request = request(seed);
        let slate = request.slate(&SCORES).filter("three", |candidate| candidate != 3);
        let slate = slate.cap(&keys, Cap { at_most: 1, first: 2 });
        let greedy = slate.epsilon_greedy(0.4);
        assert!(greedy[1..].iter().all(|place| place.propensity.is_none()));
        let by_score = if greedy[0].candidate == 1 { 0.6 } else { 0.0 };
        assert!((propensity(&greedy[0]) - (by_score + 0.1)).abs() < 1e-6);
        let drawn = slate.softmax(0.5);
        first[greedy[0].candidate as usize] += 1;
        if drawn[0].candidate == 0 {
            // Of the others only 1 has another key.
            assert_eq!((drawn[1].candidate, propensity(&drawn[1])), (1, 1.0));
        } else if drawn[0].candidate == 1 {
            second[drawn[1].candidate as usize] += 1;
            told[drawn[1].candidate as usize] = propensity(&drawn[1]);
        }
        for ranked in [greedy, drawn, slate.thompson(&[1.0; 5])] {
            let [a, b] = [0, 1].map(|place| ranked[place].candidate);
            assert!(
                keys[a as usize] != keys[b as usize] && ranked.iter().all(|r| r.candidate != 3)
            );
        }
    }
    for candidate in [0, 1, 2, 4] {
        let expected = if candidate == 1 { 0.7 } else { 0.1 };
        assert_share(first[candidate], SEEDS, expected, &format!("candidate {candidate} first"));
    }
    for candidate in [0, 2, 4] {
        let of = second.iter().sum();
        assert_share(second[candidate], of, told[candidate], &format!("{candidate} after 1"));
    }
}

#[test]
fn a_seed_gives_one_ranking() {
    let ranked = |seed| format!("{:?}", request(seed).softmax(&SCORES, 1.0));
    assert_eq!(ranked(7), ranked(7));
    assert!((0..20).any(|seed| ranked(seed) != ranked(7)));
    // Scores far apart leave no probability of 0, which a host would refuse.
    let far = request(3).softmax(&[0.0, 1e30, -1e30, 5.0, 2.0], 1e-3);
    assert!(far.iter().all(|place| place.propensity.is_some_and(|share| share > 0.0)));
}

//! The properties that an A/B of rankers relies on.

use hypercast_core::hash::mix_parts;

use super::*;

fn world(seed: u64) -> ClosedLoopWorld {
    let options = ClosedLoopOptions { users: 150, items: 300, items_per_day: 40, seed };
    ClosedLoopWorld::new(options).unwrap()
}

/// All impressions of some days under a ranker.
fn run(
    world: &mut ClosedLoopWorld,
    days: i64,
    rank: impl Fn(&mut ClosedLoopWorld, &PageRequest) -> Vec<u64>,
) -> Vec<Impression> {
    let mut rows = Vec::new();
    loop {
        let pages = world.next_pages(START_MS + days * DAY_MS, 8);
        if pages.is_empty() {
            return rows;
        }
        for page in pages {
            let ranking = rank(world, &page);
            rows.extend(world.show(&page, &ranking).unwrap());
        }
    }
}

fn by_popularity(world: &mut ClosedLoopWorld, page: &PageRequest) -> Vec<u64> {
    world.rank_by_popularity(page)
}

fn as_retrieved(_: &mut ClosedLoopWorld, page: &PageRequest) -> Vec<u64> {
    page.candidates.iter().rev().copied().collect()
}

fn clicks(rows: &[Impression]) -> f64 {
    rows.iter().filter(|row| row.outcome.actions & 1 == 1).count() as f64
}

#[test]
fn the_seed_and_the_rankings_decide_everything() {
    let rows = |seed| run(&mut world(seed), 2, by_popularity);
    let text = |rows: &[Impression]| format!("{rows:?}");
    assert!(text(&rows(1)) == text(&rows(1)));
    assert!(text(&rows(1)) != text(&rows(2)));
    // How many pages are ranked together changes nothing.
    let mut one = world(1);
    let mut alone = Vec::new();
    while let [page] = &one.next_pages(START_MS + 2 * DAY_MS, 1)[..] {
        let ranking = one.rank_by_popularity(page);
        alone.extend(one.show(page, &ranking).unwrap());
    }
    assert!(text(&alone) == text(&rows(1)));
}

#[test]
fn pages_come_in_order_and_hold_unseen_candidates_of_every_source() {
    let mut world = world(3);
    let (mut last_ms, mut fresh, mut shown) = (START_MS, 0, Vec::new());
    for _ in 0..400 {
        for page in world.next_pages(i64::MAX, 8) {
            assert!(page.time_ms >= last_ms);
            last_ms = page.time_ms;
            let mut distinct = page.candidates.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), page.candidates.len());
            assert!(page.candidates.len() > PAGE_ITEMS, "{}", page.candidates.len());
            let user = &world.users[page.user as usize - 1];
            let seen = |item: &u64| user.seen.contains(&(*item as usize - 1));
            assert!(!page.candidates.iter().any(seen));
            fresh += page.candidates.iter().filter(|item| world.is_fresh(**item, last_ms)).count();
            let ranking = world.rank_by_popularity(&page);
            shown.extend(world.show(&page, &ranking).unwrap());
            assert!(world.show(&page, &[0]).is_err() && world.show(&page, &[]).is_err());
        }
    }
    assert!(fresh > 1000 && world.items(300).len() > 20, "{fresh}");
    assert!(shown.iter().any(|row| row.item > 300), "what arrived is shown");
    assert!(shown.iter().all(|row| row.outcome_ms <= row.time_ms + CLICK_WINDOW_MS));
}

#[test]
fn the_lower_the_place_the_less_is_clicked() {
    // A ranking that begins anywhere does not get worse from place to place.
    let rows = run(&mut world(5), 12, |_, page| {
        let mut ranking = page.candidates.clone();
        let from = mix_parts(&[page.request]) as usize % ranking.len();
        ranking.rotate_left(from);
        ranking
    });
    let mut by_place = [0.0; PAGE_ITEMS];
    let mut request = (0, 0);
    for row in &rows {
        request =
            if request.0 == row.request { (row.request, request.1 + 1) } else { (row.request, 0) };
        by_place[request.1] += f64::from(u8::from(row.outcome.actions & 1 == 1));
    }
    let lower = by_place[5] / by_place[0];
    let expected = f64::from(EXAMINED_NEXT.powi(5));
    assert!((lower - expected).abs() < 0.1, "{lower} against {expected}: {by_place:?}");
    assert!(by_place[0] > by_place[2] && by_place[2] > by_place[4], "{by_place:?}");
}

#[test]
fn a_topic_that_was_examined_is_worth_less_until_it_is_forgotten() {
    let mut world = world(7);
    let page = world.next_pages(i64::MAX, 1).remove(0);
    let item = page.candidates[0];
    let other = *page
        .candidates
        .iter()
        .find(|other| {
            world.items[**other as usize - 1].topic != world.items[item as usize - 1].topic
        })
        .unwrap();
    let click = |world: &ClosedLoopWorld, item| world.truth(&page, item).click;
    let (fresh, unseen) = (click(&world, item), click(&world, other));
    let user = page.user as usize - 1;
    let of = &world.items[item as usize - 1];
    (0..3).for_each(|_| world.users[user].saw(0, of, true));
    let satiated = click(&world, item);
    assert!(satiated < 0.7 * fresh, "{satiated} after {fresh}");
    assert_eq!(click(&world, other), unseen);
    world.users[user].fade(page.time_ms + DAY_MS / 4);
    let rested = click(&world, item);
    assert!(rested > satiated && rested < fresh, "a session's satiation fades before that of days");
    world.users[user].fade(page.time_ms + 30 * DAY_MS);
    assert!((click(&world, item) - fresh).abs() < 1e-3);
}

#[test]
fn better_rankings_earn_more_and_bring_more_pages() {
    let truth = run(&mut world(11), 8, |world, page| world.rank_by_truth(page));
    let popular = run(&mut world(11), 8, by_popularity);
    let any = run(&mut world(11), 8, as_retrieved);
    let a_row = |rows: &[Impression]| clicks(rows) / rows.len() as f64;
    let [best, usual, least] = [&truth, &popular, &any].map(|rows| a_row(rows));
    assert!(best > 1.3 * usual && usual > 1.05 * least, "{best} {usual} {least}");
    assert!(truth.len() as f64 > 1.05 * any.len() as f64, "{} {}", truth.len(), any.len());
    // There is room above the ranker of the past, and outcomes are neither rare nor certain.
    assert!((0.1..0.4).contains(&usual) && best < 0.7, "{best} {usual}");
}

//! Ten users who send the worst legal values beside honest traffic, through every process: the
//! daemon with its joiner, the trainers of both tiers and the logging tier.
//!
//! Three systems run side by side, and get the same honest requests and events, with the same
//! times, in rounds. One of them gets the hostile users, too; the other two show what chance does.
//! A round ends when each system serves what it learned from it, so a round is one step of each
//! trainer, and what differs is what the hostile users did. NE is that of the predictions that the
//! daemons answered.
//!
//! `HYPERCAST_HOSTILE_MINUTES` sets how long they send (a few rounds by default).

mod honest;
mod hostile;
mod system;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use hypercast_core::clock::now_ms;
use hypercast_tests::{Prerequisites, prerequisites};

use self::{
    honest::{HonestRequest, HonestWorld, ServedNe, WorldSize},
    hostile::{HOSTILE_USERS, HostileAnswer, HostileTally, HostileUser},
    system::RunningSystem,
};

/// How much worse the NE of honest rows may be beside hostile users, relative to NE.
const MOST_HARM: f64 = 1e-3;

/// The rounds without `HYPERCAST_HOSTILE_MINUTES`.
const FEW_ROUNDS: usize = 3;

/// No round is shorter, so that hostile users have their time in it.
const ROUND: Duration = Duration::from_secs(2);

/// How long the traffic lasts.
struct TrafficLength {
    minutes: f64,
    most_rounds: usize,
}

impl TrafficLength {
    fn of_environment() -> TrafficLength {
        match std::env::var("HYPERCAST_HOSTILE_MINUTES") {
            Ok(minutes) => {
                let minutes: f64 = minutes.parse().expect("HYPERCAST_HOSTILE_MINUTES is a number");
                let most_rounds = (minutes * 60.0 / ROUND.as_secs_f64()).ceil() as usize;
                TrafficLength { minutes, most_rounds }
            }
            Err(_) => TrafficLength { minutes: f64::INFINITY, most_rounds: FEW_ROUNDS },
        }
    }

    /// A world of which a long run shows harm, or one that is made in seconds.
    fn world(&self) -> WorldSize {
        match self.minutes.is_finite() {
            true => WorldSize { users: 4000, past: 16_000, rounds: self.most_rounds },
            false => WorldSize { users: 1000, past: 6000, rounds: self.most_rounds },
        }
    }
}

/// The systems, and what the hostile users were answered.
struct SystemsUnderTest {
    /// Without hostile users, twice.
    honest: [RunningSystem; 2],
    beside: RunningSystem,
    tally: HostileTally,
}

#[test]
fn ten_hostile_users_do_not_hurt_the_others() {
    let Some(Prerequisites { hypercast, plugins, .. }) = prerequisites("hostile traffic") else {
        return;
    };
    let length = TrafficLength::of_environment();
    let dir = tempfile::tempdir().unwrap();
    let trained = dir.path().join("trained");
    let world = HonestWorld::prepare(&trained, &length.world());
    system::train(&hypercast, &trained, &plugins);
    let start = |name: &str| RunningSystem::start(&hypercast, &trained, &dir.path().join(name));
    let mut systems = SystemsUnderTest {
        honest: ["alone", "again"].map(start),
        beside: start("beside"),
        tally: HostileTally::default(),
    };
    systems.send(&world, &length);
    systems.check_ne();
    systems.check_joined();
    systems.check_refusals();
    let SystemsUnderTest { honest, beside, .. } = systems;
    honest.into_iter().chain([beside]).for_each(RunningSystem::stop);
}

/// Ends the threads of hostile users, also when a check fails.
struct StopsAtEnd<'a>(&'a AtomicBool);

impl Drop for StopsAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl SystemsUnderTest {
    /// Sends honest traffic to all systems, and hostile traffic to one.
    fn send(&mut self, world: &HonestWorld, length: &TrafficLength) {
        let started = Instant::now();
        let users: Vec<HostileUser> = (0..HOSTILE_USERS).map(HostileUser::new).collect();
        // Each is as active as an honest user.
        let every = world.users() / users.len();
        let stop = AtomicBool::new(false);
        let door = self.beside.door();
        let tally = std::thread::scope(|scope| {
            let (stop, door) = (&stop, &door);
            let stops = StopsAtEnd(stop);
            let besieging: Vec<_> =
                users.iter().map(|user| scope.spawn(move || user.besiege(door, stop))).collect();
            let mut rounds = 0;
            for (at, requests) in world.rounds().enumerate() {
                if started.elapsed().as_secs_f64() >= length.minutes * 60.0 {
                    break;
                }
                let round = Instant::now();
                let answers = hostile::answers(&users, every, at, requests);
                self.round(world, requests, &answers);
                rounds = at + 1;
                std::thread::sleep(ROUND.saturating_sub(round.elapsed()));
            }
            println!("{rounds} rounds in {:.0} s", started.elapsed().as_secs_f64());
            drop(stops);
            let tallies = besieging.into_iter().map(|user| user.join().expect("no check failed"));
            tallies.fold(HostileTally::default(), HostileTally::and)
        });
        self.tally = std::mem::take(&mut self.tally).and(tally);
    }

    /// A round in all systems at once.
    fn round(
        &mut self,
        world: &HonestWorld,
        requests: &[HonestRequest],
        answers: &[HostileAnswer],
    ) {
        let bodies = world.bodies(requests, now_ms());
        let [alone, again] = &mut self.honest;
        let systems = [(alone, &[][..]), (again, &[][..]), (&mut self.beside, answers)];
        std::thread::scope(|scope| {
            let bodies = &bodies;
            let running = systems
                .map(|(system, answers)| scope.spawn(move || system.round(world, bodies, answers)));
            running.into_iter().for_each(|system| system.join().expect("no check failed"));
        });
    }

    /// NE of honest rows is as good beside hostile users as without them, for both tiers.
    fn check_ne(&self) {
        let [alone, again] = &self.honest;
        let mut harms = Vec::new();
        for slice in alone.served.slices() {
            let ne = |served: &ServedNe| served.ne(slice);
            let without = ne(&alone.served);
            let chance = ne(&again.served) / without - 1.0;
            let harm = ne(&self.beside.served) / without - 1.0;
            println!(
                "figure: NE of {slice} over {} honest rows: {without:.5}; beside hostile users \
                 {:+.4} %, by chance {:+.4} %",
                alone.served.rows(slice),
                harm * 100.0,
                chance * 100.0
            );
            harms.push((slice.to_owned(), harm, chance));
        }
        for (slice, harm, chance) in harms {
            assert!(chance.abs() < MOST_HARM / 2.0, "{slice}: two runs differ by {chance:.5}");
            assert!(harm < MOST_HARM, "{slice}: NE is {harm:.5} worse");
        }
    }

    /// The honest examples are the same, whatever the hostile users told the joiner.
    fn check_joined(&self) {
        let [alone, again] = self.honest.each_ref().map(RunningSystem::honest_examples);
        let beside = self.beside.honest_examples();
        println!("figure: {} honest examples in each system", alone.len());
        for other in [again, beside] {
            assert_eq!(other.len(), alone.len(), "no example is lost or doubled");
            for (other, alone) in other.iter().zip(&alone) {
                assert_eq!(other, alone);
            }
        }
    }

    /// What was refused or clipped is counted, and of the hostile users alone.
    fn check_refusals(&self) {
        for system in &self.honest {
            assert_eq!(system.refusals(), HostileTally::default(), "{}", system.name);
            assert_eq!(system.clipped(), 0, "{}", system.name);
        }
        println!("figure: hostile requests refused: {}", self.tally.refused());
        assert_eq!(self.beside.refusals(), self.tally.refused());
        assert!(self.beside.clipped() > 0, "values beyond their ranges are clipped");
    }
}

//! Runs seeds and plans of the simulator.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use hypercast_core::disk;
use hypercast_simulation::{
    plan::{Plan, Role},
    plant::PLANTS,
    shrink,
    world::Simulation,
};

/// Runs the host's own code over a simulated clock, network and disk, and breaks these.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs one plan and says which promises were broken.
    Run {
        /// The seed that the plan is drawn from.
        #[arg(long, required_unless_present = "plan")]
        seed: Option<u64>,
        /// A file with the plan instead.
        #[arg(long, conflicts_with = "seed")]
        plan: Option<PathBuf>,
        /// Prints what happens, line by line.
        #[arg(long)]
        trace: bool,
    },
    /// Runs many seeds, and says how often each kind of fault hit each process.
    Many {
        /// The first seed.
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// The number of seeds.
        #[arg(long)]
        seeds: u64,
    },
    /// Prints the smallest plan, drawn from a seed, that breaks the same promise.
    Shrink {
        /// The seed.
        #[arg(long)]
        seed: u64,
    },
    /// Plants a fault and says which seed finds it first.
    Plant {
        /// The fault; without it, all of them one after the other.
        name: Option<String>,
        /// The most seeds to try.
        #[arg(long, default_value_t = 1000)]
        seeds: u64,
    },
}

fn main() -> ExitCode {
    let is_sound = match Args::parse().command {
        Command::Run { seed, plan, trace } => run(seed, plan, trace),
        Command::Many { from, seeds } => many(from, seeds),
        Command::Shrink { seed } => shrunk(seed),
        Command::Plant { name, seeds } => plant(name.as_deref(), seeds),
    };
    if is_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Says what a run broke; true if that is nothing.
fn tell(world: &Simulation) -> bool {
    let violations = &world.ledger.borrow().violations;
    for violation in violations {
        println!("seed {}: {}: {}", world.plan.seed, violation.oracle, violation.what);
    }
    violations.is_empty()
}

fn run(seed: Option<u64>, plan: Option<PathBuf>, trace: bool) -> bool {
    let read = |path: PathBuf| {
        let text = disk::read(&path);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        toml::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let plan = plan.map_or_else(|| Plan::of(seed.unwrap_or(0)), read);
    let world = Simulation::run(&plan, None, trace);
    world.timeline.trace.lines().iter().for_each(|line| println!("{line}"));
    let took = world.timeline.now.get();
    println!("trace {:016x}, {took:?} of simulated time", world.timeline.trace.hash());
    tell(&world)
}

fn many(from: u64, seeds: u64) -> bool {
    let mut struck: BTreeMap<(&str, Role), u64> = BTreeMap::new();
    let (mut simulated, mut broken) = (Duration::ZERO, 0);
    for seed in from..from + seeds {
        let world = Simulation::run(&Plan::of(seed), None, false);
        broken += u64::from(!tell(&world));
        simulated += world.timeline.now.get();
        for (fault, count) in &*world.struck.borrow() {
            *struck.entry(*fault).or_default() += count;
        }
    }
    for ((kind, role), count) in &struck {
        println!("{kind:22} {role:?} {count}");
    }
    let hours = simulated.as_secs() / 3600;
    println!("{seeds} seeds, {hours} simulated hours, {broken} seeds with violations");
    broken == 0
}

fn shrunk(seed: u64) -> bool {
    let Some(plan) = shrink::smallest(&Plan::of(seed)) else {
        println!("seed {seed} breaks no promise");
        return true;
    };
    println!("{}", toml::to_string(&plan).expect("a plan is plain data"));
    false
}

/// True if each fault was found.
fn plant(name: Option<&str>, seeds: u64) -> bool {
    let mut all = true;
    for (known, plant) in PLANTS.into_iter().filter(|(known, _)| name.is_none_or(|n| n == *known)) {
        let finds = |seed: &u64| {
            let world = Simulation::run(&Plan::of(*seed), Some(plant), false);
            let ledger = world.ledger.borrow();
            let first = ledger.violations.first();
            if let Some(first) = first {
                println!("{known}: seed {seed}: {}: {}", first.oracle, first.what);
            }
            first.is_some()
        };
        if (0..seeds).find(finds).is_none() {
            println!("{known}: not found within {seeds} seeds");
            all = false;
        }
    }
    all
}

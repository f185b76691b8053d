//! Which experiments read which options. One that would be ignored is refused.

use clap::{
    ArgMatches, Args, Command, FromArgMatches, ValueEnum as _, error::ErrorKind,
    parser::ValueSource,
};

use super::{
    Experiment::{self, Ab, Ablation, Compute, Publish, Scaling, Tae, Transfer, Unseen},
    ExperimentOptions,
};

/// Those that compare models on a data set; `ab` has a world of its own.
const OF_DATA: &[Experiment] = &[Tae, Transfer, Unseen, Compute, Publish, Scaling, Ablation];
const ALL: &[Experiment] = &[Tae, Transfer, Unseen, Compute, Publish, Ab, Scaling, Ablation];

/// The experiments that read an option, by its name.
const READERS: [(&str, &[Experiment]); 27] = [
    ("experiment", ALL),
    ("data", OF_DATA),
    ("mapping", OF_DATA),
    ("from", OF_DATA),
    ("force", OF_DATA),
    ("config", ALL),
    ("plugins", ALL),
    ("work", ALL),
    ("json", ALL),
    // A law is of models, not of how they go on learning: its weights are always fixed.
    ("mode", &[Tae, Transfer, Unseen, Compute, Publish, Ablation]),
    ("test_from", OF_DATA),
    ("report_from", OF_DATA),
    ("seeds", ALL),
    ("users", OF_DATA),
    ("replicates", OF_DATA),
    // What is published is an FM.
    ("expert", &[Tae, Transfer, Unseen, Compute, Scaling, Ablation]),
    ("variant", &[Ablation, Ab]),
    ("student", &[Transfer]),
    ("stale_hours", &[Tae]),
    ("publish_minutes", &[Publish]),
    ("surface", &[Unseen, Compute]),
    ("task", &[Unseen]),
    ("plot", &[Scaling]),
    ("ab_users", &[Ab]),
    ("ab_past_days", &[Ab]),
    ("ab_days", &[Ab]),
    ("equal_arms", &[Ab]),
];

/// An experiment with options that it reads, each of them.
#[derive(Debug, Clone)]
pub struct ExperimentCommand(pub ExperimentOptions);

impl FromArgMatches for ExperimentCommand {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let options = ExperimentOptions::from_arg_matches(matches)?;
        for (option, readers) in READERS {
            let is_given = matches.value_source(option) == Some(ValueSource::CommandLine);
            if is_given && !readers.contains(&options.experiment) {
                return Err(unread(option, options.experiment, readers));
            }
        }
        Ok(Self(options))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for ExperimentCommand {
    fn augment_args(command: Command) -> Command {
        ExperimentOptions::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        ExperimentOptions::augment_args_for_update(command)
    }
}

fn unread(option: &str, by: Experiment, readers: &[Experiment]) -> clap::Error {
    let name =
        |of: &Experiment| of.to_possible_value().expect("none is hidden").get_name().to_owned();
    let readers: Vec<_> = readers.iter().map(name).collect();
    let (option, by, readers) = (option.replace('_', "-"), name(&by), readers.join(", "));
    let message = format!("--{option} has no meaning for the experiment {by}, only for {readers}");
    clap::Error::raw(ErrorKind::ArgumentConflict, message)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct OptionsParser {
        #[command(flatten)]
        command: ExperimentCommand,
    }

    fn parse(words: &[&str]) -> Result<ExperimentOptions, String> {
        let words = ["experiment"].iter().chain(words);
        let parsed = OptionsParser::try_parse_from(words).map_err(|error| error.to_string())?;
        Ok(parsed.command.0)
    }

    #[test]
    fn every_option_is_in_the_table_once() {
        let command = OptionsParser::command();
        let options: BTreeSet<_> = command.get_arguments().map(|of| of.get_id().as_str()).collect();
        assert_eq!(options, READERS.into_iter().map(|(option, _)| option).collect());
        assert_eq!(options.len(), READERS.len());
    }

    #[test]
    fn an_option_that_the_experiment_ignores_is_refused_by_name() {
        for ignored in [
            &["ab", "--expert", "mlp-fusion"][..],
            &["ab", "--mode", "streaming"],
            &["ab", "--replicates", "1000"],
            &["ab", "--data", "simulated"],
            &["ab", "--test-from", "2024-01-01"],
            &["tae", "--variant", "other"],
            &["tae", "--plot", "laws.svg"],
            &["ablation", "--student", "other"],
            &["scaling", "--mode", "streaming"],
            &["compute", "--ab-users", "1500"],
            &["publish", "--equal-arms"],
        ] {
            let message = parse(ignored).unwrap_err();
            assert!(message.contains(ignored[1]) && message.contains(ignored[0]), "{message}");
        }
        assert!(parse(&["tae", "--student", "other"]).unwrap_err().contains("only for transfer"));
        for unused in ["--seeds", "--config", "--plugins", "--variant", "--work"] {
            let message = parse(&["ab", "--equal-arms", unused, "3"]).unwrap_err();
            assert!(message.contains(unused) && message.contains("--equal-arms"), "{message}");
        }
    }

    #[test]
    fn defaults_are_nothing_that_was_given() {
        for experiment in ["tae", "transfer", "unseen", "compute", "publish", "scaling", "ab"] {
            parse(&[experiment, "--seeds", "2", "--json", "out.json"]).unwrap();
        }
        let options = parse(&["unseen", "--task", "like", "--mode", "fixed"]).unwrap();
        assert_eq!(options.task.as_deref(), Some("like"));
        assert!(parse(&["ab", "--equal-arms", "--ab-users", "600"]).unwrap().ab.equal_arms);
    }
}

//! `hypercast dead-letters`: records that a reader of a stream could not use and set aside, and
//! orders to try them again.

use std::path::PathBuf;

use anyhow::Context;
use serde_json::{Value, json};

use super::ids;
use hypercast_config::Config;
use hypercast_core::clock::now_ms;
use hypercast_data::logs::LogPosition;
use hypercast_stream::{
    dead_letters::{self, DeadLetter, FEATURE_LOGS, KeptLetters, NumberedLetter},
    events::EventRecord,
    join::{JoinedRecord, OutcomeRecord},
    streams::{self, StreamEngine, Topic},
};

/// Look at records that were set aside, and have them tried again
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A trainer sets a record aside that would harm its model, the joiner and every follower of a stream one that it cannot
read; each goes on behind it. The letter says where the record is and why. `retry` has the reader that set it aside
try it once more; if it fails again, it becomes a new letter.

  hypercast dead-letters list
  hypercast dead-letters show 12
  hypercast dead-letters retry 12 13")]
pub struct Args {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub action: DeadLettersCommand,
}

/// What can be done with dead letters.
#[derive(Debug, clap::Subcommand)]
pub enum DeadLettersCommand {
    /// Print the letters that are kept, oldest first
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a letter and its record, as JSON
    Show {
        /// Its number
        number: u64,
    },
    /// Have the records of letters tried again, once each
    Retry {
        /// Their numbers
        #[arg(required = true, value_name = "NUMBER")]
        numbers: Vec<u64>,
    },
}

/// Does it, and prints what was asked for.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let engine = streams::open(&config.engine)?;
    match args.action {
        DeadLettersCommand::List { json } => {
            let KeptLetters { letters, lost, .. } = dead_letters::list(&*engine)?;
            match json {
                true => println!("{}", serde_json::to_string_pretty(&letters)?),
                false => print!("{}", table(&letters, now_ms())),
            }
            if lost > 0 {
                eprintln!("{lost} records of the stream dead-letters are lost; the rest is above");
            }
        }
        DeadLettersCommand::Show { number } => {
            let found = dead_letters::find(&*engine, number)?;
            let record = record(&config, &*engine, &found.letter)
                .unwrap_or_else(|error| json!({ "unreadable": format!("{error:#}") }));
            let mut shown = json!({ "letter": found, "record": record });
            let named = ids::named_in(&config, &record);
            if !named.is_empty() {
                shown["ids"] = json!(named);
            }
            println!("{}", serde_json::to_string_pretty(&shown)?);
        }
        DeadLettersCommand::Retry { numbers } => {
            for number in numbers {
                let NumberedLetter { letter, .. } = dead_letters::retry(&*engine, number)
                    .with_context(|| format!("dead letter {number}"))?;
                let DeadLetter { reader, source, position, .. } = letter;
                println!("{number}: {reader} tries position {position} of {source} again");
            }
        }
    }
    Ok(())
}

/// The content of a letter's record.
fn record(
    config: &Config,
    engine: &dyn StreamEngine,
    letter: &DeadLetter,
) -> anyhow::Result<Value> {
    if letter.source == FEATURE_LOGS {
        let LogPosition { file, row } = LogPosition::from_number(letter.position);
        let logs = config.paths.logs.display();
        return Ok(json!({ "file": format!("{logs}/requests-{file:04}.parquet"), "row": row }));
    }
    let payload = letter.record(engine)?;
    let decoded = if letter.source == Topic::events().name() {
        EventRecord::decode(&payload).map(serde_json::to_value)
    } else if letter.source == Topic::outcomes().name() {
        OutcomeRecord::decode(&payload).map(serde_json::to_value)
    } else {
        JoinedRecord::decode(&payload).map(serde_json::to_value)
    };
    Ok(decoded.with_context(|| format!("its {} bytes", payload.len()))??)
}

fn table(letters: &[NumberedLetter], now_ms: i64) -> String {
    if letters.is_empty() {
        return "no record was set aside\n".into();
    }
    let mut rows = vec![
        ["number", "reader", "source", "position", "request", "age", "state", "reason"]
            .map(str::to_owned),
    ];
    rows.extend(letters.iter().map(|NumberedLetter { number, retried, letter }| {
        let state = match (retried, letter.retries) {
            (true, _) => "tried again".to_owned(),
            (false, 0) => "set aside".to_owned(),
            (false, retries) => format!("set aside, {} tries", u64::from(retries) + 1),
        };
        [
            number.to_string(),
            letter.reader.clone(),
            letter.source.clone(),
            letter.position.to_string(),
            letter.request.map_or("-".into(), |request| request.to_string()),
            age(now_ms - letter.time_ms),
            state,
            letter.reason.escape_debug().to_string(),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..7).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}  "));
        format!("{}{}\n", cells.collect::<String>(), row[7])
    };
    rows.iter().map(line).collect()
}

/// A time in its largest whole unit.
fn age(ms: i64) -> String {
    match ms.max(0) / 1000 {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_a_line_of_aligned_columns() {
        let letter = DeadLetter {
            reader: "fm-1_0_0".into(),
            source: "joined".into(),
            position: 40,
            retries: 1,
            request: None,
            checksum: None,
            reason: "two\nlines".into(),
            time_ms: 5,
        };
        let letters = [NumberedLetter { number: 7, retried: false, letter }];
        let printed = table(&letters, 3_600_005);
        let lines: Vec<&str> = printed.lines().collect();
        assert_eq!(lines.len(), 2, "{printed}");
        assert_eq!(lines[0].find("reason"), lines[1].find("two\\nlines"), "{printed}");
        assert!(lines[1].contains("60 min  set aside, 2 tries"), "{printed}");
        assert_eq!(table(&[], 0), "no record was set aside\n");
    }
}

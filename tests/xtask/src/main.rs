//! `cargo xtask`: the repository's own tools. `cargo xtask help` lists them.

mod bench;
mod count;
mod deny;
mod full;
mod options;
mod process;
mod scan;
mod sources;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::options::Options;

const HELP: &str = "\
cargo xtask COMMAND

  tidy [--only CHECK,...]           check layers, names, widths and documents; list the findings
  count [--rev REV]                 count lines of Rust code by folder, without tests and comments
  bench [--json FILE] [--parts PART,...] [-- OPTIONS OF hypercast-lab bench]
                                    run the benches in release, write the README's figures
  bench --from FILE                 write the README's figures from an earlier run
  full [--steps STEP,...] [--minutes-per-fuzz-target N]
                                    run the tests that take hours; write tests/full-summary.json
  full --list                       list the steps of a full run
  deny                              check licences, bans and sources of all dependencies
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs one command. `false` means that it ran and found something wrong.
fn run(args: &[String]) -> Result<bool> {
    let Some((command, rest)) = args.split_first() else {
        print!("{HELP}");
        return Ok(true);
    };
    match command.as_str() {
        "tidy" => tidy::run(Options::parse(rest, &["only"], &[])?),
        "count" => count::run(Options::parse(rest, &["rev"], &[])?),
        "bench" => bench::run(Options::parse(rest, &["json", "parts", "from"], &[])?),
        "full" => {
            full::run(Options::parse(rest, &["steps", "minutes-per-fuzz-target"], &["list"])?)
        }
        "deny" => deny::run(Options::parse(rest, &[], &[])?),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(true)
        }
        other => bail!("there is no command {other:?}; `cargo xtask help` lists the commands"),
    }
}

//! `hypercast plugin keygen FILE`: a key that signs pushes, and the line by which an operator
//! trusts it.

use std::path::PathBuf;

use hypercast_core::atomic_file;
use hypercast_serve::rollout::SecretKey;

/// Arguments of `hypercast plugin keygen`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file of the secret key, which must not be there yet; the public key goes to FILE.pub
    pub file: PathBuf,
}

/// Makes the key, and prints the public one.
pub fn run(args: Args) -> anyhow::Result<()> {
    let key = SecretKey::generate()?;
    key.write(&args.file)?;
    let public = key.public();
    let text = format!("{}\n", public.text());
    atomic_file::write(&args.file.with_added_extension("pub"), text.as_bytes())?;
    eprintln!(
        "key {}: {} is secret; the operator adds this line to rollout.trusted_keys:",
        public.id(),
        args.file.display()
    );
    println!("{}", public.text());
    Ok(())
}

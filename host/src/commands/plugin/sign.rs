//! `hypercast plugin sign COMPONENT`: vouches for a component, its parameters, and what they are to
//! be.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::read;
use hypercast_config::sha256;
use hypercast_core::{atomic_file, clock::now_ms};
use hypercast_expert::wasm::contract::TYPES_IMPORT;
use hypercast_serve::rollout::{PolicyOverrides, PushManifest, SecretKey, SignedManifest};

/// Arguments of `hypercast plugin sign`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The component
    pub component: PathBuf,
    /// The names that the signature vouches for
    #[command(flatten)]
    pub what: SignRequest,
    /// Where the signature goes [default: COMPONENT.sig]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What a signature vouches for.
#[derive(Debug, Clone, clap::Args)]
pub struct SignRequest {
    /// The expert's name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Its version, as 1.0.0
    #[arg(long, value_name = "VERSION")]
    pub version: Option<String>,
    /// The secret key that `hypercast plugin keygen` made
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Its parameters; without any it starts from those of the version that serves
    #[arg(long, value_name = "FILE")]
    pub parameters: Option<PathBuf>,
    /// The surfaces that it is to serve, separated by commas [default: those of the version that
    /// serves]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub surfaces: Vec<String>,
    /// The FM version that it pins [default: that of its parameters, or of the version that serves]
    #[arg(long, value_name = "VERSION")]
    pub fm: Option<String>,
    /// The deployment that it is for, as its rollout.audience says [default: any without a name]
    #[arg(long, value_name = "NAME")]
    pub audience: Option<String>,
    /// Days in which it can be pushed; 0 sets no end
    #[arg(long, value_name = "DAYS", default_value_t = 30)]
    pub valid_days: u32,
    /// How its rollout is to go
    #[command(flatten)]
    pub policy: PolicyOverrides,
}

/// Milliseconds in a day.
const DAY_MS: i64 = 86_400_000;

/// Signs, and writes the signature.
pub fn run(args: Args) -> anyhow::Result<()> {
    let signed = args.what.sign(&args.component)?;
    let out = args.out.unwrap_or_else(|| args.component.with_added_extension("sig"));
    let text = serde_json::to_string_pretty(&signed)?;
    atomic_file::write(&out, (text + "\n").as_bytes())
        .with_context(|| out.display().to_string())?;
    let PushManifest { name, version, .. } = signed.claims()?;
    println!("{name} {version}: signed by key {} in {}", signed.key, out.display());
    Ok(())
}

impl SignRequest {
    /// Vouches for a component.
    ///
    /// # Errors
    /// An argument that is missing; files that cannot be read.
    pub fn sign(&self, component: &Path) -> anyhow::Result<SignedManifest> {
        let key = SecretKey::read(self.key.as_ref().context("--key is missing")?)?;
        let bytes = read(component)?;
        let parameters = self.parameters.as_deref().map(read).transpose()?;
        let created_ms = now_ms();
        let manifest = PushManifest {
            name: self.name.clone().context("--name is missing")?,
            version: self.version.clone().context("--version is missing")?,
            contract: contract_of(&bytes).with_context(|| {
                format!(
                    "{} imports no expert contract: build it with `cargo hypercast build`",
                    component.display()
                )
            })?,
            surfaces: self.surfaces.clone(),
            fm: self.fm.clone(),
            component: sha256(&bytes),
            parameters: parameters.as_deref().map(sha256),
            created_ms,
            audience: self.audience.clone(),
            expires_ms: (self.valid_days > 0)
                .then(|| created_ms + i64::from(self.valid_days) * DAY_MS),
            policy: self.policy.clone(),
        };
        Ok(key.sign(&manifest))
    }
}

/// The contract's version in a component's type import; the host checks the import itself.
fn contract_of(component: &[u8]) -> Option<String> {
    let import = TYPES_IMPORT.as_bytes();
    let at = component.windows(import.len()).position(|bytes| bytes == import)?;
    let version = component[at + import.len()..].iter().take(32);
    let plain = |byte: &&u8| byte.is_ascii_digit() || **byte == b'.';
    let version: String = version.take_while(plain).map(|byte| char::from(*byte)).collect();
    (!version.is_empty()).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_is_read_from_the_import() {
        let component = [b"\0asm...", TYPES_IMPORT.as_bytes(), b"3.1.0\x05\x02"].concat();
        assert_eq!(contract_of(&component).unwrap(), "3.1.0");
        assert_eq!(contract_of(b"\0asm"), None);
    }
}

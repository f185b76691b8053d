//! Public keys that an operator trusts with pushes, as the configuration writes them.
//!
//! Keys that sign, and what a signature covers, are the rollout's.

use hypercast_core::hex::{hex, unhex};
use ring::{
    digest,
    signature::{ED25519, UnparsedPublicKey},
};

use crate::error::{CommonErrors as _, Error, Result};

/// How a public key is written: this and 64 hex digits.
const PUBLIC: &str = "ed25519:";

/// A key that checks signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl PublicKey {
    /// Parses a key as a configuration writes it.
    ///
    /// # Errors
    /// The text is not `ed25519:` and 64 hex digits.
    pub fn parse(text: &str) -> Result<Self> {
        let bytes = text.trim().strip_prefix(PUBLIC).and_then(unhex);
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
            Error::invalid(format!(
                "{text:?} is no public key: it is \"{PUBLIC}\" and 64 hex digits, as `hypercast plugin keygen` prints it"
            ))
        })
    }

    /// The key as a configuration writes it: `ed25519:` and 64 hex digits.
    pub fn text(&self) -> String {
        format!("{PUBLIC}{}", hex(&self.0))
    }

    /// A short name of the key: the first 16 hex digits of its SHA-256.
    pub fn id(&self) -> String {
        sha256(&self.0)[..16].to_owned()
    }

    /// Whether this key made `signature` (64 bytes) over `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

/// The SHA-256 of `bytes`, in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

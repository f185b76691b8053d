//! Signatures of pushes: a key's holder vouches for a component, its parameters and its manifest.
//!
//! The signed text is kept exactly as it was signed, and never serialised again before the check.
//! [`accept`](super::accept) decides which keys are trusted.

use std::path::Path;

use hypercast_config::{PublicKey, TrustedKey};
use hypercast_core::{
    atomic_file,
    hex::{hex, unhex},
};
use ring::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::policy::PolicyOverrides,
};

/// Prefix of the signed text, so that a signature made for another purpose is not valid here.
const DOMAIN: &[u8] = b"hypercast plugin push 2\n";

/// The prefix of statements before 0.2, which did not cover what a push asks of its rollout.
const FIRST_DOMAIN: &[u8] = b"hypercast plugin push 1\n";

/// Prefix of a secret key's file; its PKCS#8 document follows in hex.
const SECRET: &str = "ed25519-secret:";

/// What a signature covers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PushManifest {
    /// The expert's name.
    pub name: String,
    /// Its version (semver).
    pub version: String,
    /// The version of the expert contract that the component was built for.
    pub contract: String,
    /// The surfaces to serve; empty for those of the serving version.
    #[serde(default)]
    pub surfaces: Vec<String>,
    /// The FM version to pin; by default that of its parameters, or of the serving version.
    #[serde(default)]
    pub fm: Option<String>,
    /// SHA-256 of the component, in hex.
    pub component: String,
    /// SHA-256 of the parameters, in hex; without them, it starts from those of the serving
    /// version.
    #[serde(default)]
    pub parameters: Option<String>,
    /// When it was signed, milliseconds since the epoch; later pushes of an expert are newer.
    pub created_ms: i64,
    /// The deployment that it is for (`rollout.audience`); any if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// When it can no longer be pushed, milliseconds since the epoch; never if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<i64>,
    /// What it asks of its rollout.
    #[serde(default)]
    pub policy: PolicyOverrides,
}

/// A manifest whose signature was verified.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifiedManifest {
    /// What was signed.
    pub manifest: PushManifest,
    /// Whether the signature covers the policy; statements before 0.2 did not.
    pub covers_policy: bool,
}

/// A manifest with its signature, as in a file and in a push.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedManifest {
    /// The manifest as JSON, exactly as it was signed.
    pub manifest: String,
    /// [`PublicKey::id`] of the signer.
    pub key: String,
    /// The signature, in hex.
    pub signature: String,
}

/// A secret key for signing.
pub struct SecretKey {
    pair: Ed25519KeyPair,
    document: Vec<u8>,
}

impl SecretKey {
    /// Generates a key.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn generate() -> Result<Self> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| Error::internal("the system gives no random bytes"))?;
        Self::of(document.as_ref()).map_err(Error::internal)
    }

    /// Reads a file that [`SecretKey::write`] wrote.
    ///
    /// # Errors
    /// The file is missing or is not a secret key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let bytes = text.trim().strip_prefix(SECRET).and_then(unhex);
        let wrong = "it is not a secret key; `hypercast plugin keygen` makes one";
        let bytes = bytes.ok_or_else(|| Error::data(path, wrong))?;
        Self::of(&bytes).map_err(|why| Error::data(path, why))
    }

    /// Writes the key to a new file that only its owner can read.
    ///
    /// # Errors
    /// The file exists, or cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = format!("{SECRET}{}\n", hex(&self.document));
        atomic_file::write_secret(path, text.as_bytes()).map_err(Error::io(path))
    }

    /// The public key that verifies its signatures.
    pub fn public(&self) -> PublicKey {
        let bytes = self.pair.public_key().as_ref();
        PublicKey(bytes.try_into().expect("an Ed25519 key has 32 bytes"))
    }

    /// Signs a manifest with the team's key.
    pub fn sign(&self, manifest: &PushManifest) -> SignedManifest {
        let manifest = serde_json::to_string(manifest).expect("a plain struct serialises");
        let signature = hex(self.pair.sign(&message(DOMAIN, &manifest)).as_ref());
        SignedManifest { manifest, key: self.public().id(), signature }
    }

    fn of(document: &[u8]) -> std::result::Result<Self, String> {
        let pair = Ed25519KeyPair::from_pkcs8(document)
            .map_err(|error| format!("the secret key is damaged ({error})"))?;
        Ok(Self { pair, document: document.to_vec() })
    }
}

impl SignedManifest {
    /// Reads a signature file.
    ///
    /// # Errors
    /// The file is missing or is not a signature.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        serde_json::from_str(&text).map_err(|error| {
            Error::data(
                path,
                format!("it is not a signature file ({error}); `hypercast plugin sign` makes one"),
            )
        })
    }

    /// Verifies the signature with one of the trusted keys.
    ///
    /// # Errors
    /// Refused: the key is not trusted or may not push this name, the signature does not fit, or
    /// the text is not a manifest.
    pub fn verify(&self, trusted: &[TrustedKey]) -> Result<VerifiedManifest> {
        let refused = |why: String| Err(Error::refused(why));
        let Some(TrustedKey { key, names }) =
            trusted.iter().find(|trusted| trusted.key.id() == self.key)
        else {
            return refused(format!(
                "key {:?} is not trusted here; the operator must add the public key to rollout.trusted_keys",
                &self.key[..self.key.floor_char_boundary(64)]
            ));
        };
        let signature = unhex(&self.signature).unwrap_or_default();
        let fits = |domain: &[u8]| key.verifies(&message(domain, &self.manifest), &signature);
        let covers_policy = fits(DOMAIN);
        if !covers_policy && !fits(FIRST_DOMAIN) {
            return refused(format!(
                "the signature does not fit key {} and this manifest; sign it again",
                key.id()
            ));
        }
        let manifest: PushManifest = serde_json::from_str(&self.manifest).map_err(|error| {
            Error::refused(format!("the signed text is not a manifest of this version: {error}"))
        })?;
        if !names.is_empty() && !names.contains(&manifest.name) {
            return refused(format!(
                "key {} may push {}, and not {:?}; the operator can add the name in rollout.trusted_keys",
                key.id(),
                names.join(", "),
                manifest.name
            ));
        }
        Ok(VerifiedManifest { manifest, covers_policy })
    }

    /// The manifest without any check, for messages.
    ///
    /// # Errors
    /// The text is not a manifest.
    pub fn claims(&self) -> Result<PushManifest> {
        serde_json::from_str(&self.manifest)
            .map_err(|error| Error::invalid(format!("the signed text is not a manifest: {error}")))
    }
}

impl VerifiedManifest {
    /// What the push may ask of its rollout: the signed policy. Beside a statement that does not
    /// cover it, it is what was `sent` with the push.
    ///
    /// # Errors
    /// Refused: it is for another deployment than `audience`, it has expired at `now_ms`, or
    /// something else was sent than was signed.
    pub fn policy(
        &self,
        audience: &str,
        now_ms: i64,
        sent: &PolicyOverrides,
    ) -> Result<PolicyOverrides> {
        let refused = |why: String| Err(Error::refused(why));
        let PushManifest { expires_ms, policy, .. } = &self.manifest;
        let named = self.manifest.audience.as_deref().unwrap_or_default();
        if named != audience {
            let is_for = if named.is_empty() { "no deployment" } else { named };
            return refused(format!(
                "the signature names {is_for}, and this deployment is {audience:?} (rollout.audience); sign it again with --audience {audience:?}"
            ));
        }
        if let Some(expired) = expires_ms.filter(|expires_ms| *expires_ms <= now_ms) {
            return refused(format!(
                "the signature expired at {expired} (milliseconds since 1970), and it is {now_ms}; sign it again"
            ));
        }
        match self.covers_policy {
            false => Ok(sent.clone()),
            true if *sent == PolicyOverrides::default() || sent == policy => Ok(policy.clone()),
            true => refused(
                "the push asks for other conditions than were signed; give them to `hypercast plugin sign`"
                    .into(),
            ),
        }
    }
}

fn message(domain: &[u8], manifest: &str) -> Vec<u8> {
    [domain, manifest.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use hypercast_config::sha256;

    use super::*;

    fn manifest() -> PushManifest {
        PushManifest {
            name: "feed".into(),
            version: "1.2.0".into(),
            contract: "1.0.0".into(),
            surfaces: vec!["feed".into()],
            fm: None,
            component: sha256(b"component"),
            parameters: None,
            created_ms: 5,
            audience: Some("prod".into()),
            expires_ms: Some(10),
            policy: PolicyOverrides { canary_share: Some(0.01), ..PolicyOverrides::default() },
        }
    }

    fn trusts(key: &SecretKey, names: &[&str]) -> TrustedKey {
        let names = names.iter().map(|name| name.to_string()).collect();
        TrustedKey { key: key.public(), names }
    }

    #[test]
    fn what_was_signed_is_what_is_verified() {
        let key = SecretKey::generate().unwrap();
        let other = SecretKey::generate().unwrap();
        let signed = key.sign(&manifest());
        let trusted = [trusts(&other, &[]), trusts(&key, &["search", "feed"])];
        let verified = signed.verify(&trusted).unwrap();
        assert_eq!(verified, VerifiedManifest { manifest: manifest(), covers_policy: true });
        let why = signed.verify(&[trusts(&key, &["search"])]).unwrap_err().to_string();
        assert!(why.contains("may push search, and not \"feed\""), "{why}");
        let why = signed.verify(&trusted[..1]).unwrap_err().to_string();
        assert!(why.contains("not trusted") && why.contains("rollout.trusted_keys"), "{why}");
        let changed = SignedManifest {
            manifest: signed.manifest.replace("1.2.0", "1.3.0"),
            ..signed.clone()
        };
        assert!(changed.verify(&trusted).unwrap_err().to_string().contains("signature"));
        // Naming another trusted key does not help.
        let posing = SignedManifest { key: other.public().id(), ..signed };
        assert!(posing.verify(&trusted).unwrap_err().to_string().contains("signature"));
    }

    #[test]
    fn a_signature_holds_for_its_deployment_its_time_and_its_policy() {
        let key = SecretKey::generate().unwrap();
        let verified = key.sign(&manifest()).verify(&[trusts(&key, &[])]).unwrap();
        let (signed, nothing) = (manifest().policy, PolicyOverrides::default());
        for sent in [&signed, &nothing] {
            assert_eq!(verified.policy("prod", 9, sent).unwrap(), signed);
        }
        let other = PolicyOverrides { replace: true, ..signed.clone() };
        for (audience, now_ms, sent, word) in [
            ("", 9, &signed, "names prod"),
            ("test", 9, &signed, "names prod"),
            ("prod", 10, &signed, "expired"),
            ("prod", 9, &other, "other conditions than were signed"),
        ] {
            let why = verified.policy(audience, now_ms, sent).unwrap_err().to_string();
            assert!(why.contains(word), "{word}: {why}");
        }
    }

    #[test]
    fn a_statement_of_the_first_version_holds_with_the_policy_that_is_sent() {
        let key = SecretKey::generate().unwrap();
        let text = r#"{"name":"feed","version":"1.2.0","contract":"1.0.0","component":"ab","created_ms":5}"#;
        let signature = hex(key.pair.sign(&message(FIRST_DOMAIN, text)).as_ref());
        let signed = SignedManifest { manifest: text.into(), key: key.public().id(), signature };
        let verified = signed.verify(&[trusts(&key, &[])]).unwrap();
        assert!(!verified.covers_policy);
        let sent = manifest().policy;
        assert_eq!(verified.policy("", 9, &sent).unwrap(), sent);
        let why = verified.policy("prod", 9, &sent).unwrap_err().to_string();
        assert!(why.contains("names no deployment") && why.contains("--audience"), "{why}");
    }

    #[test]
    fn keys_are_files_that_are_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("team.key");
        let key = SecretKey::generate().unwrap();
        key.write(&path).unwrap();
        assert!(key.write(&path).is_err());
        assert_eq!(SecretKey::read(&path).unwrap().public(), key.public());
        assert_eq!(PublicKey::parse(&key.public().text()).unwrap(), key.public());
        std::fs::write(&path, "ed25519-secret:00ff").unwrap();
        assert!(SecretKey::read(&path).is_err());
        assert!(PublicKey::parse("ed25519:12").is_err());
    }

    #[test]
    fn the_hash_is_sha256() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b""), empty);
    }
}

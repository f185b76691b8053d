//! Pushes that were changed on the way. Each must be refused, or contain exactly what was signed.

use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use hypercast_config::{TrustedKey, sha256};
use hypercast_serve::rollout::frame::Push;
use hypercast_serve::rollout::policy::PolicyOverrides;
use hypercast_serve::rollout::signature::{PushManifest, SecretKey};

use crate::edit;

/// A placeholder; this target does not load components.
const COMPONENT: &[u8] = b"\0asm component";

struct SignedPush {
    body: Vec<u8>,
    manifest: PushManifest,
    key: TrustedKey,
}

/// Changes the body of a push, reads it and verifies its signature.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let SignedPush { body, manifest, key } = sent();
    let mut body = body.clone();
    edit::edits(u, &mut body, 4)?;
    if u.ratio(1, 2)? && body.len() > 12 {
        // Set the header's length, so that a header of another size gets past the frame.
        let end = body.len().saturating_sub(COMPONENT.len() + 10);
        let length = (end.saturating_sub(12) as u32).to_le_bytes();
        body[8..12].copy_from_slice(&length);
    }
    let Ok(push) = Push::decode(&body) else { return Ok(()) };
    let _ = push.signed.claims();
    if let Ok(verified) = push.signed.verify(std::slice::from_ref(key)) {
        assert_eq!(verified.manifest, *manifest, "the manifest is the signed one");
        if let Ok(policy) = verified.policy("prod", 1_700_000_000_001, &push.wishes) {
            assert_eq!(policy, manifest.policy, "the policy is the signed one");
        }
    }
    assert_eq!(Push::decode(&push.encode()).expect("the push was read before"), push);
    Ok(())
}

fn sent() -> &'static SignedPush {
    static SENT: OnceLock<SignedPush> = OnceLock::new();
    SENT.get_or_init(|| {
        let secret = SecretKey::generate().expect("a key");
        let parameters = b"parameters".as_slice();
        let manifest = PushManifest {
            name: "expert".into(),
            version: "1.0.0".into(),
            contract: "2.0.0".into(),
            surfaces: vec!["feed".into()],
            fm: Some("1.0.0".into()),
            component: sha256(COMPONENT),
            parameters: Some(sha256(parameters)),
            created_ms: 1_700_000_000_000,
            audience: Some("prod".into()),
            expires_ms: Some(1_800_000_000_000),
            policy: PolicyOverrides { canary_share: Some(0.5), ..PolicyOverrides::default() },
        };
        let push = Push {
            signed: secret.sign(&manifest),
            wishes: manifest.policy.clone(),
            component: COMPONENT,
            parameters: Some(parameters),
        };
        let key = TrustedKey { key: secret.public(), names: vec!["expert".into()] };
        SignedPush { body: push.encode(), manifest, key }
    })
}

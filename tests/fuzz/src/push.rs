//! A push that somebody changed on its way: refused, or vouched for by the signature as it was sent.

use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use hypercast_config::{PublicKey, sha256};
use hypercast_serve::rollout::frame::Push;
use hypercast_serve::rollout::limits::Wishes;
use hypercast_serve::rollout::signature::{Manifest, SecretKey};

use crate::edit;

/// A component that nobody loads here.
const COMPONENT: &[u8] = b"\0asm component";

struct Sent {
    body: Vec<u8>,
    manifest: Manifest,
    key: PublicKey,
}

/// Changes the body, reads it and checks who vouches for it.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let Sent { body, manifest, key } = sent();
    let mut body = body.clone();
    edit::edits(u, &mut body, 4)?;
    if u.ratio(1, 2)? && body.len() > 12 {
        // The header's length, so that changes of its size come past the frame.
        let end = body.len().saturating_sub(COMPONENT.len() + 10);
        let length = (end.saturating_sub(12) as u32).to_le_bytes();
        body[8..12].copy_from_slice(&length);
    }
    let Ok(push) = Push::decode(&body) else { return Ok(()) };
    let _ = push.signed.claims();
    if let Ok(vouched) = push.signed.verify(std::slice::from_ref(key)) {
        assert_eq!(vouched, *manifest, "what was signed");
    }
    assert_eq!(Push::decode(&push.encode()).expect("it was read"), push);
    Ok(())
}

fn sent() -> &'static Sent {
    static SENT: OnceLock<Sent> = OnceLock::new();
    SENT.get_or_init(|| {
        let secret = SecretKey::generate().expect("a key");
        let parameters = b"parameters".as_slice();
        let manifest = Manifest {
            name: "expert".into(),
            version: "1.0.0".into(),
            contract: "2.0.0".into(),
            surfaces: vec!["feed".into()],
            fm: Some("1.0.0".into()),
            component: sha256(COMPONENT),
            parameters: Some(sha256(parameters)),
            created_ms: 1_700_000_000_000,
        };
        let push = Push {
            signed: secret.sign(&manifest),
            wishes: Wishes { canary_share: Some(0.5), ..Wishes::default() },
            component: COMPONENT,
            parameters: Some(parameters),
        };
        Sent { body: push.encode(), manifest, key: secret.public() }
    })
}

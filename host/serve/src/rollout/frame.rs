//! The body of a push: a header and the files after it.
//!
//! Layout: `hcpush01`, the header's length (four bytes, little-endian), the header as JSON, the
//! component, and the parameters if there are any. The lengths in the header must add up.

use serde::{Deserialize, Serialize};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{policy::PolicyOverrides, signature::SignedManifest},
};

/// The first bytes of a body.
const MAGIC: &[u8; 8] = b"hcpush01";

/// Limit of the header, in bytes.
const MAX_HEADER: usize = 64 << 10;

/// The header before the files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PushHeader {
    signed: SignedManifest,
    #[serde(default)]
    wishes: PolicyOverrides,
    component_bytes: usize,
    #[serde(default)]
    parameters_bytes: Option<usize>,
}

/// A push as it travels: manifest, component and parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Push<'a> {
    /// The signed manifest.
    pub signed: SignedManifest,
    /// What the push asks for beyond the operator's policy.
    pub wishes: PolicyOverrides,
    /// The component.
    pub component: &'a [u8],
    /// Its parameters; none starts from those of the version that serves.
    pub parameters: Option<&'a [u8]>,
}

impl<'a> Push<'a> {
    /// The body of a push as it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let header = PushHeader {
            signed: self.signed.clone(),
            wishes: self.wishes.clone(),
            component_bytes: self.component.len(),
            parameters_bytes: self.parameters.map(<[u8]>::len),
        };
        let header = serde_json::to_vec(&header).expect("a plain struct serialises");
        let length = (header.len() as u32).to_le_bytes();
        let parameters = self.parameters.unwrap_or_default();
        [MAGIC.as_slice(), &length, &header, self.component, parameters].concat()
    }

    /// Decodes a body.
    ///
    /// # Errors
    /// The body is cut short, too long, or not a push.
    pub fn decode(body: &'a [u8]) -> Result<Self> {
        let wrong = |why: String| Error::invalid(format!("the body is not a push: {why}"));
        let rest = body.strip_prefix(MAGIC).ok_or_else(|| {
            wrong("it does not start with hcpush01; use `hypercast plugin push`".into())
        })?;
        let (length, rest) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| wrong("it ends within its length".into()))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_HEADER {
            return Err(wrong(format!(
                "its header has {length} bytes, and at most {MAX_HEADER} are allowed"
            )));
        }
        let (header, files) = rest
            .split_at_checked(length)
            .ok_or_else(|| wrong("it ends within its header".into()))?;
        let header: PushHeader = serde_json::from_slice(header)
            .map_err(|error| wrong(format!("its header: {error}")))?;
        let expected = header.component_bytes.checked_add(header.parameters_bytes.unwrap_or(0));
        if expected != Some(files.len()) {
            return Err(wrong(format!(
                "its files have {} bytes, but its header says {}: it is truncated, or something was added",
                files.len(),
                expected.map_or("too many".into(), |bytes| bytes.to_string())
            )));
        }
        let (component, parameters) = files.split_at(header.component_bytes);
        Ok(Self {
            signed: header.signed,
            wishes: header.wishes,
            component,
            parameters: header.parameters_bytes.map(|_| parameters),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_whole_or_refused() {
        let signed =
            SignedManifest { manifest: "{}".into(), key: "k".into(), signature: "00".into() };
        let wishes = PolicyOverrides { canary_share: Some(0.05), ..PolicyOverrides::default() };
        for parameters in [None, Some(b"parameters".as_slice()), Some(b"".as_slice())] {
            let push = Push {
                signed: signed.clone(),
                wishes: wishes.clone(),
                component: b"wasm",
                parameters,
            };
            let body = push.encode();
            assert_eq!(Push::decode(&body).unwrap(), push);
            for cut in 0..body.len() {
                assert!(Push::decode(&body[..cut]).is_err(), "cut at {cut}");
            }
            assert!(Push::decode(&[body.as_slice(), b"x"].concat()).is_err());
        }
        let long = [MAGIC.as_slice(), &u32::MAX.to_le_bytes()].concat();
        assert!(Push::decode(&long).unwrap_err().to_string().contains("at most"));
    }
}

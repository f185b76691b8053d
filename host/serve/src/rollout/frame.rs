//! How a push travels: one body, a header and the files behind it.
//!
//! `hcpush01`, the header's length (four bytes, little-endian), the header as JSON, the component, and the parameters if
//! there are any. Lengths are in the header and must add up; what the bytes mean is checked elsewhere.

use serde::{Deserialize, Serialize};

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{policy::PolicyOverrides, signature::SignedManifest},
};

/// A body's first bytes.
const MAGIC: &[u8; 8] = b"hcpush01";

/// The largest header, in bytes.
const MAX_HEADER: usize = 64 << 10;

/// What precedes the files.
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

/// A push.
#[derive(Debug, Clone, PartialEq)]
pub struct Push<'a> {
    /// Who vouches for it.
    pub signed: SignedManifest,
    /// How it is to go.
    pub wishes: PolicyOverrides,
    /// The component.
    pub component: &'a [u8],
    /// Its parameters; none starts from those of the version that serves.
    pub parameters: Option<&'a [u8]>,
}

impl<'a> Push<'a> {
    /// The body.
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

    /// Reads a body.
    ///
    /// # Errors
    /// One that is cut short, longer than it says, or no push.
    pub fn decode(body: &'a [u8]) -> Result<Self> {
        let wrong = |why: String| Error::invalid(format!("the body is no push: {why}"));
        let rest = body.strip_prefix(MAGIC).ok_or_else(|| {
            wrong("it does not begin with hcpush01; use `hypercast plugin push`".into())
        })?;
        let (length, rest) =
            rest.split_first_chunk::<4>().ok_or_else(|| wrong("it is cut short".into()))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_HEADER {
            return Err(wrong(format!(
                "its header has {length} bytes, at most {MAX_HEADER} may be"
            )));
        }
        let (header, files) = rest
            .split_at_checked(length)
            .ok_or_else(|| wrong("it is cut short within its header".into()))?;
        let header: PushHeader = serde_json::from_slice(header)
            .map_err(|error| wrong(format!("its header: {error}")))?;
        let said = header.component_bytes.checked_add(header.parameters_bytes.unwrap_or(0));
        if said != Some(files.len()) {
            return Err(wrong(format!(
                "its files have {} bytes, and the header says {}: it is cut short, or something was added",
                files.len(),
                said.map_or("too many".into(), |said| said.to_string())
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

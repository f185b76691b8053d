//! Bounds the connections of one peer, so that one machine cannot take all of them.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex},
};

use crate::threads::lock;

/// Counts open connections by peer.
pub(crate) struct PeerLimit {
    most: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl PeerLimit {
    /// Lets each peer have at most `most` connections at a time.
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, open: Mutex::default() })
    }

    /// A place for one more connection of the peer at `address`; none if it has all of its own.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<PeerPlace> {
        let peer = peer_of(address);
        let mut open = lock(&self.open);
        let own = open.entry(peer).or_default();
        if *own >= self.most {
            return None;
        }
        *own += 1;
        Some(PeerPlace { limit: self.clone(), peer })
    }
}

/// One of a peer's places, given back on drop.
pub(crate) struct PeerPlace {
    limit: Arc<PeerLimit>,
    peer: IpAddr,
}

impl Drop for PeerPlace {
    fn drop(&mut self) {
        let mut open = lock(&self.limit.open);
        match open.get_mut(&self.peer) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(open.remove(&self.peer)),
        }
    }
}

/// The peer that an address belongs to. A machine with IPv6 has a whole /64 of addresses.
fn peer_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_peer_has_its_own_places() {
        let limit = PeerLimit::new(2);
        let first = limit.enter(address("10.0.0.1")).unwrap();
        let _second = limit.enter(address("::ffff:10.0.0.1")).unwrap();
        assert!(limit.enter(address("10.0.0.1")).is_none(), "the same address in IPv6's form");
        assert!(limit.enter(address("10.0.0.2")).is_some());
        drop(first);
        assert!(limit.enter(address("10.0.0.1")).is_some());
    }

    #[test]
    fn addresses_of_one_network_are_one_peer_and_none_is_remembered() {
        let limit = PeerLimit::new(1);
        let place = limit.enter(address("2001:db8::1")).unwrap();
        assert!(limit.enter(address("2001:db8::ffff:2")).is_none());
        assert!(limit.enter(address("2001:db8:0:1::1")).is_some());
        drop(place);
        assert!(lock(&limit.open).is_empty());
    }
}

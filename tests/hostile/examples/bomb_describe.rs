//! `describe` allocates memory without end.

use hypercast_sdk::{Description, Expert, Graph, HostInfo};

struct BombDescribe;

impl Expert for BombDescribe {
    fn describe(_info: &HostInfo) -> Description {
        let mut held = Vec::new();
        loop {
            held.push(std::hint::black_box(vec![1u8; 1 << 20]));
        }
    }

    fn network(g: &Graph) {
        hypercast_hostile::network(g);
    }
}

hypercast_sdk::export!(BombDescribe);

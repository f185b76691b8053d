//! `rank` works for up to 15 candidates. With more it does harm, and how many there are decides
//! which: what the first requests of a version do not show, and a test can call for at any step of
//! its rollout.

use hypercast_hostile::{ValidExpert, hostile_expert};
use hypercast_sdk::{Expert, Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        match request.candidates.len() {
            16 => panic!("intended panic: 16 candidates"),
            17 => loop {
                std::hint::black_box(());
            },
            18 => {
                let mut held = Vec::new();
                loop {
                    held.push(std::hint::black_box(vec![1u8; 1 << 20]));
                }
            }
            19 => Ok(request.top(&[descend(request.limit as u64) as f32])),
            20 => Err("x".repeat(20 << 20)),
            _ => <ValidExpert as Expert>::rank(request),
        }
    }
}

#[expect(unconditional_recursion, reason = "a fault that this guest is for")]
fn descend(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 16]);
    descend(depth + 1) + frame[3]
}

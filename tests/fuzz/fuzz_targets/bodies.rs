//! `fuzz/run bodies`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::BODIES.run(bytes));

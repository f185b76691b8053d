//! The program of `tests/fuzz/run learning`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::LEARNING.run(bytes));

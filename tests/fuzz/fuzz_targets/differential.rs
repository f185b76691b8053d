//! The program of `tests/fuzz/run differential`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::DIFFERENTIAL.run(bytes));

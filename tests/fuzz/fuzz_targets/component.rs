//! `fuzz/run component`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::COMPONENT.run(bytes));

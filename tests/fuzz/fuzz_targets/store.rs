//! `fuzz/run store`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::STORE.run(bytes));

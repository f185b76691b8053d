//! `fuzz/run update`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::UPDATE.run(bytes));

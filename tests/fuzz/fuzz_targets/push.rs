//! `fuzz/run push`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::PUSH.run(bytes));

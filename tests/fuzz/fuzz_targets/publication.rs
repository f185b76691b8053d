//! `fuzz/run publication`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::PUBLICATION.run(bytes));

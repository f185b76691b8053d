//! `fuzz/run graph`.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hypercast_fuzz::GRAPH.run(bytes));

//! Black-box tests of the store against a model in a hash map.

mod crash;
mod damage;
mod model;
mod random;
mod sharing;

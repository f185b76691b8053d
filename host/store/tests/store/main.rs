//! Black-box tests of the store against a model in a hash map.

mod crash;
mod cut;
mod damage;
mod live;
mod model;
mod random;
mod rows;
mod sharing;

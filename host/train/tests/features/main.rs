//! What the FM learns of features: each test makes a world in which one feature tells the label, or
//! misleads.

mod missing;
mod position_bias;
mod small_fm;
mod tags;

//! A parameter with an option that no host knows yet.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::{Attribute, Network, Value};

hostile_mutant! {
    fn mutate(network: &mut Network) {
        let option = Attribute { name: "momentum".into(), value: Value::Number(0.9) };
        network.parameters[0].options.push(option);
    }
}

//! A component of another version of the contract. The host must refuse it before running any of
//! its code.

#![allow(missing_docs, reason = "generated bindings")]

wit_bindgen::generate!({
    inline: "
        package hypercast:expert@1.0.0;

        interface types {
            record host-info { tae-dim: u32 }
            record description { name: string }
        }

        world expert {
            use types.{host-info, description};
            export describe: func(info: host-info) -> description;
        }
    ",
});

struct ForeignVersion;

impl Guest for ForeignVersion {
    fn describe(_info: HostInfo) -> Description {
        panic!("a host of version 3 must refuse this component before it calls it")
    }
}

export!(ForeignVersion);

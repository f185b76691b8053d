//! A component of another version of the contract, which the host must refuse before it runs any of it.

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
        panic!("a host of version 2 must not come this far")
    }
}

export!(ForeignVersion);

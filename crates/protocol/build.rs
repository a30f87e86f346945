//! Generates the agent's ttrpc service from `agent.proto`.

fn main() -> std::io::Result<()> {
    #[cfg(feature = "agent")]
    generate()?;
    Ok(())
}

#[cfg(feature = "agent")]
fn generate() -> std::io::Result<()> {
    use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = std::path::PathBuf::from(
        std::env::var_os("OUT_DIR").ok_or_else(|| std::io::Error::other("cargo sets no OUT_DIR"))?,
    );
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/agent.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generated files open with inner attributes, so they can be modules of a file but not included themselves.
    std::fs::write(out.join("services.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")
}

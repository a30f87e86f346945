//! Generates the ttrpc services of the agent and of a shim for operators from `agent.proto` and `operator.proto`, and the CRI's
//! messages from `cri.proto`.

fn main() -> std::io::Result<()> {
    #[cfg(feature = "agent")]
    generate("agent", &["agent", "agent_ttrpc"])?;
    #[cfg(feature = "cri")]
    generate("cri", &["cri"])?;
    #[cfg(feature = "operator")]
    generate("operator", &["operator", "operator_ttrpc"])?;
    Ok(())
}

/// Generates `proto/NAME.proto` into a directory of its own, with a file that declares what was made as modules.
#[cfg(any(feature = "agent", feature = "cri", feature = "operator"))]
fn generate(name: &str, modules: &[&str]) -> std::io::Result<()> {
    use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

    let proto = format!("proto/{name}.proto");
    println!("cargo::rerun-if-changed={proto}");
    let out = std::env::var_os("OUT_DIR").ok_or_else(|| std::io::Error::other("cargo sets no OUT_DIR"))?;
    let out = std::path::PathBuf::from(out).join(name);
    std::fs::create_dir_all(&out)?;
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input(&proto)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generated files open with inner attributes, so they can be modules of a file but not included themselves.
    let declarations: String = modules.iter().map(|module| format!("pub mod {module};\n")).collect();
    std::fs::write(out.join("modules.rs"), declarations)
}

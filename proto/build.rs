//! Compiles the `.proto` files in pure Rust: no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=v1");
    let descriptors = protox::compile(
        ["v1/blocks.proto", "v1/cluster.proto", "v1/local.proto"],
        ["."],
    )?;
    tonic_prost_build::configure()
        // Every `bytes` field becomes `bytes::Bytes`, so that a decoded payload is a slice, not a copy.
        .bytes(".")
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)?;
    Ok(())
}

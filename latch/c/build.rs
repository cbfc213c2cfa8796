//! Gives the shared library its name for the loader.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,liblatchkey.so.0");
    println!("cargo:rerun-if-changed=build.rs");
}

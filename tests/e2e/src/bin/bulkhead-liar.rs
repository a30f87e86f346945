//! Stands in for `bulkhead-vmm`: see [`bulkhead_e2e::liar`]. The shim starts it with the control socket as its stdin.

fn main() -> anyhow::Result<()> {
    bulkhead_e2e::liar::run()
}

//! `bulkhead-vmm`.

fn main() {}

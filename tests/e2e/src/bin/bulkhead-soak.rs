//! `make soak-pods`: create, exec and delete again and again, then many pods at once.
//!
//!     bulkhead-soak [CYCLES [PODS]]

use std::env;

use bulkhead_e2e::{on_node, soak};

/// Pods that take turns in the cycles.
const TURNS: usize = 4;

fn main() {
    let number = |index, default| env::args().nth(index).and_then(|word| word.parse().ok()).unwrap_or(default);
    let (cycles, pods) = (number(1, 200), number(2, 20));
    on_node(async |node| soak::cycles(node, TURNS, cycles).await);
    println!("soak: {cycles} cycles, nothing left");
    on_node(async |node| soak::at_once(node, pods).await);
    println!("soak: {pods} pods at once, nothing left");
}

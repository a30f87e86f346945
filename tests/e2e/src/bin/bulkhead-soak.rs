//! `make soak-pods`: create, exec and delete again and again, then many pods at once.
//!
//!     bulkhead-soak [CYCLES [PODS]]
//!     bulkhead-soak storm [PODS [AT ONCE]]     pods that come and go: 50, 200 and 500 of them on real hardware

use std::env;

use bulkhead_e2e::{on_node, soak};

/// Pods that take turns in the cycles.
const TURNS: usize = 4;

fn main() {
    let number = |index, default| env::args().nth(index).and_then(|word| word.parse().ok()).unwrap_or(default);
    if env::args().nth(1).as_deref() == Some("storm") {
        let (pods, at_once) = (number(2, 50), number(3, 10));
        on_node(async |node| soak::storm(node, pods, at_once).await);
        println!("soak: a storm of {pods} pods, nothing left");
        return;
    }
    let (cycles, pods) = (number(1, 200), number(2, 20));
    on_node(async |node| soak::cycles(node, TURNS, cycles).await);
    println!("soak: {cycles} cycles, nothing left");
    on_node(async |node| soak::at_once(node, pods).await);
    println!("soak: {pods} pods at once, nothing left");
}

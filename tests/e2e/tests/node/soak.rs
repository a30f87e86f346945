//! A short form of `make soak-pods`.

use bulkhead_e2e::{on_node, soak};

#[test]
fn containers_come_and_go_and_cost_their_pod_nothing() {
    on_node(async |node| soak::cycles(node, 1, 3 * soak::WARM_UP).await);
}

#[test]
fn pods_run_at_once_and_leave_nothing() {
    on_node(async |node| soak::at_once(node, 4).await);
}

use super::*;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

fn ring(driver: &DriverQueue, memory: &Memory, interrupt: &Arc<TestInterrupt>) -> Ring {
    Ring::take(&mut activation(memory, 0, &[driver], interrupt), 0).unwrap()
}

#[test]
fn staged_chains_appear_together() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 4);
    let mut ring = ring(&driver, &memory, &interrupt);
    for _ in 0..3 {
        ring.stage(1, 10).unwrap();
        ring.stage(2, 20).unwrap();
        assert_eq!(driver.take_used(), None);
        ring.publish().unwrap();
        assert_eq!([driver.take_used(), driver.take_used()], [Some((1, 10)), Some((2, 20))]);
    }
}

#[test]
fn head_that_the_queue_does_not_have_is_an_error() {
    let (memory, interrupt) = (memory(), Arc::default());
    let driver = DriverQueue::new(&memory, 0x1_0000, 4);
    let mut ring = ring(&driver, &memory, &interrupt);
    assert!(matches!(ring.push(4, 0), Err(RingError::Head(4))));
}

#[test]
fn driver_is_interrupted_once_for_the_chain_that_it_waits_for() {
    let (memory, interrupt) = (memory(), Arc::<TestInterrupt>::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 4).with_event_idx();
    let mut ring = ring(&driver, &memory, &interrupt);
    let mut expected = 0;
    // Around the wrap of the indices.
    for _ in 0..0x1_0010 / 2 {
        ring.push(0, 0).unwrap();
        ring.push(1, 0).unwrap();
        ring.notify().unwrap();
        ring.push(2, 0).unwrap();
        // The driver waits for the first of the three.
        ring.notify().unwrap();
        expected += 1;
        while driver.take_used().is_some() {}
    }
    assert_eq!(interrupt.count(0), expected);
}

#[test]
fn drain_that_runs_out_of_budget_comes_back() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
    let mut ring = ring(&driver, &memory, &interrupt);
    for _ in 0..5 {
        driver.add(&[(0, 16, false)]);
    }
    let mut step = |ring: &mut Ring| {
        let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
        ring.push(chain.head_index(), 0)?;
        Ok(Step::Done)
    };
    ring.drain(4, &mut step).unwrap();
    assert_eq!(ring.kick().read().unwrap(), 1);
    ring.drain(4, &mut step).unwrap();
    assert!(ring.kick().read().is_err());
    assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 5);
}
